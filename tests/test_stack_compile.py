"""The largest instantiations of `stack_step.cu` compile without a spill.

`compile_stack_steps.py` compiles them all, which takes minutes.
"""

from __future__ import annotations

from typing import Any

import pytest
from compile_stack_steps import ARCHITECTURES, JOBS, Job, wrong

from xprnn.kernels.cuda.stack_step import KINDS, ROWS


@pytest.fixture(autouse=True)
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'xprnn[nvrtc]'")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS.values())
def test_most_gates_and_rows_do_not_spill(kind: str, architecture: str) -> None:
    assert not wrong(Job("LstmUnit", kind, ROWS[-1], architecture))


def test_a_kernel_that_takes_too_much_shows() -> None:
    assert wrong(Job("LstmUnit", "F16", 32, "90"))


def test_there_are_not_too_many() -> None:
    assert len({job[:3] for job in JOBS}) == len(JOBS) // len(ARCHITECTURES) <= 40
