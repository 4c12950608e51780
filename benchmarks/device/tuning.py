"""Time every supported tiling of the sequence kernels and mark the planner's choice.

    python -m benchmarks.device.tuning

Prints one line of Markdown for each tiling: a forward call with one tiling of the forward kernel,
or forward and backward with one of the backward kernel; the rest of the call is the same. Nothing
is changed: benchmarks/NOTES.md says where to enter a faster tiling. Stops after LIMIT seconds and
prints how far it got. Needs CuPy and a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import xprnn
from xprnn.backend import Backend
from xprnn.kernels import KernelUnavailableError, Pass
from xprnn.kernels.cuda.plan import KERNELS, LaunchPlan, Tiling, plan
from xprnn.tools.bench.clock import Timer, measure, timer

from ..common import use_kernels
from .problems import Problem, problems
from .rows import drawn, layer_of

LIMIT = 140  # seconds
BUDGET = 0.05  # seconds for a tiling
WORKS = ("forward", "backward")
HEAD = (
    "| cell | type | N, H, T | kernel | tiling | grid | passes | us per step | |",
    "|---|---|---|---|---|---|---|---|---|",
)


def main() -> int:
    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        print(f"tuning: no GPU to measure on: {error}", file=sys.stderr)
        return 2
    print("\n".join(HEAD))
    started = time.monotonic()
    for problem in problems():
        for work in WORKS:
            if time.monotonic() - started > LIMIT:
                print(f"\nstopped after {LIMIT} s, before {problem} {work}")
                return 0
            for line in lines(problem, work, backend, timer(backend)):
                print(line, flush=True)
    return 0


def lines(problem: Problem, work: str, backend: Backend, clock: Timer) -> list[str]:
    """The table's lines for one kernel of a problem, the fastest first; [] if there is none."""
    if (problem.cell, work) not in KERNELS:
        return []
    timings = []
    with use_kernels("sequence"):
        call, current_plan = _call(problem, work, backend)
        default = current_plan()
        for tiling in KERNELS[problem.cell, work].tilings[problem.dtype]:
            with only(problem, work, tiling):
                forced = current_plan()
                if forced is None:
                    continue
                (seconds,) = measure([call], clock, BUDGET)
            mark = "chosen" if default is not None and default.tiling == tiling else ""
            timings.append((statistics.median(seconds) / problem.T, forced, mark))
    return [
        f"| {problem.cell} | {problem.dtype} | {problem.N}, {problem.H}, {problem.T} | {work} "
        f"| {tuple(one.tiling)} | {one.grid} | {one.passes} | {1e6 * seconds:.2f} | {mark} |"
        for seconds, one, mark in sorted(timings, key=lambda row: row[0])
    ]


def _call(
    problem: Problem, work: str, backend: Backend
) -> tuple[Callable[[], Any], Callable[[], LaunchPlan | None]]:
    """A call of a layer, with backward for "backward", and a function that returns its plan."""
    layer = layer_of(problem, backend)
    if work == "backward":
        layer.train()
    T, N, H = problem.T, problem.N, problem.H
    x, doutput = (backend.from_host(drawn(T, N, H, seed).astype(layer.dtype)) for seed in (0, 1))

    def call() -> None:
        layer(x)
        if work == "backward":
            layer.backward(doutput)

    def chosen() -> LaunchPlan | None:
        try:
            kernels = layer._plan(T, N).kernels
        except KernelUnavailableError:
            return None
        found = None if kernels is None else kernels.plan(Pass(work), N, H, T, 1)
        return found if isinstance(found, LaunchPlan) else None

    return call, chosen


@contextmanager
def only(problem: Problem, work: str, tiling: Tiling) -> Iterator[None]:
    """Restrict the planner to one tiling of a kernel."""
    kernel = KERNELS[problem.cell, work]
    KERNELS[problem.cell, work] = kernel._replace(tilings={problem.dtype: (tiling,)})
    plan.cache_clear()
    try:
        yield
    finally:
        KERNELS[problem.cell, work] = kernel
        plan.cache_clear()


if __name__ == "__main__":
    sys.exit(main())
