"""Compile every instantiation of the sequence kernels that the planner can choose.

    python tests/compile_sequences.py

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: about five minutes on two
cores for a gated cell. It prints the most registers that each kernel takes, and ends with 1 and the
names where one takes more than the planner counts on, or spills.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from nvrtc import Usage, compile_instantiation, problems

from xprnn.kernels.cuda.plan import instantiations
from xprnn.kernels.cuda.sequence import source
from xprnn.kernels.cuda.table import KERNELS

ARCHITECTURES = ("80", "90", "100")
WITH_CLUSTERS = ("90", "100")


class Job(NamedTuple):
    """One instantiation for one architecture."""

    kernel: tuple[str, str]  # a key of KERNELS
    name: str
    registers: int  # that the planner counts on
    architecture: str
    cluster: int = 1  # blocks
    wave: bool = False  # of layers

    def sizes(self) -> list[int]:
        """What its name says, such as warps and chunks: the larger, the more registers."""
        return [int(size) for size in re.findall(r"\b\d+\b", self.name)]


def jobs() -> list[Job]:
    """All there are; one that does two kinds of work, once."""
    once: dict[tuple[str, int, bool], tuple[tuple[str, str], int]] = {}
    for kernel, (cluster, wave) in itertools.product(KERNELS, ((1, False), (2, False), (1, True))):
        if wave and kernel[1] == "backward":
            continue  # layers are undone one by one
        for name, registers in instantiations(*kernel, cluster, wave):
            once.setdefault((name, cluster, wave), (kernel, registers))
    return [
        Job(kernel, name, registers, architecture, cluster, wave)
        for (name, cluster, wave), (kernel, registers) in once.items()
        for architecture in (ARCHITECTURES if cluster == 1 else WITH_CLUSTERS)
    ]


def compiled(job: Job) -> Usage:
    """What it takes.

    :raises RuntimeError: NVRTC does not accept it.
    """
    text = source(KERNELS[job.kernel].file, job.cluster, job.wave)
    return compile_instantiation(text, job.name, job.architecture)


def wrong(job: Job, usage: Usage) -> list[str]:
    """How it breaks what the planner counts on."""
    found = problems({job.name: usage}, {job.name: job.registers})
    return [f"sm_{job.architecture}: {problem}" for problem in found]


def report(found: Iterable[tuple[Job, Usage]]) -> list[str]:
    """Print a line for each kernel and architecture; what is wrong."""
    lines: dict[tuple[str, ...], list[int]] = {}
    faults = []
    for job, usage in found:
        wave = ("wave",) * job.wave
        lines.setdefault((*job.kernel, *wave, f"sm_{job.architecture}"), []).append(usage.registers)
        faults += wrong(job, usage)
    for line, registers in lines.items():
        print(*line, f"{len(registers)} compiled, at most {max(registers)} registers")
    return faults


def main() -> int:
    """Compile all, the largest first; the exit status."""
    largest_first = sorted(jobs(), key=Job.sizes, reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        usages = list(pool.map(compiled, largest_first))
    faults = report(sorted(zip(largest_first, usages, strict=True)))
    print(*faults or ["none spills, none takes more than the planner counts on"], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
