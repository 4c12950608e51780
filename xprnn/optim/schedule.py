"""Learning-rate decay and gradient clipping."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from ..backend import Array
from ..backend.exports import exported_from
from ..core.checks import Checked, check_count, check_flag, check_number, check_size
from ..core.oom import translate_out_of_memory
from ..nn.module import Module
from .optimizer import Optimizer, as_modules, check_rate
from .state import Stateful


@exported_from("xprnn.optim")
class CosineDecay(Stateful):
    """Lowers an optimiser's learning rate along half a cosine, from its current value to `lr_min`.

    After k of `steps` steps, lr = lr_min + (lr_0 - lr_min) (1 + cos(π k / steps)) / 2, and
    lr_min from then on. I. Loshchilov, F. Hutter, "SGDR" (2017), without restarts.

    The attributes `steps`, `lr_max` (lr_0), `lr_min` and `done` (k) may be set at any time, with
    the checks of the constructor. The state and its file hold all of them except `steps`; the
    optimiser's `lr` is part of the optimiser's state.

    :param optimizer: the optimiser whose `lr` is set; its current value is lr_0.
    :param steps: at least 1.
    :param lr_min: at least 0.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import xprnn
    >>> optimizer = xprnn.optim.SGD([xprnn.Linear(2, 1)], lr=1.0)
    >>> decay = xprnn.optim.CosineDecay(optimizer, steps=2)
    >>> decay.step()
    >>> round(optimizer.lr, 6)
    0.5
    """

    steps: Checked[int] = Checked(check_size, "The number of steps of the decay.")
    lr_max: Checked[float] = Checked(check_rate, "lr_0, the learning rate before the decay.")
    lr_min: Checked[float] = Checked(check_rate, "The learning rate after the decay.")
    done: Checked[int] = Checked(check_count, "k, the number of steps taken.")
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
        """Set the optimiser's learning rate for its next step.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> optimizer = xprnn.optim.SGD([linear], lr=1.0)
        >>> decay = xprnn.optim.CosineDecay(optimizer, steps=2, lr_min=0.5)
        >>> for _ in range(3):
        ...     decay.step()
        ...     print(round(optimizer.lr, 6))
        0.75
        0.5
        0.5
        """
        self.done += 1
        factor = (1.0 + math.cos(math.pi * min(self.done / self.steps, 1.0))) / 2.0
        self._optimizer.lr = self.lr_min + (self.lr_max - self.lr_min) * factor

    def state_dict(self) -> dict[str, Any]:
        """The progress of the decay and its bounds.

        :return: `done`, `lr_max` and `lr_min`.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> decay = xprnn.optim.CosineDecay(xprnn.optim.SGD([linear], lr=1.0), steps=2)
        >>> state = decay.state_dict()
        >>> state
        {'done': 0, 'lr_max': 1.0, 'lr_min': 0.0}
        >>> decay.step()
        >>> decay.load_state_dict(state)
        >>> decay.done
        0
        """
        return {"done": self.done, "lr_max": self.lr_max, "lr_min": self.lr_min}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` returned; an example is there.

        :param state: `done`, `lr_max` and `lr_min`.
        :raises TypeError, ValueError: `state` is invalid; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"state of {type(self).__name__}: expected {', '.join(self.state_dict())}, "
                f"got {', '.join(map(str, state))}"
            )
        done = check_count("done", state["done"])
        lr_max, lr_min = (check_rate(name, state[name]) for name in ("lr_max", "lr_min"))
        self.done, self.lr_max, self.lr_min = done, lr_max, lr_min


@translate_out_of_memory
@exported_from("xprnn.optim")
def clip_grad_norm(
    modules: Iterable[Module], max_norm: float, error_if_nonfinite: bool | None = None
) -> Array:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`.

    dθ <- dθ min(1, max_norm / (‖dθ‖ + 1e-6)). R. Pascanu, T. Mikolov, Y. Bengio (2013); as
    `torch <https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html>`__.
    The norm is computed in float64, so that gradients whose squares overflow in float32 are
    clipped correctly.

    Scaling by a norm that is infinite or NaN would make all gradients, and after the next step all
    parameters, NaN. On the CPU such a norm is an error. On a GPU reading the norm would require
    synchronisation, so the device sets all gradients to zero if the norm is not finite, and only
    the returned norm shows it.

    :param modules: on one backend; their `grads` are scaled in place.
    :param max_norm: above 0; with infinity the norm is computed and gradients are unchanged.
    :param error_if_nonfinite: True: a norm that is not finite is an error, also on a GPU, with
        synchronisation, and with infinite `max_norm`. False: all gradients become zero if the
        norm is not finite, also on the CPU. None: as described above.
    :return: the norm before scaling, float64 (), on the modules' backend.
    :raises RuntimeError: the norm is not finite; the gradients are unchanged.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(1, 1, bias=False, seed=0).train()
    >>> _ = linear(np.ones((1, 1), np.float32))
    >>> _ = linear.backward(np.full((1, 1), 4.0, np.float32))
    >>> norm = clip_grad_norm([linear], 1.0)
    >>> float(norm), round(float(linear.grads["weight"][0, 0]), 5)
    (4.0, 1.0)
    """
    modules = as_modules(modules)
    norm_only = isinstance(max_norm, (float, np.floating)) and max_norm == math.inf
    if not norm_only:
        max_norm = check_number("max_norm", max_norm, sys.float_info.min, math.inf)
    backend = modules[0].backend
    if error_if_nonfinite is None:
        error_if_nonfinite = not (backend.on_gpu or norm_only)
    check_flag("error_if_nonfinite", error_if_nonfinite)
    if len(names := {module.backend.name for module in modules}) > 1:
        raise ValueError(f"modules: expected all on one backend, got {', '.join(sorted(names))}")
    xp = backend.xp
    with backend.activate():
        total = xp.zeros((), xp.float64)
        for module in modules:
            flat = module.grads.flat.astype(xp.float64)
            total = total + xp.dot(flat, flat)
        norm = xp.sqrt(total)
        if error_if_nonfinite and not math.isfinite(value := float(backend.to_host(norm))):
            raise RuntimeError(
                f"clip_grad_norm: the norm of the gradients is {value}; they are unchanged. Drop "
                "them with zero_grad(), or pass error_if_nonfinite=False to set them to zero"
            )
        if norm_only:
            return norm
        scale = xp.minimum(max_norm / (norm + 1e-6), 1.0)
        if not error_if_nonfinite:
            nonfinite = ~xp.isfinite(norm)
            scale = xp.where(nonfinite, 1.0, scale)
            for module in modules:
                xp.copyto(module.grads.flat, 0.0, "unsafe", nonfinite)
        for module in modules:
            gradients = module.grads.flat
            gradients *= scale.astype(module.dtype)
        return norm
