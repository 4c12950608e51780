"""Where pickles of xprnn 0.1.0 name the embedding."""

from .nn.embedding import Embedding  # noqa: F401
