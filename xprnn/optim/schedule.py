"""What stands around an optimiser's step: a falling learning rate, a bounded gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..backend import Array
from ..checks import check_count, check_number, check_size
from ..memory import frees_memory
from ..module import Module
from .optimizer import Optimizer, as_modules


class CosineDecay:
    """Lowers an optimiser's learning rate along half a cosine, from its own to `lr_min`.

    After k of `steps` steps lr = lr_min + (lr_0 - lr_min) (1 + cos(π k / steps)) / 2, and
    lr_min from then on. I. Loshchilov, F. Hutter, "SGDR" (2017), without restarts.

    :param optimizer: whose `lr` to set; its value now is lr_0.
    :param steps: at least 1.
    :param lr_min: at least 0.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import xprnn
    >>> optimizer = xprnn.optim.SGD([xprnn.Linear(2, 1)], lr=1.0)
    >>> decay = xprnn.optim.CosineDecay(optimizer, steps=2)
    >>> decay.step()
    >>> round(optimizer.lr, 6)
    0.5
    """

    def __init__(self, optimizer: Optimizer, steps: int, lr_min: float = 0.0) -> None:
        self.optimizer = optimizer
        self.steps = check_size("steps", steps)
        self.lr_max = optimizer.lr
        self.lr_min = check_number("lr_min", lr_min, 0.0, math.inf)
        self.done = 0

    def step(self) -> None:
        """Set the learning rate for the next step."""
        self.done += 1
        share = (1.0 + math.cos(math.pi * min(self.done / self.steps, 1.0))) / 2.0
        self.optimizer.lr = self.lr_min + (self.lr_max - self.lr_min) * share

    def state_dict(self) -> dict[str, Any]:
        """How far the decay is, and between which rates."""
        return {"done": self.done, "lr_max": self.lr_max, "lr_min": self.lr_min}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; KeyError, TypeError or ValueError if it is not that."""
        done = check_count("done", state["done"])
        rates = [check_number(name, state[name], 0.0, math.inf) for name in ("lr_max", "lr_min")]
        self.done, (self.lr_max, self.lr_min) = done, rates


@frees_memory
def clip_grad_norm(modules: Iterable[Module], max_norm: float) -> Array:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`.

    dθ <- dθ min(1, max_norm / (|dθ| + 1e-6)). R. Pascanu, T. Mikolov, Y. Bengio (2013); as
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html.
    The norm is taken in float64, so that a gradient whose squares leave float32's range is
    clipped and not lost.

    :param modules: on one backend; their `grads` are scaled in place.
    :param max_norm: above 0; infinity only measures.
    :return: the norm before scaling, float64 (), on the modules' backend.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(1, 1, bias=False, seed=0).train()
    >>> _ = linear(np.ones((1, 1), np.float32))
    >>> _ = linear.backward(np.full((1, 1), 4.0, np.float32))
    >>> norm = clip_grad_norm([linear], 1.0)
    >>> float(norm), round(float(linear.grads["weight"][0, 0]), 5)
    (4.0, 1.0)
    """
    modules = as_modules(modules)
    if max_norm != math.inf:
        check_number("max_norm", max_norm, sys.float_info.min, math.inf)
    backend = modules[0].backend
    if len(names := {module.backend.name for module in modules}) > 1:
        raise ValueError(f"modules: expected all on one backend, got {', '.join(sorted(names))}")
    xp = backend.xp
    with backend.activate():
        total = xp.zeros((), xp.float64)
        for module in modules:
            wide = module.grads.flat.astype(xp.float64)
            total = total + xp.dot(wide, wide)
        norm = xp.sqrt(total)
        scale = xp.minimum(max_norm / (norm + 1e-6), 1.0)
        for module in modules:
            gradients = module.grads.flat
            gradients *= scale.astype(module.dtype)
        return norm
