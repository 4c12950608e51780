"""Recurrent layers with exact hand-written gradients, on NumPy and CuPy, without torch."""

from . import functional
from .backend import (
    BackendUnavailableError,
    asarray,
    get_backend,
    to_numpy,
    use_backend,
)
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .kernels import KernelUnavailableError
from .module import load
from .modules import GRU, LSTM, RNN

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendUnavailableError",
    "GRUCell",
    "KernelUnavailableError",
    "LSTMCell",
    "RNNCell",
    "asarray",
    "functional",
    "get_backend",
    "load",
    "to_numpy",
    "use_backend",
]
