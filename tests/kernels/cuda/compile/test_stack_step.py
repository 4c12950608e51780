"""The largest instantiations of `stack_step.cu` compile without spilling.

`compile_stack_steps.py` compiles all of them, which takes minutes.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support import compile_stack_steps
from tests.support.compile_stack_steps import ARCHITECTURES, JOBS, Job, main, sample, wrong
from tests.support.nvrtc import ptx
from xprnn.kernels.cuda.stack_step import KINDS, ROWS, instantiation, source


@pytest.fixture(autouse=True)
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS.values())
def test_most_gates_and_rows_do_not_spill(kind: str, architecture: str) -> None:
    assert not wrong(Job("LstmUnit", kind, ROWS[-1], architecture))


@pytest.mark.parametrize("poll", ("ld.relaxed.gpu.global.v4.u32", "ld.relaxed.gpu.global.u32"))
def test_eight_polls_are_issued_before_their_results_are_stored(poll: str) -> None:
    """The emulator does not model the time of serialized loads."""
    text = ptx(source(), instantiation("GruUnit", "BF16", ROWS[-1]))
    between_stores = re.split(r"\bst\.", text)
    assert max(part.count(poll) for part in between_stores) == 8


def test_a_spilling_kernel_is_detected() -> None:
    assert wrong(Job("LstmUnit", "F16", 32, "90"))


@pytest.mark.parametrize("options", ([], ["--sample"]))
def test_the_command_compiles_the_requested_instantiations(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = Job("RnnUnit<false>", "F16", ROWS[0], "90")
    spilling = Job("LstmUnit", "F16", 32, "90")
    monkeypatch.setattr(compile_stack_steps, "JOBS", [fitting, spilling])
    monkeypatch.setattr(compile_stack_steps, "sample", lambda every: every[:1])
    assert main(options) == (not options)
    summary = "1 compiled, 0 wrong" if options else "2 compiled, 1 wrong"
    assert capsys.readouterr().out.splitlines()[-1] == summary


def test_a_sample_has_every_unit_kind_and_architecture() -> None:
    some = sample(JOBS)
    assert {*some} < {*JOBS} and len(some) == len({(j.unit, j.kind, j.architecture) for j in JOBS})
    assert {job.rows for job in some} == {max(ROWS)}


def test_the_number_of_instantiations_is_limited() -> None:
    assert len({job[:3] for job in JOBS}) == len(JOBS) // len(ARCHITECTURES) <= 40
