"""Losses that return their gradient."""

from __future__ import annotations

from ..backend import AnyArray, Array, Integers
from ..backend.exports import exported_from
from ..core.checks import (
    check_array,
    check_indices,
    check_integer,
    check_reference_array,
)
from ..core.oom import translate_out_of_memory


@translate_out_of_memory
@exported_from("xprnn")
def softmax_cross_entropy(
    logits: AnyArray, targets: Integers, ignore_index: int = -100
) -> tuple[Array, Array]:
    """The mean cross-entropy of softmax(logits) and class indices, and its gradient.

    With n over the M rows whose target is not `ignore_index`::

        L = -1/M Σ_n log p[n, targets[n]],  p = softmax(logits) over classes
        dL/dlogits = (p - onehot(targets)) / M in these rows, 0 in the others

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html, except that
    the classes are always the last dimension: the logits of all steps are (T, N, K), their targets
    (T, N), and targets of padding may be `ignore_index`.

    :param logits: (..., N, K) with at least one row and one class, float32 or float64; only read.
    :param targets: (..., N) integers from 0 to K-1 or `ignore_index`, on the host or on the
        backend of `logits`. On a device the range is not checked: a target out of range makes
        the loss NaN.
    :param ignore_index: the target of rows that are ignored, whatever their logits are. If all
        rows are, the loss is NaN, the mean of an empty set, and dlogits is zero.
    :return: the loss () and dlogits (..., N, K), in the dtype and on the backend of `logits`.
    :raises TypeError, ValueError: an argument has a wrong type or shape, or a target is out of
        range.

    >>> import numpy as np
    >>> loss, dlogits = softmax_cross_entropy(np.zeros((2, 4)), [2, -100])
    >>> round(float(loss), 4), dlogits.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25], [0.0, 0.0, 0.0, 0.0]])
    """
    outer = ("...",) * (getattr(logits, "ndim", 2) - 2)
    backend, logits = check_reference_array("logits", logits, (*outer, "N", "K"))
    if logits.size == 0:
        raise ValueError(f"logits: expected at least one row and one class, got {logits.shape}")
    ignore_index = check_integer("ignore_index", ignore_index)
    classes, xp = logits.shape[-1], backend.xp
    checked = check_indices("targets", targets, backend, classes, logits.shape[:-1], ignore_index)
    with backend.activate():
        labels = checked.reshape(-1, 1)
        used = labels != ignore_index
        total = used.sum(dtype=logits.dtype)
        total = xp.where(total > 0, total, xp.nan)
        rows = xp.where(used, logits.reshape(-1, classes), 0.0)
        rows -= rows.max(axis=1, keepdims=True)
        p = xp.exp(rows)
        sums = p.sum(axis=1, keepdims=True)
        p /= sums
        onehot = xp.arange(classes)[None, :] == labels
        losses = -xp.where(onehot, rows - xp.log(sums), 0.0).sum(axis=1, keepdims=True)
        in_range = (labels >= 0) & (labels < classes)
        losses = xp.where(used, xp.where(in_range, losses, xp.nan), 0.0)
        p -= onehot
        p /= total
        dlogits = xp.where(used, p, 0.0)
        return losses.sum() / total, dlogits.reshape(logits.shape)


@translate_out_of_memory
@exported_from("xprnn")
def mse_loss(prediction: AnyArray, target: AnyArray) -> tuple[Array, Array]:
    """The mean squared error over all elements, and its gradient.

    L = mean((prediction - target)^2), dL/dprediction = 2 (prediction - target) / size. As
    https://docs.pytorch.org/docs/stable/generated/torch.nn.MSELoss.html.

    :param prediction: of any shape with at least one element, float32 or float64; only read.
    :param target: of the same shape, dtype and backend; only read.
    :return: the loss () and dprediction, in the dtype and on the backend of `prediction`.
    :raises TypeError, ValueError: an argument is not such an array.

    >>> import numpy as np
    >>> loss, dprediction = mse_loss(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
    >>> float(loss), dprediction.tolist()
    (5.0, [1.0, 3.0])
    """
    any_shape = ("...",) * getattr(prediction, "ndim", 0)
    backend, prediction = check_reference_array("prediction", prediction, any_shape)
    target = check_array("target", target, backend, prediction.dtype, prediction.shape)
    if prediction.size == 0:
        raise ValueError(f"prediction: expected at least one element, got {prediction.shape}")
    with backend.activate():
        difference = prediction - target
        loss = (difference * difference).mean()
        difference *= 2.0 / prediction.size
        return loss, difference
