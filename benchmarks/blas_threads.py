"""The plain code's layers with products on one thread, shared, and by OpenBLAS's threads.

    python benchmarks/blas_threads.py [--hog] [--rounds 5]

A GRU's call, forward and with its backward pass, without Numba, float32: "one" with slices on the
caller's thread, "shared" as xprnn does (`xprnn/blas.py`), "OpenBLAS" with products from two million
multiply-adds on left whole to its threads, and "OpenBLAS on one" to one. Milliseconds, medians of
all calls, and the time by that of "one", round by round, with its quartiles. A round takes each
side for as long, several calls in a row. With --hog another process of this program keeps a
processor busy; with --hog --pin it keeps to one of those that this process may use. Needs
threadpoolctl.
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
SIDES = ("one", "shared", "OpenBLAS", "OpenBLAS on one")
TURN = 1.5  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hog", action="store_true", help="beside a busy process")
    parser.add_argument("--pin", action="store_true", help="which keeps to one processor")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: expected 2 or more, for quartiles")
    os.environ["XPRNN_KERNELS"] = "reference"
    print("| T, N, I, H | | " + " | ".join(f"{side}, ms | by one" for side in SIDES) + " |")
    print("|---" * (2 + 2 * len(SIDES)) + "|")
    with _busy_process(options.pin) if options.hog else _nothing():
        for shape in SHAPES:
            for what, call in _calls(*shape).items():
                seconds = _measure(call, options.rounds)
                row = " | ".join(_beside_one(seconds, side) for side in SIDES)
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
    """The seconds of each side's calls, round by round."""
    found: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            with _side(side):
                found[side].append(_turn(call))
    return found


def _turn(call: Callable[[], Any]) -> list[float]:
    times: list[float] = []
    call()  # the caches are warm, and the others' threads have gone to sleep
    while sum(times) < TURN or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def _side(side: str) -> Iterator[None]:
    from threadpoolctl import threadpool_limits

    from xprnn import blas

    largest = blas.LARGE
    blas.LARGE = blas.UNCUT if side.startswith("OpenBLAS") else largest
    try:
        with threadpool_limits(None if side in ("shared", "OpenBLAS") else 1):
            yield
    finally:
        blas.LARGE = largest


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _busy_process(pinned: bool) -> Iterator[None]:
    held = f"import os; os.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n"
    code = (held if pinned else "") + "while True: pass"
    hog = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


def _beside_one(seconds: dict[str, list[list[float]]], side: str) -> str:
    """A side's milliseconds, and its time by that of one thread."""
    medians = [[statistics.median(turn) for turn in seconds[name]] for name in (side, "one")]
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*medians, strict=True)], n=4)
    every = statistics.median([each for turn in seconds[side] for each in turn])
    return f"{1e3 * every:.1f} | {middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
