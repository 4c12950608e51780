"""The Elman network on (features, batch[, time]) arrays, with a softmax output.

This is the interface that many courses use. One step is::

    a_next  = tanh(Wax xt + Waa a_prev + ba)        yt_pred = softmax(Wya a_next + by)

with `parameters` a dict of Wax (n_a, n_x), Waa (n_a, n_a), Wya (n_y, n_a), ba (n_a, 1) and
by (n_y, 1). It uses the same cell as the layers, on transposed views. All arrays are float32, or
all are float64, on the backend of Wax; the batch size is m, the number of steps T_x. TypeError and
ValueError name the invalid argument, KeyError a missing parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import functional
from .backend import AnyArray, Array, Backend
from .core.checks import check_array, check_reference_array
from .core.oom import translate_out_of_memory
from .core.sums import sum_rows

PARAMETERS = ("Wax", "Waa", "Wya", "ba", "by")


@dataclass(frozen=True)
class Cache:
    """What a forward call saves for its backward call, which may be made once."""

    backend: Backend
    run: functional.Cache
    Wya: Array  # (n_y, n_a), a copy
    a: Array  # (T_x, m, n_a), a copy
    y: Array  # (T_x, m, n_y), a copy


@translate_out_of_memory
def rnn_cell_forward(
    xt: AnyArray, a_prev: AnyArray, parameters: Mapping[str, AnyArray]
) -> tuple[Array, Array, Cache]:
    """Forward pass of one step.

    :param xt: (n_x, m), in the dtype and on the backend of Wax, as all arrays; only read.
    :param a_prev: (n_a, m).
    :param parameters: Wax (n_a, n_x), float32 or float64, Waa (n_a, n_a), Wya (n_y, n_a),
        ba (n_a, 1) and by (n_y, 1); other names are ignored.
    :return: a_next (n_a, m), yt_pred (n_y, m), and the cache for `rnn_cell_backward`.
    :raises KeyError: a parameter is missing.
    :raises TypeError, ValueError: an array has another type, dtype, backend or shape.

    >>> import numpy as np
    >>> W = {"Wax": np.ones((4, 3)), "Waa": np.eye(4), "Wya": np.ones((2, 4))}
    >>> b = {"ba": np.zeros((4, 1)), "by": np.zeros((2, 1))}
    >>> a_next, yt_pred, cache = rnn_cell_forward(np.ones((3, 5)), np.ones((4, 5)), {**W, **b})
    >>> a_next.shape, yt_pred[:, 0].tolist()
    ((4, 5), [0.5, 0.5])
    """
    backend, parameters = _checked(parameters)
    (n_a, n_x), dtype = parameters["Wax"].shape, parameters["Wax"].dtype
    xt = check_array("xt", xt, backend, dtype, (n_x, "m"))
    a_prev = check_array("a_prev", a_prev, backend, dtype, (n_a, xt.shape[1]))
    a, y, cache = _forward(backend, xt.T[None], a_prev, parameters)
    return a[0].T, y[0].T, cache


@translate_out_of_memory
def rnn_cell_backward(
    da_next: AnyArray, cache: Cache, dy: AnyArray | None = None
) -> dict[str, Array]:
    """Backward pass of one step.

    :param da_next: (n_a, m), the gradient of a_next.
    :param cache: the cache that `rnn_cell_forward` returned; it can be used once.
    :param dy: (n_y, m), the gradient of yt_pred; None: zeros.
    :return: dxt, da_prev, dWax, dWaa, dba and, if dy is passed, dWya and dby, with the shapes of
        xt, a_prev and the parameters.
    :raises RuntimeError: the cache has been used already.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np
    >>> W = {"Wax": np.ones((4, 3)), "Waa": np.eye(4), "Wya": np.ones((2, 4))}
    >>> b = {"ba": np.zeros((4, 1)), "by": np.zeros((2, 1))}
    >>> a_next, _, cache = rnn_cell_forward(np.ones((3, 5)), np.ones((4, 5)), {**W, **b})
    >>> sorted(rnn_cell_backward(a_next, cache))
    ['dWaa', 'dWax', 'da_prev', 'dba', 'dxt']
    """
    if not isinstance(cache, Cache):
        raise TypeError("cache: expected what rnn_cell_forward returned")
    _, batch, width = cache.a.shape
    da_next = _check_like("da_next", da_next, cache, (width, batch))
    if dy is not None:
        dy = _check_like("dy", dy, cache, (cache.y.shape[2], batch))
    gradients = _backward(da_next.T[None], cache, None if dy is None else dy.T[None])
    gradients["dxt"] = gradients.pop("dx")[0].T
    gradients["da_prev"] = gradients.pop("da0")
    return gradients


@translate_out_of_memory
def rnn_forward(
    x: AnyArray, a0: AnyArray, parameters: Mapping[str, AnyArray]
) -> tuple[Array, Array, tuple[Cache, Array]]:
    """Forward pass of T_x steps.

    :param x: (n_x, m, T_x), in the dtype and on the backend of Wax, as all arrays; only read.
    :param a0: (n_a, m).
    :param parameters: Wax (n_a, n_x), float32 or float64, Waa (n_a, n_a), Wya (n_y, n_a),
        ba (n_a, 1) and by (n_y, 1); other names are ignored.
    :return: a (n_a, m, T_x), y_pred (n_y, m, T_x), and `caches` for `rnn_backward`; its second
        entry is a copy of x.
    :raises KeyError: a parameter is missing.
    :raises TypeError, ValueError: an array has another type, dtype, backend or shape.

    >>> import numpy as np
    >>> W = {"Wax": np.ones((4, 3)), "Waa": np.eye(4), "Wya": np.ones((2, 4))}
    >>> b = {"ba": np.zeros((4, 1)), "by": np.zeros((2, 1))}
    >>> a, y_pred, caches = rnn_forward(np.ones((3, 5, 7)), np.ones((4, 5)), {**W, **b})
    >>> a.shape, y_pred.shape
    ((4, 5, 7), (2, 5, 7))
    """
    backend, parameters = _checked(parameters)
    (n_a, n_x), dtype = parameters["Wax"].shape, parameters["Wax"].dtype
    x = check_array("x", x, backend, dtype, (n_x, "m", "T_x"))
    a0 = check_array("a0", a0, backend, dtype, (n_a, x.shape[1]))
    a, y, cache = _forward(backend, x.transpose(2, 1, 0), a0, parameters)
    with backend.activate():
        return a.transpose(2, 1, 0), y.transpose(2, 1, 0), (cache, x.copy())


@translate_out_of_memory
def rnn_backward(
    da: AnyArray, caches: tuple[Cache, Array], dy: AnyArray | None = None
) -> dict[str, Array]:
    """Backward pass of T_x steps.

    :param da: (n_a, m, T_x), the gradient of a; of each a_t without its effect on later steps.
    :param caches: the caches that `rnn_forward` returned; they can be used once.
    :param dy: (n_y, m, T_x), the gradient of y_pred; None: zeros.
    :return: dx, da0, dWax, dWaa, dba and, if dy is passed, dWya and dby, with the shapes of x, a0
        and the parameters.
    :raises RuntimeError: the caches have been used already.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np
    >>> W = {"Wax": np.ones((4, 3)), "Waa": np.eye(4), "Wya": np.ones((2, 4))}
    >>> b = {"ba": np.zeros((4, 1)), "by": np.zeros((2, 1))}
    >>> a, y, caches = rnn_forward(np.ones((3, 5, 7)), np.ones((4, 5)), {**W, **b})
    >>> rnn_backward(a, caches, dy=y)["dWya"].shape
    (2, 4)
    """
    if not isinstance(caches, tuple) or not isinstance(caches[0], Cache):
        raise TypeError("caches: expected what rnn_forward returned")
    cache = caches[0]
    steps, batch, width = cache.a.shape
    da = _check_like("da", da, cache, (width, batch, steps))
    if dy is not None:
        dy = _check_like("dy", dy, cache, (cache.y.shape[2], batch, steps))
    upstream = None if dy is None else dy.transpose(2, 1, 0)
    gradients = _backward(da.transpose(2, 1, 0), cache, upstream)
    gradients["dx"] = gradients["dx"].transpose(2, 1, 0)
    return gradients


def _forward(
    backend: Backend, x: Array, a0: Array, parameters: Mapping[str, Array]
) -> tuple[Array, Array, Cache]:
    """Time-major: x (T, m, n_x), a0 (n_a, m) -> a (T, m, n_a), y (T, m, n_y), all new arrays."""
    Wax, Waa, Wya = (parameters[name] for name in ("Wax", "Waa", "Wya"))
    ba, xp = parameters["ba"][:, 0], backend.module("ieee", False)
    with backend.activate():
        zeros = xp.zeros_like(ba)  # torch's second bias, which this interface does not have
        a, _, run = functional.rnn_forward(x, a0.T[None], Wax, Waa, ba, zeros)
        flat = a.reshape(-1 if a.size else 0, a.shape[2])
        logits = xp.matmul(flat, Wya.T) + parameters["by"][:, 0]
        logits -= logits.max(axis=1, keepdims=True)
        y = xp.exp(logits)
        y /= y.sum(axis=1, keepdims=True)
        y = y.reshape(*a.shape[:2], Wya.shape[0])
        return a, y, Cache(backend, run, Wya.copy(), a.copy(), y.copy())


def _backward(da: Array, cache: Cache, dy: Array | None) -> dict[str, Array]:
    """Time-major: da (T, m, n_a) and dy (T, m, n_y) -> gradients, dx (T, m, n_x)."""
    output_gradients = {}
    if dy is not None:
        xp = cache.backend.module("ieee", False)
        with cache.backend.activate():
            # y = softmax(l):  dl = y (dy - Σ dy y)
            dlogits = cache.y * (dy - (dy * cache.y).sum(axis=2, keepdims=True))
            rows = dlogits.reshape(-1 if dlogits.size else 0, dlogits.shape[2])
            states = cache.a.reshape(rows.shape[0], cache.a.shape[2])
            dby = xp.empty(rows.shape[1], rows.dtype)
            sum_rows(xp, rows, dby)
            output_gradients = {"dWya": xp.matmul(rows.T, states), "dby": dby[:, None]}
            da = da + xp.matmul(rows, cache.Wya).reshape(cache.a.shape)
    gradients = functional.rnn_backward(da, None, cache.run)
    return {
        "dx": gradients["dx"],
        "da0": gradients["dh0"][0].T,
        "dWax": gradients["dweight_ih"],
        "dWaa": gradients["dweight_hh"],
        "dba": gradients["dbias_ih"][:, None],
        **output_gradients,
    }


def _check_like(name: str, array: AnyArray, cache: Cache, shape: tuple[int, ...]) -> Array:
    return check_array(name, array, cache.backend, cache.a.dtype, shape)


def _checked(parameters: Mapping[str, AnyArray]) -> tuple[Backend, dict[str, Array]]:
    """The backend of the parameters, and the arrays to use."""
    missing = [name for name in PARAMETERS if name not in parameters]
    if missing:
        raise KeyError(f"parameters: missing {', '.join(missing)}")
    backend, Wax = check_reference_array("Wax", parameters["Wax"], ("n_a", "n_x"))
    n_a = Wax.shape[0]
    shapes: dict[str, tuple[Any, ...]] = {"Waa": (n_a, n_a), "ba": (n_a, 1), "Wya": ("n_y", n_a)}
    checked = {"Wax": Wax}
    for name, shape in shapes.items():
        checked[name] = check_array(name, parameters[name], backend, Wax.dtype, shape)
    n_y = checked["Wya"].shape[0]
    checked["by"] = check_array("by", parameters["by"], backend, Wax.dtype, (n_y, 1))
    return backend, checked
