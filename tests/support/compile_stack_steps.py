"""Compile the instantiations of `stack_step.cu` that a stepper can use.

    python -m tests.support.compile_stack_steps [--sample]

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: about a minute on two cores.
With `--sample` only those with the most rows. Results are cached on this machine by source. It
exits with 1 and the names if one spills.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.support.nvrtc import compile_instantiation, problems
from xprnn.kernels.cuda.stack_step import KINDS, ROWS, UNITS, instantiation, source

ARCHITECTURES = ("80", "90", "100")
MAX_REGISTERS = 255  # per thread: one block of 128 on each multiprocessor


class Job(NamedTuple):
    """One instantiation for one architecture."""

    unit: str
    kind: str
    rows: int
    architecture: str


JOBS = [  # the largest first
    Job(unit, kind, rows, architecture)
    for rows in reversed(ROWS)
    for unit in UNITS.values()
    for kind in KINDS.values()
    for architecture in ARCHITECTURES
]


def wrong(job: Job) -> list[str]:
    """Why an instantiation does not fit in registers.

    :raises RuntimeError: NVRTC does not accept it.
    """
    name = instantiation(job.unit, job.kind, job.rows)
    usage = compile_instantiation(source(), name, job.architecture)
    return [
        f"sm_{job.architecture}: {problem}"
        for problem in problems({name: usage}, {name: MAX_REGISTERS})
    ]


def sample(every: Sequence[Job]) -> list[Job]:
    """Those with the most rows, which take the most registers."""
    return [job for job in every if job.rows == ROWS[-1]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the selected kernels; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compile the kernel of a stepper's step.")
    parser.add_argument("--sample", action="store_true")
    jobs = sample(JOBS) if parser.parse_args(arguments).sample else JOBS
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        faults = [fault for faults_of_job in pool.map(wrong, jobs) for fault in faults_of_job]
    print(*faults, f"{len(jobs)} compiled, {len(faults)} wrong", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
