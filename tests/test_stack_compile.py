"""Every instantiation of `stack_step.cu` that a stepper can ask for compiles, without a spill."""

from __future__ import annotations

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor

import pytest
from nvrtc import Usage, compile_sources

from xprnn.kernels.cuda import stack_step
from xprnn.kernels.cuda.stack_step import KINDS, ROWS, UNITS

ARCHITECTURES = ("80", "90", "100")
MOST = 255  # registers a thread: a block has 128, and one is on each multiprocessor
NAMES = [(unit, kind, rows) for unit in UNITS.values() for kind in KINDS.values() for rows in ROWS]


def instantiated(names: list[tuple[str, str, int]]) -> str:
    """The source, and an explicit instantiation of each, with the parameters that it has there."""
    text = stack_step.source()
    found = re.search(r"^stack_step\(([^)]*)\)", text, re.MULTILINE)
    assert found
    parameters = re.sub(r"\bWord\b", "xprnn::Word", found[1])
    lines = [text]
    for unit, kind, rows in names:
        element = "unsigned" if kind == "TF32X3" else "unsigned short"
        own = parameters.replace("typename Numbers<kind>::Element", element)
        name = f"xprnn::stack_step<xprnn::{unit}, xprnn::{kind}, {rows}>"
        lines.append(f"template __global__ void {name}({own});")
    return "\n".join(lines)


def compiled(unit: str, architecture: str) -> dict[str, Usage]:
    """What the instantiations of a cell take."""
    return compile_sources([instantiated([n for n in NAMES if n[0] == unit])], architecture)


def problems(usage: dict[str, Usage]) -> list[str]:
    return [
        f"{name}: {used}"
        for name, used in usage.items()
        if used.stack or used.spilled or used.registers > MOST
    ]


def test_no_instantiation_spills() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'xprnn[nvrtc]'")
    jobs = [(unit, architecture) for unit in UNITS.values() for architecture in ARCHITECTURES]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for job, usage in zip(jobs, pool.map(compiled, *zip(*jobs, strict=True)), strict=True):
            assert len(usage) == len(KINDS) * len(ROWS), job
            assert not problems(usage), job
    assert len(NAMES) <= 40


def test_a_kernel_that_takes_too_much_shows() -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'xprnn[nvrtc]'")
    source = instantiated([("LstmUnit", "F16", 32)])
    assert problems(compile_sources([source], "90"))
