"""What stands around an optimiser's step: a falling learning rate, a bounded gradient."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from ..backend import Array
from ..backend.exports import exported_from
from ..checks import Checked, check_count, check_flag, check_number, check_size
from ..memory import frees_memory
from ..module import Module
from .optimizer import Optimizer, as_modules, check_rate
from .state import Stateful


@exported_from("xprnn.optim")
class CosineDecay(Stateful):
    """Lowers an optimiser's learning rate along half a cosine, from its own to `lr_min`.

    After k of `steps` steps lr = lr_min + (lr_0 - lr_min) (1 + cos(π k / steps)) / 2, and
    lr_min from then on. I. Loshchilov, F. Hutter, "SGDR" (2017), without restarts.

    The attributes `steps`, `lr_max` (lr_0), `lr_min` and `done` (k) may be set at any time and are
    checked then. The state, and its file, holds all of them but `steps`; the optimiser's `lr` is
    in the optimiser's own.

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

    steps: Checked[int] = Checked(check_size)
    lr_max: Checked[float] = Checked(check_rate)
    lr_min: Checked[float] = Checked(check_rate)
    done: Checked[int] = Checked(check_count)
    _renamed: ClassVar = {"optimizer": "_optimizer"}

    def __init__(self, optimizer: Optimizer, steps: int, lr_min: float = 0.0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected one of xprnn.optim, got {type(optimizer).__name__}"
            )
        self._optimizer = optimizer
        self.steps, self.done = steps, 0
        self.lr_max, self.lr_min = optimizer.lr, lr_min

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser whose learning rate is set."""
        return self._optimizer

    def step(self) -> None:
        """Set the learning rate for the next step."""
        self.done += 1
        share = (1.0 + math.cos(math.pi * min(self.done / self.steps, 1.0))) / 2.0
        self._optimizer.lr = self.lr_min + (self.lr_max - self.lr_min) * share

    def state_dict(self) -> dict[str, Any]:
        """How far the decay is, and between which rates."""
        return {"done": self.done, "lr_max": self.lr_max, "lr_min": self.lr_min}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        :raises TypeError, ValueError: it is not that; nothing is changed.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state of {type(self).__name__}: expected {', '.join(self.state_dict())}, "
                f"got {', '.join(map(str, state))}"
            )
        done = check_count("done", state["done"])
        lr_max, lr_min = (check_rate(name, state[name]) for name in ("lr_max", "lr_min"))
        self.done, self.lr_max, self.lr_min = done, lr_max, lr_min


@frees_memory
@exported_from("xprnn.optim")
def clip_grad_norm(
    modules: Iterable[Module], max_norm: float, error_if_nonfinite: bool | None = None
) -> Array:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`.

    dθ <- dθ min(1, max_norm / (|dθ| + 1e-6)). R. Pascanu, T. Mikolov, Y. Bengio (2013); as
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html.
    The norm is taken in float64, so that a gradient whose squares leave float32's range is
    clipped and not lost.

    A norm that is infinite or NaN says nothing about how to scale, and scaled by it all gradients,
    and after the next step all parameters, would be NaN. On the CPU it is an error. On a GPU to
    read the norm would be to wait for the device, so nothing is read: where it is not finite all
    gradients become zero there, by the device itself, and the norm that is returned tells.

    :param modules: on one backend; their `grads` are scaled in place.
    :param max_norm: above 0; infinity only measures: the gradients stay as they are.
    :param error_if_nonfinite: True: a norm that is not finite is an error on a GPU too, which
        waits for the device, and for an infinite `max_norm`. False: all gradients become zero
        where it is not finite, on the CPU too. None: as said above.
    :return: the norm before scaling, float64 (), on the modules' backend.
    :raises RuntimeError: the norm is not finite; the gradients stay as they are.
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
    measures = isinstance(max_norm, (float, np.floating)) and max_norm == math.inf
    if not measures:
        max_norm = check_number("max_norm", max_norm, sys.float_info.min, math.inf)
    backend = modules[0].backend
    if error_if_nonfinite is None:
        error_if_nonfinite = not (backend.on_gpu or measures)
    check_flag("error_if_nonfinite", error_if_nonfinite)
    if len(names := {module.backend.name for module in modules}) > 1:
        raise ValueError(f"modules: expected all on one backend, got {', '.join(sorted(names))}")
    xp = backend.xp
    with backend.activate():
        total = xp.zeros((), xp.float64)
        for module in modules:
            wide = module.grads.flat.astype(xp.float64)
            total = total + xp.dot(wide, wide)
        norm = xp.sqrt(total)
        if error_if_nonfinite and not math.isfinite(found := float(backend.to_host(norm))):
            raise RuntimeError(
                f"clip_grad_norm: the norm of the gradients is {found}; they are unchanged. Drop "
                "them with zero_grad(), or pass error_if_nonfinite=False to set them to zero"
            )
        if measures:
            return norm
        scale = xp.minimum(max_norm / (norm + 1e-6), 1.0)
        if not error_if_nonfinite:
            lost = ~xp.isfinite(norm)
            scale = xp.where(lost, 1.0, scale)
            for module in modules:
                xp.copyto(module.grads.flat, 0.0, "unsafe", lost)
        for module in modules:
            gradients = module.grads.flat
            gradients *= scale.astype(module.dtype)
        return norm
