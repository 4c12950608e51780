"""Compiles the kernels of the report and the suites ahead, into CuPy's cache on disk.

    python -m benchmarks.device.warm

NVRTC compiles one kernel at a time in a process, whatever its threads: so a dozen processes share
the work, or as many as there are processors. First come layers, called as `xprnn verify` calls them
but without the kernels whose blocks wait, for CuPy compiles small kernels of its own too; then the
sequence kernels and those of a stepper's step; last clusters and waves. A line a kernel says how
long it took. Exit status: 0 all compile, 1 some do not, 2 there is no GPU. Needs CuPy and a GPU.
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
from xprnn.kernels.cuda import loading, sequence, stack_step
from xprnn.kernels.cuda.plan import (
    K_BLOCK_ELEMENTS,
    DeviceProperties,
    LaunchPlan,
    SequenceProblem,
    plan,
)
from xprnn.kernels.cuda.table import KERNELS
from xprnn.verify import check
from xprnn.verify import suite as verified

from . import ceilings, kinds
from .problems import StackProblem, StepProblem, everything
from .rows import CHECKED

PROCESSES = 12  # at most
WORKS = ("forward", "training", "backward")
TESTED = tuple(product((1, 9, 33), (5, 43, 70, 256)))  # N, H: about those of the tests
CALLED = verified.Problem(3, 3, 5, 43, layers=2, directions=2, lengths=(3, 0, 2))
RELAY = ("relay", "look", "sweep")  # of ceilings.py


class Job(NamedTuple):
    """A kernel, or a layer with all that it launches."""

    what: str  # "layer", "sequence", "step", "relay"
    name: str
    details: tuple[Any, ...] = ()  # a sequence kernel's file, cluster and whether it is a wave

    @property
    def frozen(self) -> bool:
        """Whether it is for clusters or waves."""
        return self.what == "sequence" and self.details[1:] != (1, False)

    @property
    def size(self) -> list[int]:
        """What its name says, such as warps and chunks: the larger, the longer it takes."""
        return [int(size) for size in re.findall(r"\b\d+\b", self.name)]

    def compile(self, backend: Backend) -> None:
        """Compile it for the backend's device, or take it from the cache."""
        if self.what == "layer":
            layer = verified.build(*self.name.split(), CALLED, backend)
            shape = CALLED.T, CALLED.N, CALLED.I
            check(layer, shape, CALLED.lengths, 0, differences=False)
        elif self.what == "sequence":
            source, alone = sequence.source(*self.details), self.details[1] == 1
            _ = loading.kernel(backend.xp, source, self.name, alone).kernel
        elif self.what == "step":
            _ = loading.kernel(backend.xp, stack_step.source(), self.name).kernel
        else:
            waits = self.name == RELAY[0]
            _ = loading.kernel(backend.xp, ceilings.source(), f"xprnn::{self.name}", waits).kernel


def jobs(device: DeviceProperties) -> list[Job]:
    """What is compiled for a device, in that order, each once."""
    layers = [
        Job("layer", " ".join(pair)) for pair in product(verified.LAYERS, verified.ARITHMETIC)
    ]
    steps = [
        Job("step", stack_step.instantiation(*kind))
        for kind in product(stack_step.UNITS.values(), stack_step.KINDS.values(), stack_step.ROWS)
    ]
    relay = [Job("relay", name) for name in RELAY]
    kernels = {Job("sequence", one.name, _details(one)): 0 for one in _planned(device)}
    every = sorted([*kernels, *steps], key=lambda job: job.size, reverse=True)
    waiting, frozen = ([job for job in every if job.frozen == late] for late in (False, True))
    return [*layers, *relay, *waiting, *frozen]


def _details(chosen: LaunchPlan) -> tuple[str, int, bool]:
    file = chosen.name.removeprefix("xprnn::").partition("<")[0]
    return file, chosen.cluster, chosen.layers > 1


def _planned(device: DeviceProperties) -> Iterator[LaunchPlan]:
    """The launches of the report, of calls such as the tests make, and of every kind."""
    for problem, work in product(_problems(), WORKS):
        chosen = plan(device, problem._replace(work=work))
        if isinstance(chosen, LaunchPlan):
            yield chosen
    for kind, work in product(kinds.kinds([kinds.CLUSTER]), WORKS):
        with kind.planned():
            chosen = plan(
                device, SequenceProblem(kind.cell, work, kind.numbers, kind.N, kinds.H, kinds.T)
            )
        if isinstance(chosen, LaunchPlan):
            yield chosen


def _problems() -> Iterator[SequenceProblem]:
    """What is asked of the planner, for one kind of work."""
    for one in everything():
        layers = (1, one.layers) if isinstance(one, StackProblem) else (1,)
        if not isinstance(one, StepProblem):
            for T, deep in product((CHECKED, one.T), layers):
                sizes = one.dtype, one.N, one.H, T, one.directions, deep
                yield SequenceProblem(one.cell, "forward", *sizes)
    cells = {cell: 0 for cell, _ in KERNELS}
    for cell, numbers in product(cells, K_BLOCK_ELEMENTS):
        for (N, H), directions in product(TESTED, (1, 2)):
            yield SequenceProblem(cell, "forward", numbers, N, H, kinds.T, directions)
        yield SequenceProblem(cell, "forward", numbers, kinds.N, kinds.H, kinds.T, 1, kinds.LAYERS)


# -- in processes


def compiled(job: Job) -> str:
    """Why a job cannot be done, or ""."""
    from cupy.cuda.compiler import CompileException

    try:
        job.compile(xprnn.get_backend("cupy"))
    except (CompileException, RuntimeError, MemoryError) as error:  # one kernel, not all
        return f"{type(error).__name__}: {error}"
    return ""


def timed(work: Callable[[Job], str], job: Job) -> tuple[float, str]:
    """The seconds of a job, and why it cannot be done."""
    started = time.perf_counter()
    why = work(job)
    return time.perf_counter() - started, why


def run(every: Sequence[Job], work: Callable[[Job], str], processes: int) -> int:
    """Do all jobs, a line each; how many could not be done.

    :param work: a function of a module, that says why a job cannot be done.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    left = {pool.submit(timed, work, job): job for job in every}
    failed = 0
    try:
        for future in as_completed(left):
            job = left[future]
            try:
                seconds, why = future.result()
            except BrokenProcessPool as error:  # every job that is left gives it
                seconds, why = 0.0, f"a process ended by itself: {error}"
            failed += bool(why)
            print(f"{seconds:6.1f} s  {job.what} {job.name}{why and f': {why}'}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failed


def usable_processors() -> int:
    """Those that this process may use."""
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
    took = time.monotonic() - started
    print(f"{len(every)} in {took:.0f} s by {processes} processes: {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
