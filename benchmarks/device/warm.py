"""Compile the kernels of the report and the test suites in advance, into CuPy's cache on disk.

    python -m benchmarks.device.warm

NVRTC compiles one kernel at a time in a process, however many threads it has, so the work is
distributed over a dozen processes, or as many as there are processors. First, layers are called as
in `xprnn verify`, without the kernels whose blocks wait, because CuPy compiles small kernels of its
own too; then the sequence kernels and those of a stepper's step are compiled, clusters and
wavefronts last. A line per kernel gives its time. Exit status: 0 all compiled, 1 some failed, 2
there is no GPU. Needs CuPy and a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import product
from typing import Any, NamedTuple

import xprnn
from xprnn.backend import Backend
from xprnn.diagnostics.verification import suite as verified
from xprnn.diagnostics.verification.comparison import check
from xprnn.kernels.cuda import loading, sequence, stack_step
from xprnn.kernels.cuda.plan import (
    K_BLOCK_ELEMENTS,
    DeviceProperties,
    LaunchPlan,
    SequenceProblem,
    plan,
)
from xprnn.kernels.cuda.table import KERNELS

from . import kinds, peaks
from .problems import StackProblem, StepProblem, everything
from .rows import CHECKED

PROCESSES = 12  # at most
WORKS = ("forward", "training", "backward")
TESTED = tuple(product((1, 9, 33), (5, 43, 70, 256)))  # N, H: similar to those of the tests
CALLED = verified.Problem(3, 3, 5, 43, layers=2, directions=2, lengths=(3, 0, 2))
PING_PONG = ("ping_pong", "poll_words", "sweep")  # of peaks.py


class Job(NamedTuple):
    """A kernel, or a layer with all kernels that it launches."""

    what: str  # "layer", "sequence", "step", "ping_pong"
    name: str
    details: tuple[Any, ...] = ()  # a sequence kernel's file, cluster, whether it is a wavefront

    @property
    def frozen(self) -> bool:
        """Whether it is a cluster or wavefront kernel."""
        return self.what == "sequence" and self.details[1:] != (1, False)

    @property
    def size(self) -> list[int]:
        """The sizes in its name, such as warps and chunks: larger ones take longer to compile."""
        return [int(size) for size in re.findall(r"\b\d+\b", self.name)]

    def compile(self, backend: Backend) -> None:
        """Compile it for the backend's device, or take it from the cache."""
        if self.what == "layer":
            layer = verified.build(*self.name.split(), CALLED, backend)
            shape = CALLED.T, CALLED.N, CALLED.I
            check(layer, shape, CALLED.lengths, 0, differences=False)
        elif self.what == "sequence":
            source, cooperative = sequence.source(*self.details), self.details[1] == 1
            _ = loading.kernel(backend.xp, source, self.name, cooperative).kernel
        elif self.what == "step":
            _ = loading.kernel(backend.xp, stack_step.source(), self.name).kernel
        else:
            waits = self.name == PING_PONG[0]
            _ = loading.kernel(backend.xp, peaks.source(), f"xprnn::{self.name}", waits).kernel


def jobs(device: DeviceProperties) -> list[Job]:
    """All jobs for a device, in order, without duplicates."""
    layers = [
        Job("layer", " ".join(pair)) for pair in product(verified.LAYERS, verified.PRECISIONS)
    ]
    steps = [
        Job("step", stack_step.instantiation(*kind))
        for kind in product(stack_step.UNITS.values(), stack_step.KINDS.values(), stack_step.ROWS)
    ]
    ping_pong = [Job("ping_pong", name) for name in PING_PONG]
    kernels = {Job("sequence", one.name, _details(one)): 0 for one in _planned(device)}
    every = sorted([*kernels, *steps], key=lambda job: job.size, reverse=True)
    waiting, frozen = ([job for job in every if job.frozen == last] for last in (False, True))
    return [*layers, *ping_pong, *waiting, *frozen]


def _details(chosen: LaunchPlan) -> tuple[str, int, bool]:
    file = chosen.name.removeprefix("xprnn::").partition("<")[0]
    return file, chosen.cluster, chosen.layers > 1


def _planned(device: DeviceProperties) -> Iterator[LaunchPlan]:
    """The launches of the report, of calls like those of the tests, and of every kind."""
    for problem, work in product(_problems(), WORKS):
        chosen = plan(device, problem._replace(work=work))
        if isinstance(chosen, LaunchPlan):
            yield chosen
    for kind, work in product(kinds.kinds([kinds.CLUSTER]), WORKS):
        with kind.planned():
            sizes = kind.operand_type, kind.N, kinds.H, kinds.T
            chosen = plan(device, SequenceProblem(kind.cell, work, *sizes))
        if isinstance(chosen, LaunchPlan):
            yield chosen


def _problems() -> Iterator[SequenceProblem]:
    """The planner's problems, for forward."""
    for one in everything():
        depths = (1, one.layers) if isinstance(one, StackProblem) else (1,)
        if not isinstance(one, StepProblem):
            for T, layers in product((CHECKED, one.T), depths):
                sizes = one.dtype, one.N, one.H, T, one.directions, layers
                yield SequenceProblem(one.cell, "forward", *sizes)
    cells = {cell: 0 for cell, _ in KERNELS}
    for cell, operand_type in product(cells, K_BLOCK_ELEMENTS):
        for (N, H), directions in product(TESTED, (1, 2)):
            yield SequenceProblem(cell, "forward", operand_type, N, H, kinds.T, directions)
        yield SequenceProblem(
            cell, "forward", operand_type, kinds.N, kinds.H, kinds.T, 1, kinds.LAYERS
        )


# -- worker processes


def compiled(job: Job) -> str:
    """Run a job; returns why it failed, or ""."""
    from cupy.cuda.compiler import CompileException

    try:
        job.compile(xprnn.get_backend("cupy"))
    except (CompileException, RuntimeError, MemoryError) as error:  # fails this job only
        return f"{type(error).__name__}: {error}"
    return ""


def timed(work: Callable[[Job], str], job: Job) -> tuple[float, str]:
    """The seconds of a job, and why it failed."""
    started = time.perf_counter()
    reason = work(job)
    return time.perf_counter() - started, reason


def run(every: Sequence[Job], work: Callable[[Job], str], processes: int) -> int:
    """Run all jobs and print a line for each; returns how many failed.

    :param work: a module-level function that returns why a job failed, or "".
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    pending = {pool.submit(timed, work, job): job for job in every}
    failed = 0
    try:
        for future in as_completed(pending):
            job = pending[future]
            try:
                seconds, reason = future.result()
            except BrokenProcessPool as error:  # raised by all remaining jobs
                seconds, reason = 0.0, f"a worker process terminated: {error}"
            failed += bool(reason)
            print(f"{seconds:6.1f} s  {job.what} {job.name}{reason and f': {reason}'}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def usable_processors() -> int:
    """The number of processors that this process may use."""
    counted = getattr(os, "sched_getaffinity", None)
    return len(counted(0)) if counted else os.cpu_count() or 1


def main() -> int:
    try:
        backend: Any = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        print(f"warm: no GPU to compile for: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    every = jobs(DeviceProperties.of(backend.xp, backend.device))
    processes = min(PROCESSES, usable_processors())
    failed = run(every, compiled, processes)
    seconds = time.monotonic() - started
    print(f"{len(every)} in {seconds:.0f} s by {processes} processes: {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
