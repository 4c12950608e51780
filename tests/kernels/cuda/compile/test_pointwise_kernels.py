"""Every kernel of the package compiles for every architecture, and fits in registers.

CuPy compiles without a GPU, with NVRTC and CUDA's headers, which the dependency group `nvrtc`
installs. Without CuPy these tests are skipped; if CuPy is installed without the others, it cannot
run any kernel, and they fail.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import pytest

from tests.support.nvrtc import (
    ARCHITECTURES,
    FLAGS,
    compile_header,
    compile_sources,
    cupy_source,
    problems,
)
from tests.support.pointwise_cases import TYPES, needs_dtype
from xprnn.kernels.cuda.pointwise import KERNELS, build

HEADERS = ("rnn.h", "gru.h", "lstm.h")

# Registers per thread by header: for 16-bit dtypes, float32 and float64. NVRTC 12.9 and 13.5 use at
# most 24, 24, 28 (rnn), 44, 52, 64 (gru) and 38, 40, 46 (lstm). Registers are allocated in units of
# eight: the limit is the next multiple of eight, and at most 64, with which a multiprocessor still
# holds 1024 threads, enough for kernels bound by memory.
REGISTERS = {"rnn.h": (32, 32, 32), "gru.h": (48, 56, 64), "lstm.h": (40, 48, 48)}


@pytest.fixture(scope="module")
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")


@pytest.fixture(scope="module")
def pool(cupy: Any) -> Iterator[Executor]:
    """A pool of processes, one per core: NVRTC compiles one program at a time in each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as executor:
        yield executor


def most_registers(header: str, dtype: str) -> dict[str, int]:
    """The largest allowed number of registers of each kernel of a header."""
    half, single, double = REGISTERS[header]
    most = {"float32": single, "float64": double}.get(dtype, half)
    return {f"xprnn_{kernel.name}": most for kernel in KERNELS if kernel.header == header}


@pytest.mark.parametrize("dtype", TYPES)
def test_every_kernel_compiles_without_spilling(pool: Executor, dtype: str) -> None:
    needs_dtype(dtype)
    targets = [*[(sm, False) for sm in ARCHITECTURES], ("90", True)]
    jobs = [(header, dtype, *target) for header in HEADERS for target in targets]
    failures = []
    for job, usage in zip(jobs, pool.map(compile_header, *zip(*jobs, strict=True)), strict=True):
        header, _, architecture, large = job
        where = f"sm_{architecture}{' large' * large}"
        wrong = problems(usage, most_registers(header, dtype))
        failures += [f"{where}: {problem}" for problem in wrong]
    assert not failures


def test_every_header_has_a_register_limit() -> None:
    assert {kernel.header for kernel in KERNELS} == set(HEADERS) == REGISTERS.keys()


def test_cupy_compiles_with_these_flags(cupy: Any) -> None:
    from cupy.cuda import compiler

    source = inspect.getsource(compiler)
    assert all(f"options += ('{flag}',)" in source for flag in FLAGS)


HEAVY = """
    A values[400];
    #pragma unroll
    for (int k = 0; k < 400; ++k) values[k] = gh[k * H];
    __syncthreads();
    #pragma unroll
    for (int k = 0; k < 400; ++k) h_next[k] = static_cast<C>(values[399 - k] * values[k / 2]);
"""
INDEXED = """
    A values[64] = {};
    for (int k = 0; k < H; ++k) values[static_cast<int>(gates[k]) & 63] += gh[k];
    h_next[i] = static_cast<C>(values[static_cast<int>(gates[i]) & 63]);
"""
FAULTS = [
    (HEAVY, 255, "bytes of stack, [1-9][0-9]* spilled"),
    (INDEXED, 255, "256 bytes of stack, 0 spilled"),
    ("h_next[i] = gates[i];", 8, "registers, expected at most 8"),
]


@pytest.mark.parametrize(("operation", "most", "message"), FAULTS)
def test_excess_registers_and_spills_are_detected(
    cupy: Any, operation: str, most: int, message: str
) -> None:
    head = ("int32 H, raw C gates, raw A gh", "raw C h_next", operation, "with_fault")
    kernel = cupy.ElementwiseKernel(*head, no_return=True)
    usage = compile_sources([cupy_source(kernel, "float32")], "80")
    assert [
        problem for problem in problems(usage, {"with_fault": most}) if re.search(message, problem)
    ]


def test_a_syntax_error_is_reported(cupy: Any) -> None:
    source = cupy_source(build(cupy.ElementwiseKernel, "rnn_tanh_forward_gates"), "float32")
    broken = source.replace("return tanh_of(a);", "return tanh_of(a)")
    assert broken != source
    with pytest.raises(RuntimeError, match="NVRTC refuses the kernel"):
        compile_sources([broken], "80")


def test_a_missing_kernel_is_reported() -> None:
    assert problems({}, {"xprnn_gone": 255}) == ["xprnn_gone: not compiled"]
