"""The optimisers: SGD with momentum, Adam, AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from ..backend import Array
from ..checks import check_number
from ..module import Module
from .optimizer import Optimizer


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

    def __init__(self, modules: Iterable[Module], lr: float, momentum: float = 0.0) -> None:
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        super().__init__(modules, lr, ("momentum_buffer",) if self.momentum else ())

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        step = dp
        if self.momentum:
            step = state["momentum_buffer"]
            step *= self.momentum
            step += dp
        xp.multiply(step, self.lr, out=t)
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

    def __init__(
        self,
        modules: Iterable[Module],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(modules, lr, ("exp_avg", "exp_avg_sq"))
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        self.betas = (
            check_number("betas[0]", betas[0], 0.0, 1.0),
            check_number("betas[1]", betas[1], 0.0, 1.0),
        )
        self.eps = check_number("eps", eps, sys.float_info.min, math.inf)

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

    :param weight_decay: at least 0. The other parameters, and what is raised, as for `Adam`.

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
