"""Generated kernels of the built-in cells as machine code, beside those written by hand.

The table for all dtypes is in `benchmarks/NOTES.md`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.compare_generated import Compiled, compile_kernel, rows
from tests.support.nvrtc import Usage

INSTRUCTIONS = 1.15  # times those by hand, at most
REGISTERS = 64  # with which a multiprocessor still holds 1024 threads


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")


def problem(by_hand: Compiled, made: Compiled) -> str | None:
    """What makes a generated kernel worse."""
    if made.usage.spilled or made.usage.stack:
        return f"{made.usage.spilled} bytes spilled, {made.usage.stack} of stack"
    if made.usage.registers > REGISTERS:
        return f"{made.usage.registers} registers"
    if made.instructions > INSTRUCTIONS * by_hand.instructions:
        return f"{made.instructions} instructions, by hand {by_hand.instructions}"
    return None


def test_generated_kernels_are_as_good(cupy: Any) -> None:
    compared = list(rows("90", "float32", "bfloat16"))
    assert len(compared) == 24
    found = [(name, dtype, problem(*both)) for name, dtype, *both in compared]
    assert not [each for each in found if each[-1]]


def test_a_worse_kernel_is_detected(cupy: Any) -> None:
    """One that computes what nothing needs."""
    head = ("int32 H, raw C gates, raw A gh", "raw C h_next")
    by_hand, made = (
        compile_kernel(
            cupy.ElementwiseKernel(*head, text, "kernel", no_return=True), "float32", "90"
        )
        for text in ("h_next[i] = gates[i];", "h_next[i] = gates[i] + expf(gh[i]) / gates[i + H];")
    )
    assert "instructions, by hand" in str(problem(by_hand, made))
    assert problem(by_hand, by_hand) is None
    assert "spilled" in str(problem(by_hand, Compiled(Usage(32, 0, 8), 1)))
    assert "registers" in str(problem(by_hand, Compiled(Usage(65, 0, 0), 1)))
