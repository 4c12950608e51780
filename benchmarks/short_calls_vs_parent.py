"""A short forward call against another version of xprnn, in alternating processes.

    python -m benchmarks.short_calls_vs_parent [--parent REV] [--rounds 200]

For each implementation two processes, one with each version, time the same eval-mode call in turn,
and each pair of times gives a ratio (older / newer). Printed are the medians of the times, and the
median and the quartiles of the ratios. The older version is taken from git into a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter_ns

ROOT = Path(__file__).resolve().parents[1]
PARENT = "8003e28"
IMPLEMENTATIONS = {"with Numba": "auto", "without": "reference"}
T, N, H = 8, 1, 32
CALLS = 200  # that are timed together


def worker() -> None:
    """Time calls whenever a line arrives, until the input ends."""
    import numpy as np

    import xprnn

    layer = xprnn.GRU(H, H, seed=0)
    x = np.random.default_rng(0).standard_normal((T, N, H), dtype=np.float32)
    for _ in range(CALLS):
        layer(x)
    for _ in sys.stdin:
        start = perf_counter_ns()
        for _ in range(CALLS):
            layer(x)
        print((perf_counter_ns() - start) / CALLS / 1000, flush=True)


def start(folder: Path, kernels: str) -> subprocess.Popen[str]:
    """A worker with the sources of a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "XPRNN_KERNELS": kernels}
    command = [sys.executable, __file__, "--worker"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def ask(process: subprocess.Popen[str]) -> float:
    """The microseconds of a call."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compare(older: Path, kernels: str, rounds: int) -> str:
    """A line with medians and ratios."""
    processes = start(older, kernels), start(ROOT, kernels)
    try:
        for process in processes:
            ask(process)
        pairs = []
        for k in range(rounds):  # each is the first of a pair in half of the rounds
            order = processes[:: 1 if k % 2 else -1]
            times = [ask(process) for process in order]
            pairs.append(tuple(times[:: 1 if k % 2 else -1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    old, new = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([a / b for a, b in pairs])
    return f"{old:7.1f} us -> {new:7.1f} us, ratio {middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Compare, or work for a process that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", default=PARENT, help="revision to compare with")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker()
        return
    from .gate import extract_parent

    print(f"GRU({H}, {H}), T={T} N={N}, eval mode, {options.rounds} pairs")
    with tempfile.TemporaryDirectory() as folder:
        commit, reason = extract_parent(Path(folder), options.parent)
        if not commit:
            raise SystemExit(reason)
        for name, kernels in IMPLEMENTATIONS.items():
            line = compare(Path(folder), kernels, options.rounds)
            print(f"{name:10} {line}", flush=True)


if __name__ == "__main__":
    main()
