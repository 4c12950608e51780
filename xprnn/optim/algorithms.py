"""The optimisers: SGD with momentum, Adam, AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ..backend import Array
from ..backend.exports import exported_from
from ..core.checks import Checked, check_number
from ..nn.module import Module
from .optimizer import Optimizer, check_rate

check_decay: Callable[..., float] = partial(check_number, low=0.0, high=1.0)


def check_betas(name: str, value: Any) -> tuple[float, float]:
    """`value` as two floats in [0, 1); TypeError or ValueError otherwise."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {value!r}")
    return check_decay(f"{name}[0]", value[0]), check_decay(f"{name}[1]", value[1])


@exported_from("xprnn.optim")
class SGD(Optimizer):
    """Stochastic gradient descent with momentum: b <- momentum b + dp, p <- p - lr b.

    As https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html.

    :param modules: the modules to train; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param momentum: from 0 to below 1.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(2, 1, bias=False, dtype="float64", seed=0).train()
    >>> y = linear(np.ones((1, 2)))
    >>> _ = linear.backward(np.ones((1, 1)))
    >>> xprnn.optim.SGD([linear], lr=0.1).step()
    >>> round(float((linear(np.ones((1, 2))) - y)[0, 0]), 6)
    -0.2
    """

    def __init__(self, modules: Iterable[Module], lr: float, momentum: float = 0.0) -> None:
        self._momentum = check_decay("momentum", momentum)
        super().__init__(modules, lr, ("momentum_buffer",) if self._momentum else ())

    @property
    def momentum(self) -> float:
        """The momentum factor; while it is 0 the momentum buffers do not change."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        momentum = check_decay("momentum", value)
        if momentum:
            self._add_slot("momentum_buffer")
        self._momentum = momentum

    def _update(
        self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array, steps: int
    ) -> None:
        step = dp
        if self._momentum:
            step = state["momentum_buffer"]
            step *= self._momentum
            step += dp
        xp.multiply(step, self.lr, out=t)
        p -= t


@exported_from("xprnn.optim")
class Adam(Optimizer):
    """Adam: D. P. Kingma, J. Ba, "Adam: a method for stochastic optimization" (2015).

    With m and v the running means of dp and dp^2, with bias correction, and k the number of steps
    that the parameter has taken, without those in which it was frozen::

        p <- p - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)

    As https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html.

    :param modules: the modules to train; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param betas: (b1, b2), each from 0 to below 1.
    :param eps: above 0.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import xprnn
    >>> xprnn.optim.Adam([xprnn.Linear(2, 1)], lr=0.01).lr
    0.01
    """

    betas: Checked[tuple[float, float]] = Checked(check_betas, "(b1, b2), each from 0 to below 1.")
    eps: Checked[float] = Checked(
        partial(check_number, low=sys.float_info.min, high=math.inf),
        "Added to the square root, so that no division is by zero; above 0.",
    )

    def __init__(
        self,
        modules: Iterable[Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.betas, self.eps = betas, eps
        super().__init__(modules, lr, ("exp_avg", "exp_avg_sq"))

    def _update(
        self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array, steps: int
    ) -> None:
        (b1, b2), m, v = self.betas, state["exp_avg"], state["exp_avg_sq"]
        m *= b1
        xp.multiply(dp, 1.0 - b1, out=t)
        m += t
        v *= b2
        xp.multiply(dp, dp, out=t)
        t *= 1.0 - b2
        v += t

        xp.sqrt(v, out=t)
        t *= 1.0 / math.sqrt(1.0 - b2**steps)
        t += self.eps
        xp.divide(m, t, out=t)
        t *= self.lr / (1.0 - b1**steps)
        p -= t


@exported_from("xprnn.optim")
class AdamW(Adam):
    """Adam with decoupled weight decay: p <- (1 - lr weight_decay) p before each update.

    I. Loshchilov, F. Hutter, "Decoupled weight decay regularization" (2019); as
    https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html.

    :param modules: the modules to train; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param betas: (b1, b2), each from 0 to below 1.
    :param eps: above 0.
    :param weight_decay: at least 0.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import xprnn
    >>> xprnn.optim.AdamW([xprnn.Linear(2, 1)]).weight_decay
    0.01
    """

    weight_decay: Checked[float] = Checked(check_rate, "The factor of the decay, at least 0.")

    def __init__(
        self,
        modules: Iterable[Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.weight_decay = weight_decay
        super().__init__(modules, lr, betas, eps)

    def _update(
        self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array, steps: int
    ) -> None:
        p *= 1.0 - self.lr * self.weight_decay
        super()._update(xp, p, dp, state, t, steps)
