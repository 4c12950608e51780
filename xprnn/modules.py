"""Where pickles of xprnn 0.1.0 name the layers."""

from .nn.layers import GRU, LSTM, RNN  # noqa: F401
