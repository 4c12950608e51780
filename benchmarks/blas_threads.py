"""The plain code's matrix products on one thread, on xprnn's threads and on OpenBLAS's threads.

    python benchmarks/blas_threads.py [--hog] [--rounds 5]

A GRU's call, forward and with its backward pass, without Numba, float32: "one" computes slices on
the caller's thread, "shared" is xprnn's default (`xprnn/backend/blas.py`), "OpenBLAS" passes
products of two million multiply-adds and more to OpenBLAS's threads, and "OpenBLAS on one" to one.
Milliseconds are medians of all calls; the ratio to "one" is taken round by round, with its
quartiles. A round runs each variant for the same time, several calls in a row. With --hog another
process keeps a processor busy; with --hog --pin it is bound to one of those that this process may
use. Needs threadpoolctl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SHAPES = ((64, 32, 256, 256), (64, 64, 256, 512), (32, 128, 512, 1024))  # T, N, I, H
VARIANTS = ("one", "shared", "OpenBLAS", "OpenBLAS on one")
DURATION = 1.5  # seconds of a variant in a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hog", action="store_true", help="run another, busy process")
    parser.add_argument("--pin", action="store_true", help="bind it to one processor")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: expected at least 2, for quartiles")
    os.environ["XPRNN_KERNELS"] = "reference"
    print("| T, N, I, H | | " + " | ".join(f"{name}, ms | / one" for name in VARIANTS) + " |")
    print("|---" * (2 + 2 * len(VARIANTS)) + "|")
    with _busy_process(options.pin) if options.hog else _nothing():
        for shape in SHAPES:
            for what, call in _calls(*shape).items():
                seconds = _measure(call, options.rounds)
                row = " | ".join(_relative_to_one(seconds, name) for name in VARIANTS)
                print(f"| {', '.join(map(str, shape))} | {what} | {row} |", flush=True)


def _calls(T: int, N: int, I: int, H: int) -> dict[str, Callable[[], Any]]:  # noqa: E741
    import numpy as np

    import xprnn

    x = np.random.default_rng(0).standard_normal((T, N, I), dtype=np.float32)
    layer, trained = xprnn.GRU(I, H, seed=0), xprnn.GRU(I, H, seed=0).train()

    def both() -> None:
        output, _ = trained(x)
        trained.backward(output)

    return {"forward": lambda: layer(x), "forward+backward": both}


def _measure(call: Callable[[], Any], rounds: int) -> dict[str, list[list[float]]]:
    """The seconds of each variant's calls, round by round."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            with _variant(name):
                seconds[name].append(_sample(call))
    return seconds


def _sample(call: Callable[[], Any]) -> list[float]:
    times: list[float] = []
    call()  # warms the caches; threads of other variants go to sleep meanwhile
    while sum(times) < DURATION or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def _variant(name: str) -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    from xprnn.backend import blas

    largest = blas.LARGE
    blas.LARGE = blas.UNCUT if name.startswith("OpenBLAS") else largest
    try:
        with threadpool_limits(None if name in ("shared", "OpenBLAS") else 1):
            yield
    finally:
        blas.LARGE = largest


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _busy_process(pinned: bool) -> Iterator[None]:
    pin = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n"
    code = (pin if pinned else "") + "while True: pass"
    hog = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


def _relative_to_one(seconds: dict[str, list[list[float]]], variant: str) -> str:
    """A variant's milliseconds, and its time / that of one thread."""
    medians = [[statistics.median(times) for times in seconds[name]] for name in (variant, "one")]
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*medians, strict=True)], n=4)
    overall = statistics.median([each for times in seconds[variant] for each in times])
    return f"{1e3 * overall:.1f} | {middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
