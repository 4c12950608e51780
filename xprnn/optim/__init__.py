"""Optimisers, in place on the modules' flat buffers; cosine decay and gradient clipping.

They refer to modules, never to arrays, and do not update frozen parameters. The updates are torch's
(https://docs.pytorch.org/docs/stable/optim.html) and are checked against it.
"""

from .algorithms import SGD, Adam, AdamW
from .optimizer import Optimizer
from .schedule import CosineDecay, clip_grad_norm

__all__ = ["SGD", "Adam", "AdamW", "CosineDecay", "Optimizer", "clip_grad_norm"]
