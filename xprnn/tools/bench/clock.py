"""Timing: after a warm-up, synchronised, in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from ...backend import Backend
from ...backend.cupy import CupyBackend

Function = Callable[[], object]
Timer = Callable[[Function, int], float]  # the seconds of this many calls

SAMPLE = 2e-3  # seconds that a sample should last at least, so that clock overhead is negligible
BUDGET = 5.0  # seconds after which no new round begins
ROUNDS = (5, 201)  # minimum and maximum


def timer(backend: Backend) -> Timer:
    """A timer for a backend's device: CUDA events on a GPU, else the host's clock."""
    return _events(backend) if isinstance(backend, CupyBackend) else _seconds


def _seconds(function: Function, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return time.perf_counter() - start


def _events(backend: CupyBackend) -> Timer:
    from cupy import cuda

    def seconds(function: Function, repeats: int) -> float:
        with backend.activate():
            start, stop = cuda.Event(), cuda.Event()
            backend.synchronize()
            start.record()
            for _ in range(repeats):
                function()
            stop.record()
            stop.synchronize()
            return float(cuda.get_elapsed_time(start, stop)) / 1e3

    return seconds


def measure(
    functions: Sequence[Function], seconds: Timer, budget: float | None = None
) -> list[list[float]]:
    """The seconds per call of each function in each of many rounds.

    After the first few rounds, no new one begins after `budget` seconds (None: BUDGET).

    A round takes one sample of each function. An untimed call precedes each sample, so that the
    caches hold its data and idle threads of other libraries have gone to sleep.
    """
    for function in functions:  # first calls compile, allocate and choose algorithms
        seconds(function, 2)
    repeats = [math.ceil(SAMPLE / max(seconds(function, 1), 1e-6)) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    end = time.monotonic() + (BUDGET if budget is None else budget)
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.monotonic() > end:
            break
        for function, count, times in zip(functions, repeats, samples, strict=True):
            seconds(function, 1)
            times.append(seconds(function, count) / count)
    return samples
