"""xprnn beside torch, ONNX Runtime and JAX on a CPU, with the products alone beside them.

    python -m benchmarks.cpu_report [--cells gru ...] [--shapes 128,1,32,32 ...] [--threads 1 2]
        [--works forward ...] [--sides numba torch ...] [--rounds 9]

Each library is a process of its own, held to the threads, and all are timed in turns after they
have found the same results. A line a call says what was found: microseconds, medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

# `cpu/` has no __init__.py, and is imported in functions only: asv imports all that it finds
# here beside versions of xprnn that are older than what `cpu/` needs.


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    started = time.monotonic()
    rows = [*measured(options)]
    print(f"{len(rows)} rows in {time.monotonic() - started:.0f} s")
    return 1 if any(row["wrong"] for row in rows) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    from .cpu import problems

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_report", description=__doc__.splitlines()[0]
    )
    for name in ("cells", "works", "sides"):
        choices = getattr(problems, name.upper())
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=problems.SHAPES)
    every = sorted({1, problems.all_threads()})
    parser.add_argument("--threads", nargs="+", type=int, default=every)
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    T, N, width, H = map(int, text.split(","))
    return T, N, width, H


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows, thread count by thread count."""
    from .cpu.problems import STEP, STEP_SHAPE, Problem
    from .cpu.turns import clients, missing, timed

    absent = missing(options.sides)
    for side, reason in absent.items():
        print(f"{side}: {reason}")
    sides = [side for side in options.sides if side not in absent]
    layers = [work for work in options.works if work != STEP]
    for threads in options.threads:
        with clients(sides, threads) as found:
            for cell in options.cells:
                tasks = [(shape, layers) for shape in options.shapes if layers]
                if STEP in options.works and threads == 1:
                    tasks.append((STEP_SHAPE, [STEP]))
                for shape, works in tasks:
                    rows = timed(Problem(cell, *shape), works, found, threads, options.rounds)
                    _say(rows)
                    yield from rows


def _say(rows: Sequence[dict[str, Any]]) -> None:
    for work in dict.fromkeys([row["work"] for row in rows]):
        mine = [row for row in rows if row["work"] == work]
        first = mine[0]
        sizes = " ".join([f"{name}={first[name]}" for name in "TNIH"])
        found = ", ".join([f"{row['side']} {_time(row)}" for row in mine])
        print(f"{first['cell']} {sizes} {work}, threads {first['threads']}: {found}", flush=True)


def _time(row: dict[str, Any]) -> str:
    return row["wrong"] or row["absent"] or f"{statistics.median(row['us']):.1f}"


if __name__ == "__main__":
    sys.exit(main())
