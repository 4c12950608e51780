"""A linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..backend import AnyArray, Array, BackendName, DTypeLike
from ..backend.exports import exported_from
from ..core.checks import (
    check_array,
    check_flag,
    check_seed,
    check_size,
)
from ..core.sums import sum_rows
from .attributes import option
from .module import Module, file_kind
from .parameters import Shapes, reads_parameters, views


@dataclass(frozen=True)
class _RecordedCall:
    x: Array  # (rows, in_features), a copy
    shape: tuple[int, ...]  # of the caller's x
    version: int  # of the parameters


@exported_from("xprnn")
@file_kind("Linear")
class Linear(Module):
    """A linear layer, y = x W' + b; gradients dx = dy W, dW = dy' x, db = Σ dy.

    Names, shapes and initialisation (uniform within 1/sqrt(in_features)) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html.

    :param in_features: the width of x.
    :param out_features: the width of y.
    :param bias: whether there is a bias b.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64".
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(4, 2, seed=0).train()
    >>> y = linear(np.ones((5, 4), np.float32))
    >>> linear.backward(np.ones_like(y)).shape, linear.grads["bias"].tolist()
    ((5, 4), [5.0, 5.0])
    """

    in_features: int = option("in_features", "The width of x.")
    out_features: int = option("out_features", "The width of y.")
    bias: bool = option("bias", "Whether there is a bias b.")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        options = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": bias,
            "seed": seed,
        }
        self._construct(options, backend, dtype)

    def _configure(self, options: dict[str, Any], backend: BackendName | None, dtype: Any) -> None:
        shapes = self._shapes(options)
        width, features = shapes["weight"]
        plain = {"in_features": features, "out_features": width, "bias": "bias" in shapes}
        self._allocate(shapes, {**plain, "seed": check_seed(options["seed"])}, backend, dtype)

    def _bound(self) -> float:
        return float(self.options["in_features"] ** -0.5)

    def _backend_changed(self) -> None:
        self._xp = self.backend.module("ieee", False)  # products in full precision

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        width = check_size("out_features", options["out_features"])
        shapes: Shapes = {"weight": (width, check_size("in_features", options["in_features"]))}
        if check_flag("bias", options["bias"]):
            shapes["bias"] = (width,)
        return shapes

    @reads_parameters
    def __call__(self, x: AnyArray) -> Array:
        """Compute y = x W' + b; in train mode the call is recorded for `backward`.

        :param x: (..., in_features) in the module's dtype and on its backend; only read.
        :return: y (..., out_features), a new array.
        :raises TypeError, ValueError: x has another type, dtype, backend or width.

        >>> import numpy as np, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", dtype="float64", seed=0)
        >>> linear.load_state_dict({"weight": np.array([[2.0, 3.0]]), "bias": np.ones(1)})
        >>> linear(np.array([[1.0, 10.0]])).tolist()
        [[33.0]]
        """
        outer = ("...",) * max(getattr(x, "ndim", 1) - 1, 0)
        x = check_array("x", x, self._backend, self._dtype, (*outer, self._options["in_features"]))
        with self._backend.activate():
            rows = x.reshape(-1 if x.size else 0, x.shape[-1])
            y = self._xp.matmul(rows, self._parameters["weight"].T)
            if "bias" in self._parameters:
                y += self._parameters["bias"]
            if self._training:
                self._prepare_record()
                self._record(_RecordedCall(rows.copy(), x.shape, self._parameters.version))
            return y.reshape(*x.shape[:-1], self._options["out_features"])

    @reads_parameters
    def backward(self, dy: AnyArray) -> Array:
        """The backward pass of the last recorded call: adds dW = dy' x and db = Σ dy to `grads`.

        :param dy: dL/dy, of y's shape and dtype; only read.
        :return: dx = dy W, of x's shape.
        :raises RuntimeError: there is no recorded call, or the parameters have changed since.
        :raises TypeError, ValueError: dy has not y's type or shape; the recorded call is kept.

        >>> import numpy as np, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", dtype="float64", seed=0).train()
        >>> linear.load_state_dict({"weight": np.array([[2.0, 3.0]]), "bias": np.ones(1)})
        >>> y = linear(np.array([[1.0, 10.0]]))
        >>> linear.backward(np.ones((1, 1))).tolist()
        [[2.0, 3.0]]
        >>> linear.grads["weight"].tolist(), linear.grads["bias"].tolist()
        ([[1.0, 10.0]], [1.0])
        """
        call: _RecordedCall = self._last_record()
        shape = (*call.shape[:-1], self.options["out_features"])
        dy = check_array("dy", dy, self.backend, self.dtype, shape)
        with self.backend.activate():
            xp = self._xp
            rows = dy.reshape(call.x.shape[0], shape[-1])
            dflat = xp.zeros(self.grads.flat.shape, self.dtype)
            dweights = views(dflat, self.parameters.shapes)
            if "weight" not in self.frozen:
                xp.matmul(rows.T, call.x, out=dweights["weight"])
            if "bias" in dweights and "bias" not in self.frozen:
                sum_rows(xp, rows, dweights["bias"])
            dx = xp.matmul(rows, self.parameters["weight"]).reshape(call.shape)
            gradients = self.grads.flat
            gradients += dflat
            self._records.pop()
            return dx
