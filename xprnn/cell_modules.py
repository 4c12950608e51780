"""Where pickles of xprnn 0.1.0 name the cells."""

from .nn.cells import GRUCell, LSTMCell, RNNCell  # noqa: F401
