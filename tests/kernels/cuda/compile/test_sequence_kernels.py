"""Sequence kernels compile without spilling, in the registers that the planner assumes.

For each file and math mode the instantiation with the most registers, for one architecture in turn;
`compile_sequences.py` compiles all of them, which takes minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from tests.support import compile_sequences
from tests.support.compile_sequences import (
    ARCHITECTURES,
    FROZEN,
    PLAIN,
    Job,
    compiled,
    jobs,
    main,
    sample,
    wrong,
)
from tests.support.nvrtc import Usage, usages
from xprnn.kernels.cuda import plan
from xprnn.kernels.cuda.plan import MODE_NAMES

pytestmark = pytest.mark.usefixtures("cupy")


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")


def largest(which: Iterable[tuple[int, bool]]) -> list[Job]:
    """The sample, with one architecture per file and math mode; every architecture occurs."""
    groups: dict[tuple[str, str, int, bool], list[Job]] = {}
    for job in sorted(sample(jobs(which))):
        groups.setdefault(job.group()[:4], []).append(job)
    return [among[k % len(among)] for k, among in enumerate(groups.values())]


def faults_of(job: Job) -> list[str]:
    return wrong(job, compiled(job))


@pytest.mark.parametrize(
    "job",
    [
        *largest(PLAIN),
        *[pytest.param(job, marks=pytest.mark.frozen) for job in largest(FROZEN)],
    ],
    ids=lambda job: f"{job.name}{' wave' * job.wave} sm_{job.architecture}",
)
def test_the_largest_kernels_fit_in_the_registers_that_the_planner_assumes(job: Job) -> None:
    assert not faults_of(job)


def test_a_sample_has_one_of_each_file_math_mode_and_architecture() -> None:
    """Each has the most registers of its group; frozen kernels are separate."""
    for which in (PLAIN, FROZEN):
        every, some = jobs(which), sample(jobs(which))
        assert {*some} <= {*every} and {job.group() for job in every} == {
            group for group, count in Counter([job.group() for job in some]).items() if count == 1
        }
        most = {job.group(): job.registers for job in some}
        assert all(job.registers <= most[job.group()] for job in every)
    assert len(sample(jobs())) == 6 * len(MODE_NAMES) * len(ARCHITECTURES)
    assert {(job.cluster, job.wave) for job in jobs()} == {*PLAIN}
    assert {(job.cluster, job.wave) for job in jobs(FROZEN)} == {*FROZEN}
    assert {(job.group()[0], job.architecture) for job in largest(PLAIN)} == {
        (job.group()[0], job.architecture) for job in jobs()
    }


SMALL = Job(("gru", "forward"), "xprnn::gru_forward<xprnn::BF16, 8, 1, 1, 1, false>", 135, "90")
TOO_MANY = "xprnn::gru_forward<xprnn::TF32X3, 8, 10, 10, 1, true>"  # k-blocks in registers
SPILLING = SMALL._replace(name=TOO_MANY, registers=255)


def test_too_few_assumed_registers_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SMALL in jobs()
    assert not faults_of(SMALL)
    monkeypatch.setitem(plan.BASE_REGISTERS, "bfloat16", 64)
    (low,) = [job for job in jobs() if job._replace(registers=135) == SMALL]
    (fault,) = faults_of(low)
    assert fault.endswith("registers, expected at most 88")


def test_a_missing_instantiation_is_reported() -> None:
    with pytest.raises(RuntimeError, match="sm_90: NVRTC refuses"):
        compiled(SMALL._replace(name=SMALL.name.replace("BF16", "BF17")))


def test_spills_of_called_functions_are_counted() -> None:
    memory = "ptxas . {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    log = f"Compiling entry function 'k' for 'sm_90'\n{memory.format(0, 0, 0)}"
    log += f"Function properties for called\n{memory.format(8, 4, 2)}Used 40 registers\n"
    assert usages(log) == {"k": Usage(40, 8, 6)}


@pytest.mark.parametrize("spills", (False, True))
def test_the_command_reports_spilling_kernels(
    spills: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_sequences, "jobs", lambda which: [SMALL, *[SPILLING] * spills])
    assert main([]) == spills
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"gru forward sm_90 {1 + spills} compiled, at most ")
    assert ("bytes of stack" in last and f"sm_90: {TOO_MANY}: " in last) == spills


@pytest.mark.parametrize("options", ([], ["--sample"], ["--frozen"], ["--frozen", "--sample"]))
def test_the_options_select_the_jobs(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = SMALL._replace(registers=SMALL.registers - 1)
    of = {PLAIN: [smaller, SMALL], FROZEN: [SMALL._replace(cluster=2)] * 2}
    monkeypatch.setattr(compile_sequences, "jobs", lambda which: of[which])
    chosen: list[Job] = []
    monkeypatch.setattr(compile_sequences, "largest_first", lambda jobs: chosen.extend(jobs) or [])
    assert main(options) == 0
    every = of[FROZEN if "--frozen" in options else PLAIN]
    assert chosen == (every[-1:] if "--sample" in options else every)
