"""Where pickles of xprnn 0.1.0 name the linear layer."""

from .nn.linear import Linear  # noqa: F401
