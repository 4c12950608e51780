"""The cells by name."""

from __future__ import annotations

from ..core.cell import Cell
from .gru import GRU, GRUResetBefore
from .lstm import LSTM
from .rnn import RNN

CELLS: dict[str, Cell] = {
    cell.name: cell for cell in (RNN("tanh"), RNN("relu"), GRU(), GRUResetBefore(), LSTM())
}
