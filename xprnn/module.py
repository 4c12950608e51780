"""Where pickles of xprnn 0.1.0 name the function that rebuilds modules."""

from .nn.module import Module, _rebuilt  # noqa: F401
