"""The built-in cells as definitions, from which kernels are generated.

The cells of `cells/` are the readable mathematics, and what generated code is compared with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .defined_cell import DefinedCell
from .definition import cell


@cell(gates=("h",))
def rnn_tanh(f: Any, x: Any, s: Any) -> Any:
    """`cells.RNN` with tanh."""
    return f.tanh(x.h + f.recurrent(s.h).h)


@cell(gates=("h",))
def rnn_relu(f: Any, x: Any, s: Any) -> Any:
    """`cells.RNN` with relu."""
    return f.relu(x.h + f.recurrent(s.h).h)


@cell(gates=("r", "z", "n"))
def gru(f: Any, x: Any, s: Any) -> Any:
    """`cells.GRU`."""
    gh = f.recurrent(s.h)
    r, z = f.sigmoid(x.r + gh.r), f.sigmoid(x.z + gh.z)
    n = f.tanh(x.n + r * gh.n)
    return n + z * (s.h - n)


@cell(gates=("r", "z", "n"))
def gru_reset_before(f: Any, x: Any, s: Any) -> Any:
    """`cells.GRUResetBefore`."""
    gh = f.recurrent(s.h, "r", "z")
    r, z = f.sigmoid(x.r + gh.r), f.sigmoid(x.z + gh.z)
    n = f.tanh(x.n + f.recurrent(r * s.h, "n").n)
    return n + z * (s.h - n)


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def lstm(f: Any, x: Any, s: Any) -> Any:
    """`cells.LSTM`."""
    gh = f.recurrent(s.h)
    i, forget, o = f.sigmoid(x.i + gh.i), f.sigmoid(x.f + gh.f), f.sigmoid(x.o + gh.o)
    c = forget * s.c + i * f.tanh(x.g + gh.g)
    return o * f.tanh(c), c


BUILTIN = {each.name: each for each in (rnn_tanh, rnn_relu, gru, gru_reset_before, lstm)}


@lru_cache(64)
def builtin_cell(name: str, hidden_size: int) -> DefinedCell:
    """The definition of a built-in cell, with biases, for a hidden size."""
    return BUILTIN[name].cell(hidden_size, {}, {}, True)
