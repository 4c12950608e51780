"""Compile every instantiation of `stack_step.cu` that a stepper can ask for.

    python tests/compile_stack_steps.py

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: about two minutes on two
cores. It ends with 1 and the names where one spills.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from nvrtc import compile_instantiation, problems

from xprnn.kernels.cuda.stack_step import KINDS, ROWS, UNITS, instantiation, source

ARCHITECTURES = ("80", "90", "100")
MOST = 255  # registers a thread: a block has 128, and one is on each multiprocessor


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
    """What keeps an instantiation from fitting in registers.

    :raises RuntimeError: NVRTC does not accept it.
    """
    name = instantiation(job.unit, job.kind, job.rows)
    usage = compile_instantiation(source(), name, job.architecture)
    return [
        f"sm_{job.architecture}: {problem}" for problem in problems({name: usage}, {name: MOST})
    ]


def main() -> int:
    """Compile all; the exit status."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        faults = [fault for found in pool.map(wrong, JOBS) for fault in found]
    print(*faults, f"{len(JOBS)} compiled, {len(faults)} wrong", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
