"""Compile every instantiation of the sequence kernels that the planner can choose.

    python tests/compile_sequences.py [--tightest-waves]

For compute capability 8.0, 9.0 and 10.0, on all cores, without a GPU: about five minutes on two
cores for a gated cell. With the option, of the waves' instantiations only those for which the
planner counts on most registers, 276 of 636, which saves a minute and a half. It prints the most
registers that each kernel takes, and ends with 1 and the names where one takes more than the
planner counts on, or spills.
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

    def group(self) -> tuple[tuple[str, str], str, str]:
        """Its kernel, numbers and architecture."""
        return self.kernel, self.name.partition(",")[0], self.architecture


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


def tightest(every: Sequence[Job]) -> list[Job]:
    """Without the waves that have fewer registers than another of their kernel and numbers.

    Of float32 that leaves out none: the planner gives each of them all there are.
    """
    most: dict[tuple[tuple[str, str], str, str], int] = {}
    for job in every:
        if job.wave:
            most[job.group()] = max(job.registers, most.get(job.group(), 0))
    return [job for job in every if not job.wave or job.registers == most[job.group()]]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all, the largest first; the exit status."""
    parser = argparse.ArgumentParser(description="Compile the sequence kernels.")
    parser.add_argument("--tightest-waves", action="store_true")
    chosen = tightest(jobs()) if parser.parse_args(arguments).tightest_waves else jobs()
    largest_first = sorted(chosen, key=Job.sizes, reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        usages = list(pool.map(compiled, largest_first))
    faults = report(sorted(zip(largest_first, usages, strict=True)))
    print(*faults or ["none spills, none takes more than the planner counts on"], sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
