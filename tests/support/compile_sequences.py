"""Compile the instantiations of the sequence kernels that the planner can choose.

    python -m tests.support.compile_sequences [--frozen] [--sample]

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: some minutes on two cores.
With `--frozen`, the kernels of clusters and wavefronts instead. With `--sample`, only the one with
the most registers for each file, math mode and architecture. Results are cached on this machine by
source. It prints the most registers that each kernel takes, and exits with 1 and the names if one
takes more than the planner assumes, or spills.
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
    registers: int  # that the planner assumes
    architecture: str
    cluster: int = 1  # blocks
    wave: bool = False  # whether it is a wavefront

    def sizes(self) -> list[int]:
        """The sizes in its name, such as warps and k-blocks: the larger, the more registers."""
        return [int(size) for size in re.findall(r"\b\d+\b", self.name)]

    def group(self) -> tuple[str, str, int, bool, str]:
        """Its file, math mode and architecture; clusters and wavefronts are separate groups."""
        file, mode = KERNELS[self.kernel].file, self.name.partition(",")[0].partition("<")[2]
        return file, mode, self.cluster, self.wave, self.architecture


PLAIN, FROZEN = (
    ((1, False),),
    ((2, False), (1, True)),
)  # blocks of a cluster, whether it is a wavefront


def jobs(which: Iterable[tuple[int, bool]] = PLAIN) -> list[Job]:
    """All jobs; a kernel for two kinds of work is included once."""
    once: dict[tuple[str, int, bool], tuple[tuple[str, str], int]] = {}
    for kernel, (cluster, wave) in itertools.product(KERNELS, which):
        if wave and kernel[1] == "backward":
            continue  # the backward pass has no wavefront
        for name, registers in instantiations(*kernel, cluster, wave):
            once.setdefault((name, cluster, wave), (kernel, registers))
    return [
        Job(kernel, name, registers, architecture, cluster, wave)
        for (name, cluster, wave), (kernel, registers) in once.items()
        for architecture in (ARCHITECTURES if cluster == 1 else WITH_CLUSTERS)
    ]


def sample(every: Sequence[Job]) -> list[Job]:
    """The one of each group with the most registers, and among these with the largest sizes."""
    ascending = sorted(every, key=lambda job: (job.registers, job.sizes(), job.name))
    return [*{job.group(): job for job in ascending}.values()]


def largest_first(chosen: Sequence[Job]) -> list[Job]:
    """The jobs with those that take longest first."""
    return sorted(chosen, key=Job.sizes, reverse=True)


def compiled(job: Job) -> Usage:
    """The usage of a kernel.

    :raises RuntimeError: NVRTC does not accept it.
    """
    text = source(KERNELS[job.kernel].file, job.cluster, job.wave)
    return compile_instantiation(text, job.name, job.architecture)


def wrong(job: Job, usage: Usage) -> list[str]:
    """How the usage differs from what the planner assumes."""
    messages = problems({job.name: usage}, {job.name: job.registers})
    return [f"sm_{job.architecture}: {problem}" for problem in messages]


def report(results: Iterable[tuple[Job, Usage]]) -> list[str]:
    """Print a line for each kernel and architecture; returns the problems."""
    lines: dict[tuple[str, ...], list[int]] = {}
    faults = []
    for job, usage in results:
        kind = ("wave",) * job.wave + ("cluster",) * (job.cluster > 1)
        lines.setdefault((*job.kernel, *kind, f"sm_{job.architecture}"), []).append(usage.registers)
        faults += wrong(job, usage)
    for line, registers in lines.items():
        print(*line, f"{len(registers)} compiled, at most {max(registers)} registers")
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the selected kernels; returns the exit status."""
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
    print(*faults or ["none spills, none takes more registers than the planner assumes"], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
