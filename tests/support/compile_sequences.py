"""Compile the instantiations of the sequence kernels that the planner can choose.

    python -m tests.support.compile_sequences [--frozen] [--sample]

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: some minutes on two cores.
With `--frozen`, in their place the kernels of clusters and waves. With `--sample`, of each file,
numbers and architecture the one with most registers. What was compiled before on this machine from
the same text is not compiled again. It prints the most registers that each kernel takes, and ends
with 1 and the names where one takes more than the planner counts on, or spills.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.support.nvrtc import Usage, compile_instantiation, problems
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

    def group(self) -> tuple[str, str, int, bool, str]:
        """Its file, numbers and architecture; clusters and waves are groups of their own."""
        file, numbers = KERNELS[self.kernel].file, self.name.partition(",")[0].partition("<")[2]
        return file, numbers, self.cluster, self.wave, self.architecture


PLAIN, FROZEN = ((1, False),), ((2, False), (1, True))  # blocks of a cluster, whether it is a wave


def jobs(which: Iterable[tuple[int, bool]] = PLAIN) -> list[Job]:
    """All there are; one that does two kinds of work, once."""
    once: dict[tuple[str, int, bool], tuple[tuple[str, str], int]] = {}
    for kernel, (cluster, wave) in itertools.product(KERNELS, which):
        if wave and kernel[1] == "backward":
            continue  # layers are undone one by one
        for name, registers in instantiations(*kernel, cluster, wave):
            once.setdefault((name, cluster, wave), (kernel, registers))
    return [
        Job(kernel, name, registers, architecture, cluster, wave)
        for (name, cluster, wave), (kernel, registers) in once.items()
        for architecture in (ARCHITECTURES if cluster == 1 else WITH_CLUSTERS)
    ]


def sample(every: Sequence[Job]) -> list[Job]:
    """Of each group the one with most registers, and of these the one with the largest sizes."""
    ascending = sorted(every, key=lambda job: (job.registers, job.sizes(), job.name))
    return [*{job.group(): job for job in ascending}.values()]


def largest_first(chosen: Sequence[Job]) -> list[Job]:
    """So that none of the last ones takes long."""
    return sorted(chosen, key=Job.sizes, reverse=True)


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
        kind = ("wave",) * job.wave + ("cluster",) * (job.cluster > 1)
        lines.setdefault((*job.kernel, *kind, f"sm_{job.architecture}"), []).append(usage.registers)
        faults += wrong(job, usage)
    for line, registers in lines.items():
        print(*line, f"{len(registers)} compiled, at most {max(registers)} registers")
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what is asked for; the exit status."""
    parser = argparse.ArgumentParser(description="Compile the sequence kernels.")
    parser.add_argument("--frozen", action="store_true")
    parser.add_argument("--sample", action="store_true")
    options = parser.parse_args(arguments)
    chosen = jobs(FROZEN if options.frozen else PLAIN)
    if options.sample:
        chosen = sample(chosen)
    ordered = largest_first(chosen)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        usages = list(pool.map(compiled, ordered))
    faults = report(sorted(zip(ordered, usages, strict=True)))
    print(*faults or ["none spills, none takes more than the planner counts on"], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
