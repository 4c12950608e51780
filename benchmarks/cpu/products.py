"""The floor: a layer's products and nothing else, by NumPy's BLAS, each in its best orientation.

Nothing is added, no gate is computed; each result is written into an array that is there. A
product is tried as it stands and transposed, of weights as they are and packed the other way, and
the fastest is timed. On steps of a few microseconds NumPy's call itself shows; there compiled code
can be below this floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from xprnn.bench.task import Peer, Task

TRIED = 0.01  # seconds of calls, or one of them, by which the fastest is found
FEW = 8  # of the products of all steps, by which it is found
Call = Callable[[], Any]


def products(task: Task) -> Peer:
    """Those of all steps: x and h by their weights; backward four more, of twice the work."""
    weight_ih, weight_hh = (task.weights[f"weight_{side}_l0"] for side in ("ih", "hh"))
    T, N, width = task.x.shape
    H = weight_hh.shape[1]
    x = task.x.reshape(T * N, width)
    h = np.ascontiguousarray(task.doutput)
    dgates = np.random.default_rng(1).standard_normal((T, N, len(weight_hh))).astype(x.dtype)
    together = dgates.reshape(T * N, -1)
    forward = [_fastest(x[None], weight_ih.T), _fastest(h, weight_hh.T)]
    backward = [
        _fastest(dgates, weight_hh),  # dh, step by step; the others over all steps at once
        _fastest(together[None], weight_ih),
        _fastest(together.T[None], x),
        _fastest(together.T[None], h.reshape(T * N, H)),
    ]

    def taken(calls: list[Call]) -> None:
        for call in calls:
            call()

    note = "the products alone, NumPy's BLAS"
    return Peer("products", partial(taken, forward), partial(taken, forward + backward), {}, note)


def step_products(task: Task) -> tuple[Call, None, str]:
    """Those of one step: x and h by their weights."""
    calls = [
        _fastest(left[None], task.weights[f"weight_{side}_l0"].T)
        for side, left in (("ih", task.x[0]), ("hh", task.states[0]))
    ]
    return lambda: [call() for call in calls], None, "the two products alone, NumPy's BLAS"


def _fastest(lefts: np.ndarray, right: np.ndarray) -> Call:
    """A call that multiplies each of `lefts` (count, M, K) by `right` (K, columns)."""
    seconds = [_seconds(call) for call in _ways(lefts[:FEW], right)]
    return [*_ways(lefts, right)][seconds.index(min(seconds))]


def _ways(lefts: np.ndarray, right: np.ndarray) -> Iterator[Call]:
    """`lefts` keep their memory where they stand by row; by column is a copy made ahead."""
    count, rows, columns = *lefts.shape[:2], right.shape[1]
    by_row, by_column = np.empty((2, count, rows * columns), lefts.dtype)
    outs = [part.reshape(rows, columns) for part in by_row]
    outs_t = [part.reshape(columns, rows) for part in by_column]
    turned = np.ascontiguousarray(lefts.swapaxes(1, 2))
    for weights in (np.ascontiguousarray(right), np.asfortranarray(right)):
        yield partial(_each, [(a, weights) for a in lefts], outs)
        yield partial(_each, [(weights.T, a) for a in turned], outs_t)


def _each(pairs: list[tuple[np.ndarray, np.ndarray]], outs: list[np.ndarray]) -> None:
    for (left, right), out in zip(pairs, outs, strict=True):
        np.dot(left, right, out=out)


def _seconds(call: Call) -> float:
    """The least that a call took."""
    call()
    found: list[float] = []
    end = time.perf_counter() + TRIED
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
