"""Sequence kernels compile without spilling, in the registers that the planner counts on.

For each kernel and numbers the instantiation with the most registers, for one architecture in
turn; `compile_sequences.py` compiles them all, which takes minutes.
"""

from __future__ import annotations

import itertools
from typing import Any

import compile_sequences
import pytest
from compile_sequences import ARCHITECTURES, Job, compiled, jobs, main, tightest, wrong
from nvrtc import Usage, usages

from xprnn.kernels.cuda import plan
from xprnn.kernels.cuda.plan import KIND

pytestmark = pytest.mark.usefixtures("cupy")


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'xprnn[nvrtc]'")


def largest() -> list[Job]:
    """For each kernel and numbers one; each kernel and all numbers meet every architecture."""
    chosen = []
    kernels = dict.fromkeys([job.kernel for job in jobs()])
    for (k, kernel), (n, kind) in itertools.product(enumerate(kernels), enumerate(KIND.values())):
        architecture = ARCHITECTURES[(k + n) % len(ARCHITECTURES)]
        among = [
            job
            for job in jobs()
            if (job.kernel, job.architecture) == (kernel, architecture) and f"::{kind}," in job.name
        ]
        by_registers = sorted(among, key=lambda job: (job.registers, job.sizes()))
        chosen.append([job for job in by_registers if not job.wave][-1])
        if kernel in (("gru", "forward"), ("lstm", "training")):  # of the layers of a wave
            chosen.append([job for job in by_registers if job.wave][-1])
    return chosen


def faults_of(job: Job) -> list[str]:
    return wrong(job, compiled(job))


@pytest.mark.parametrize(
    "job", largest(), ids=lambda job: f"{job.name}{' wave' * job.wave} sm_{job.architecture}"
)
def test_the_largest_fit_in_the_registers_that_the_planner_counts_on(job: Job) -> None:
    assert not faults_of(job)


def test_of_waves_those_with_most_registers_can_be_compiled_alone() -> None:
    """All other jobs stay, and of every kernel, numbers and architecture some wave does."""
    every, kept = jobs(), tightest(jobs())
    assert [job for job in kept if not job.wave] == [job for job in every if not job.wave]
    left = [*({*every} - {*kept})]
    assert len(left) > 300 and {job.group() for job in left} <= {job.group() for job in kept}
    assert {job.group() for job in kept if job.wave} == {job.group() for job in every if job.wave}
    most = {job.group(): job.registers for job in kept if job.wave}
    assert all(job.registers < most[job.group()] for job in left)
    assert {job for job in largest() if job.wave} <= {*kept}


SMALL = Job(("gru", "forward"), "xprnn::gru_forward<xprnn::BF16, 8, 1, 1, 1, false>", 135, "90")
TOO_MANY = "xprnn::gru_forward<xprnn::TF32X3, 8, 10, 10, 1, true>"  # chunks held
SPILLING = SMALL._replace(name=TOO_MANY, registers=255)


def test_a_promise_too_low_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SMALL in jobs()
    assert not faults_of(SMALL)
    monkeypatch.setitem(plan.SPARE, "bfloat16", 64)
    (low,) = [job for job in jobs() if job._replace(registers=135) == SMALL]
    (fault,) = faults_of(low)
    assert fault.endswith("registers, expected at most 88")


def test_an_instantiation_that_is_not_there_shows() -> None:
    with pytest.raises(RuntimeError, match="sm_90: NVRTC refuses"):
        compiled(SMALL._replace(name=SMALL.name.replace("BF16", "BF17")))


def test_what_a_function_that_is_called_spills_shows() -> None:
    memory = "ptxas . {} bytes stack frame, {} bytes spill stores, {} bytes spill loads\n"
    log = f"Compiling entry function 'k' for 'sm_90'\n{memory.format(0, 0, 0)}"
    log += f"Function properties for called\n{memory.format(8, 4, 2)}Used 40 registers\n"
    assert usages(log) == {"k": Usage(40, 8, 6)}


@pytest.mark.parametrize("planted", (False, True))
def test_the_command_names_more_held_chunks_than_fit(
    planted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_sequences, "jobs", lambda: [SMALL, *[SPILLING] * planted])
    assert main([]) == planted
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"gru forward sm_90 {1 + planted} compiled, at most ")
    assert ("bytes of stack" in last and f"sm_90: {TOO_MANY}: " in last) == planted
