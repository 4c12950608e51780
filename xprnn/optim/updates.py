"""Where pickles of xprnn 0.1.0 name the optimisers."""

from .algorithms import SGD, Adam, AdamW  # noqa: F401
