"""What reads a state out: a linear layer, and losses that return their gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .attributes import option
from .backend import Array
from .checks import (
    check_array,
    check_flag,
    check_indices,
    check_leader,
    check_seed,
    check_size,
    check_whole,
)
from .memory import frees_memory
from .module import Module
from .numerics import sum_rows
from .parameters import Shapes, reads_parameters, views


@dataclass(frozen=True)
class _Record:
    x: Array  # (rows, in_features), the module's own copy
    shape: tuple[int, ...]  # of the caller's x
    version: int  # of the parameters


class Linear(Module):
    """A linear read-out, y = x W' + b; gradients dx = dy W, dW = dy' x, db = Σ dy.

    Names, shapes and initialisation (uniform within 1/sqrt(in_features)) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html.

    :param in_features: width of x.
    :param out_features: width of y.
    :param bias: whether there is a b.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64".
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> linear = xprnn.Linear(4, 2, seed=0).train()
    >>> y = linear(np.ones((5, 4), np.float32))
    >>> linear.backward(np.ones_like(y)).shape, linear.grads["bias"].tolist()
    ((5, 4), [5.0, 5.0])
    """

    in_features: int = option("in_features", "The width of x.")
    out_features: int = option("out_features", "The width of y.")
    bias: bool = option("bias", "Whether there is a b.")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: str | None = None,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        options = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": bias,
            "seed": seed,
        }
        self._begin(options, backend, dtype)

    def _set_up(self, options: dict[str, Any], backend: str | None, dtype: Any) -> None:
        shapes = self._shapes(options)
        width, features = shapes["weight"]
        plain = {"in_features": features, "out_features": width, "bias": "bias" in shapes}
        self._build(shapes, {**plain, "seed": check_seed(options["seed"])}, backend, dtype)

    def _bound(self) -> float:
        return float(self.options["in_features"] ** -0.5)

    def _moved(self) -> None:
        self._xp = self.backend.module("ieee", False)  # products in full precision

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        width = check_size("out_features", options["out_features"])
        shapes: Shapes = {"weight": (width, check_size("in_features", options["in_features"]))}
        if check_flag("bias", options["bias"]):
            shapes["bias"] = (width,)
        return shapes

    @reads_parameters
    def __call__(self, x: Array) -> Array:
        """y (..., out_features), a new array; in train mode recorded for `backward`.

        :param x: (..., in_features) in the module's dtype and on its backend; only read.
        :raises TypeError, ValueError: x has another type, dtype, backend or width.
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
                self._record(_Record(rows.copy(), x.shape, self._parameters.version))
            return y.reshape(*x.shape[:-1], self._options["out_features"])

    @reads_parameters
    def backward(self, dy: Array) -> Array:
        """Undo the last recorded call: adds to `grads` and returns dx, of x's shape.

        :param dy: dL/dy, of y's shape; only read.
        :raises RuntimeError: no recorded call is left, or the parameters have changed since.
        :raises TypeError, ValueError: dy has not y's type or shape; the record stays in place.
        """
        record: _Record = self._last_record()
        shape = (*record.shape[:-1], self.options["out_features"])
        dy = check_array("dy", dy, self.backend, self.dtype, shape)
        with self.backend.activate():
            xp = self._xp
            rows = dy.reshape(record.x.shape[0], shape[-1])
            dflat = xp.zeros(self.grads.flat.shape, self.dtype)
            dweights = views(dflat, self.parameters.shapes)
            if "weight" not in self.frozen:
                xp.matmul(rows.T, record.x, out=dweights["weight"])
            if "bias" in dweights and "bias" not in self.frozen:
                sum_rows(xp, rows, dweights["bias"])
            dx = xp.matmul(rows, self.parameters["weight"]).reshape(record.shape)
            gradients = self.grads.flat
            gradients += dflat
            self._records.pop()
            return dx


@frees_memory
def softmax_cross_entropy(
    logits: Array, targets: Array, ignore_index: int = -100
) -> tuple[Array, Array]:
    """The mean cross-entropy of softmax(logits) against class numbers, and its gradient.

    With n over the rows whose target is not `ignore_index`, M of them::

        L = -1/M Σ_n log p[n, targets[n]],  p = softmax(logits) over classes
        dL/dlogits = (p - onehot(targets)) / M in these rows, 0 in the others

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html, but for the
    place of the classes, which are always the last dimension: a layer's output read out at every
    step is (T, N, K), its targets (T, N), and those of padding may be `ignore_index`.

    :param logits: (..., N, K), at least one row and one class, float32 or float64; only read.
    :param targets: (..., N) integers from 0 to K-1 or `ignore_index`, on the host or on the
        backend of `logits`; on a device they are not read back to be checked, one out of range
        makes the loss NaN.
    :param ignore_index: the target of rows that do not count, whatever their logits are. If no
        row counts the loss is NaN, the mean of nothing, and dlogits is zero.
    :return: the loss () and dlogits (..., N, K), in the dtype and on the backend of `logits`.
    :raises TypeError, ValueError: an argument has another type or shape, or a target is out of
        range.

    >>> import numpy as np
    >>> loss, dlogits = softmax_cross_entropy(np.zeros((2, 4)), [2, -100])
    >>> round(float(loss), 4), dlogits.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25], [0.0, 0.0, 0.0, 0.0]])
    """
    outer = ("...",) * (getattr(logits, "ndim", 2) - 2)
    backend, logits = check_leader("logits", logits, (*outer, "N", "K"))
    if logits.size == 0:
        raise ValueError(f"logits: expected at least one row and one class, got {logits.shape}")
    ignore_index = check_whole("ignore_index", ignore_index)
    classes, xp = logits.shape[-1], backend.xp
    found = check_indices("targets", targets, backend, classes, logits.shape[:-1], ignore_index)
    with backend.activate():
        chosen = found.reshape(-1, 1)
        counts = chosen != ignore_index
        total = counts.sum(dtype=logits.dtype)
        total = xp.where(total > 0, total, xp.nan)
        rows = xp.where(counts, logits.reshape(-1, classes), 0.0)
        rows -= rows.max(axis=1, keepdims=True)
        p = xp.exp(rows)
        sums = p.sum(axis=1, keepdims=True)
        p /= sums
        onehot = xp.arange(classes)[None, :] == chosen
        losses = -xp.where(onehot, rows - xp.log(sums), 0.0).sum(axis=1, keepdims=True)
        known = (chosen >= 0) & (chosen < classes)
        losses = xp.where(counts, xp.where(known, losses, xp.nan), 0.0)
        p -= onehot
        p /= total
        dlogits = xp.where(counts, p, 0.0)
        return losses.sum() / total, dlogits.reshape(logits.shape)


@frees_memory
def mse_loss(prediction: Array, target: Array) -> tuple[Array, Array]:
    """The mean squared error over all elements, and its gradient.

    L = mean((prediction - target)^2), dL/dprediction = 2 (prediction - target) / size. As
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html.

    :param prediction: any shape with at least one element, float32 or float64; only read.
    :param target: the same shape, dtype and backend; only read.
    :return: the loss () and dprediction, in the dtype and on the backend of `prediction`.
    :raises TypeError, ValueError: the arguments are not two such arrays.

    >>> import numpy as np
    >>> loss, dprediction = mse_loss(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
    >>> float(loss), dprediction.tolist()
    (5.0, [1.0, 3.0])
    """
    any_shape = ("...",) * getattr(prediction, "ndim", 0)
    backend, prediction = check_leader("prediction", prediction, any_shape)
    target = check_array("target", target, backend, prediction.dtype, prediction.shape)
    if prediction.size == 0:
        raise ValueError(f"prediction: expected at least one element, got {prediction.shape}")
    with backend.activate():
        difference = prediction - target
        loss = (difference * difference).mean()
        difference *= 2.0 / prediction.size
        return loss, difference
