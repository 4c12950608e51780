"""A lower bound: a layer's matrix products alone, by NumPy's BLAS, each in its fastest layout.

No biases and no gates; each result is written into a preallocated array. Each product is tried
directly and transposed, with C- and Fortran-ordered weights, and the fastest variant is timed. In
steps of a few microseconds the overhead of a NumPy call matters; compiled code can be faster there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from xprnn.tools.bench.task import Peer, Task

TRIAL = 0.01  # seconds for which each variant is called, at least once
TRIAL_STEPS = 8  # steps whose products are computed in the trial
Call = Callable[[], Any]


def products(task: Task) -> Peer:
    """The products of all steps: two forward, and four more, of twice the work, backward."""
    weight_ih, weight_hh = (task.weights[f"weight_{name}_l0"] for name in ("ih", "hh"))
    T, N, width = task.x.shape
    H = weight_hh.shape[1]
    x = task.x.reshape(T * N, width)
    h = np.ascontiguousarray(task.doutput)
    dgates = np.random.default_rng(1).standard_normal((T, N, len(weight_hh))).astype(x.dtype)
    all_dgates = dgates.reshape(T * N, -1)
    forward = [_fastest(x[None], weight_ih.T), _fastest(h, weight_hh.T)]
    backward = [
        _fastest(dgates, weight_hh),  # dh, step by step; the others are over all steps at once
        _fastest(all_dgates[None], weight_ih),
        _fastest(all_dgates.T[None], x),
        _fastest(all_dgates.T[None], h.reshape(T * N, H)),
    ]

    def run(calls: list[Call]) -> None:
        for call in calls:
            call()

    note = "the products alone, NumPy's BLAS"
    return Peer("products", partial(run, forward), partial(run, forward + backward), {}, note)


def step_products(task: Task) -> tuple[Call, None, str]:
    """The two products of one step: x and h with their weights."""
    calls = [
        _fastest(left[None], task.weights[f"weight_{name}_l0"].T)
        for name, left in (("ih", task.x[0]), ("hh", task.states[0]))
    ]
    return lambda: [call() for call in calls], None, "the two products alone, NumPy's BLAS"


def _fastest(lefts: np.ndarray, right: np.ndarray) -> Call:
    """A call that multiplies each of `lefts` (count, M, K) by `right` (K, columns)."""
    seconds = [_seconds(call) for call in _variants(lefts[:TRIAL_STEPS], right)]
    return [*_variants(lefts, right)][seconds.index(min(seconds))]


def _variants(lefts: np.ndarray, right: np.ndarray) -> Iterator[Call]:
    """The products in row-major order, on `lefts` itself, and transposed, on a copy made before."""
    count, rows, columns = *lefts.shape[:2], right.shape[1]
    direct, transposed = np.empty((2, count, rows * columns), lefts.dtype)
    outs = [out.reshape(rows, columns) for out in direct]
    outs_t = [out.reshape(columns, rows) for out in transposed]
    lefts_t = np.ascontiguousarray(lefts.swapaxes(1, 2))
    for weights in (np.ascontiguousarray(right), np.asfortranarray(right)):
        yield partial(_multiply, [(a, weights) for a in lefts], outs)
        yield partial(_multiply, [(weights.T, a) for a in lefts_t], outs_t)


def _multiply(pairs: list[tuple[np.ndarray, np.ndarray]], outs: list[np.ndarray]) -> None:
    for (left, right), out in zip(pairs, outs, strict=True):
        np.dot(left, right, out=out)


def _seconds(call: Call) -> float:
    """The seconds of the fastest call."""
    call()
    samples: list[float] = []
    end = time.perf_counter() + TRIAL
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return min(samples)
