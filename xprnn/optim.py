"""Optimisers, in place on the modules' flat buffers; gradient clipping and cosine decay.

They hold modules, never arrays, and leave frozen parameters alone. The updates are torch's
(https://docs.pytorch.org/docs/stable/optim.html) and are checked against it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from . import io
from .backend import Array, to_numpy
from .module import Module, state_errors


class Optimizer:
    """The base of the optimisers: walks over modules and keeps one flat buffer per slot."""

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, modules: Iterable[Module], lr: float) -> None:
        self.modules = list(modules)
        for module in self.modules:
            if not isinstance(module, Module):
                raise TypeError(f"modules: expected xprnn modules, got {type(module).__name__}")
        self.lr = check_number("lr", lr, 0.0, math.inf)
        self.steps = 0
        self._state = [
            {slot: module.backend.xp.zeros_like(module.grads.flat) for slot in self.slots}
            for module in self.modules
        ]
        self._scratch = [m.backend.xp.zeros_like(m.grads.flat) for m in self.modules]

    def step(self) -> None:
        """Update every parameter that is not frozen from its gradient.

        :raises RuntimeError: a module has been moved since; nothing is changed.
        """
        for module, scratch in zip(self.modules, self._scratch, strict=True):
            if not module.backend.owns(scratch) or scratch.dtype != module.dtype:
                raise RuntimeError(
                    f"{type(self).__name__}: a {type(module).__name__} was moved or cast after "
                    "the optimiser was built; build it after `to`"
                )
        self.steps += 1
        for module, state, scratch in zip(self.modules, self._state, self._scratch, strict=True):
            with module.backend.activate(), module.writable() as flat:
                for start, stop in module.trainable():
                    part = slice(start, stop)
                    self._update(
                        module.backend.xp,
                        flat[part],
                        module.grads.flat[part],
                        {slot: array[part] for slot, array in state.items()},
                        scratch[part],
                    )

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        """Add the step to `p`; `dp` is read, `state` updated, `t` scratch; all 1-D."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Set the gradients of all modules to zero."""
        for module in self.modules:
            module.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the learning rate, and copies of the slots by module."""
        arrays = {
            f"{k}.{slot}": array.copy()
            for k, state in enumerate(self._state)
            for slot, array in state.items()
        }
        return {"steps": self.steps, "lr": self.lr, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, for the same modules.

        :raises ValueError: entries are missing, unexpected or misshapen; nothing is changed.
        """
        values = dict(state)
        try:
            steps, lr = int(values.pop("steps")), float(values.pop("lr"))
        except KeyError as error:
            raise ValueError(f"state of {type(self).__name__}: missing {error}") from error
        shapes = {
            f"{k}.{slot}": tuple(array.shape)
            for k, slots in enumerate(self._state)
            for slot, array in slots.items()
        }
        arrays = {name: to_numpy(value) for name, value in values.items()}
        wrong = state_errors(shapes, arrays)
        if wrong:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(wrong))
        self.steps, self.lr = steps, lr
        for k, (module, slots) in enumerate(zip(self.modules, self._state, strict=True)):
            for slot, array in slots.items():
                host = arrays[f"{k}.{slot}"].astype(module.dtype)
                array[...] = module.backend.from_host(host)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all; OSError if that fails."""
        state = self.state_dict()
        options = {name: state.pop(name) for name in ("steps", "lr")}
        arrays = {name: to_numpy(array) for name, array in state.items()}
        io.write(path, type(self).__name__, options, arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what `save` wrote.

        :raises FileNotFoundError, ValueError: there is no such file, or it does not hold the
            state of such an optimiser for these modules; nothing is changed.
        """
        kind, options, arrays = io.read(path)
        if kind != type(self).__name__:
            raise ValueError(
                f"{os.fspath(path)}: holds a {kind!r}, expected a {type(self).__name__!r}"
            )
        self.load_state_dict({**options, **arrays})


class SGD(Optimizer):
    """Stochastic gradient descent with momentum: b <- momentum b + dp, p <- p - lr b.

    As https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html.

    :param modules: what to train; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param momentum: from 0 to below 1.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(2, 1, bias=False, dtype="float64", seed=0).train()
    >>> y = linear(np.ones((1, 2)))
    >>> _ = linear.backward(np.ones((1, 1)))
    >>> xprnn.optim.SGD([linear], lr=0.1).step()
    >>> round(float((linear(np.ones((1, 2))) - y)[0, 0]), 6)
    -0.2
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(self, modules: Iterable[Module], lr: float, momentum: float = 0.0) -> None:
        super().__init__(modules, lr)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        buffer = state["momentum_buffer"]
        buffer *= self.momentum
        buffer += dp
        xp.multiply(buffer, self.lr, out=t)
        p -= t


class Adam(Optimizer):
    """Adam: D. P. Kingma, J. Ba, "Adam: a method for stochastic optimization" (2015).

    With m and v the running means of dp and dp^2, corrected for their start at zero::

        p <- p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    As https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html.

    :param modules: what to train; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param betas: (b1, b2), each from 0 to below 1.
    :param eps: above 0.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import xprnn
    >>> xprnn.optim.Adam([xprnn.Linear(2, 1)], lr=0.01).lr
    0.01
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        modules: Iterable[Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(modules, lr)
        self.betas = (
            check_number("betas[0]", betas[0], 0.0, 1.0),
            check_number("betas[1]", betas[1], 0.0, 1.0),
        )
        self.eps = check_number("eps", eps, 0.0, math.inf)

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        (b1, b2), m, v = self.betas, state["exp_avg"], state["exp_avg_sq"]
        m *= b1
        xp.multiply(dp, 1.0 - b1, out=t)
        m += t
        v *= b2
        xp.multiply(dp, dp, out=t)
        t *= 1.0 - b2
        v += t

        xp.sqrt(v, out=t)
        t *= 1.0 / math.sqrt(1.0 - b2**self.steps)
        t += self.eps
        xp.divide(m, t, out=t)
        t *= self.lr / (1.0 - b1**self.steps)
        p -= t


class AdamW(Adam):
    """Adam with the weight decay apart from the gradient: p <- (1 - lr weight_decay) p first.

    I. Loshchilov, F. Hutter, "Decoupled weight decay regularization" (2019); as
    https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html.

    :param weight_decay: at least 0. The other parameters are those of `Adam`.

    >>> import xprnn
    >>> xprnn.optim.AdamW([xprnn.Linear(2, 1)]).weight_decay
    0.01
    """

    def __init__(
        self,
        modules: Iterable[Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(modules, lr, betas, eps)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0, math.inf)

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        p *= 1.0 - self.lr * self.weight_decay
        super()._update(xp, p, dp, state, t)


class CosineDecay:
    """Lowers an optimiser's learning rate along half a cosine, from its own to `lr_min`.

    After k of `steps` steps lr = lr_min + (lr_0 - lr_min) (1 + cos(π k / steps)) / 2, and
    lr_min from then on. I. Loshchilov, F. Hutter, "SGDR" (2017), without restarts.

    :param optimizer: whose `lr` to set; its value now is lr_0.
    :param steps: at least 1.
    :param lr_min: at least 0.

    >>> import xprnn
    >>> optimizer = xprnn.optim.SGD([xprnn.Linear(2, 1)], lr=1.0)
    >>> decay = xprnn.optim.CosineDecay(optimizer, steps=2)
    >>> decay.step()
    >>> round(optimizer.lr, 6)
    0.5
    """

    def __init__(self, optimizer: Optimizer, steps: int, lr_min: float = 0.0) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        self.optimizer = optimizer
        self.steps = steps
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
        """Take back what `state_dict` gave; KeyError if an entry is missing."""
        self.done, self.lr_max, self.lr_min = state["done"], state["lr_max"], state["lr_min"]


def clip_grad_norm(modules: Iterable[Module], max_norm: float) -> Array:
    """Scale all gradients so that their common Euclidean norm is at most `max_norm`.

    dθ <- dθ min(1, max_norm / (|dθ| + 1e-6)). R. Pascanu, T. Mikolov, Y. Bengio (2013); as
    https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html.
    The norm is taken in float64, so that a gradient whose squares leave float32's range is
    clipped and not lost.

    :param modules: on one backend; their `grads` are scaled in place.
    :param max_norm: above 0.
    :return: the norm before scaling, float64 (), on the modules' backend.
    :raises ValueError: `max_norm` is not above 0.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(1, 1, bias=False, seed=0).train()
    >>> _ = linear(np.ones((1, 1), np.float32))
    >>> _ = linear.backward(np.full((1, 1), 4.0, np.float32))
    >>> norm = clip_grad_norm([linear], 1.0)
    >>> float(norm), round(float(linear.grads["weight"][0, 0]), 5)
    (4.0, 1.0)
    """
    modules = list(modules)
    if not max_norm > 0.0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm}")
    if not modules:
        return np.float64(0.0)
    backend = modules[0].backend
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


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high); ValueError otherwise."""
    if not low <= value < high:
        raise ValueError(f"{name}: expected a number from {low} to below {high}, got {value!r}")
    return float(value)
