"""The generated kernels of every definition compile for every architecture without spilling.

The compilers are those of `test_pointwise_kernels.py`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest

from tests.support.definitions import DEFINITIONS
from tests.support.generated_kernels import compile_generated, kernels_of
from tests.support.nvrtc import ARCHITECTURES, problems
from tests.support.pointwise_cases import TYPES, needs_dtype

# Registers per thread of a kernel of elements, and of one of rows. NVRTC 12.9 uses at most 80
# (slstm), 80 (awkward) and 98 (slstm) for elements in 16-bit dtypes, float32 and float64, and 168,
# 196 and 190 (layer_norm_gru) for rows, whose loops it unrolls. They are allocated in eights.
ELEMENTS = {"float16": 80, "bfloat16": 80, "float32": 80, "float64": 104}
ROWS = {"float16": 168, "bfloat16": 168, "float32": 200, "float64": 192}
# of elements: forty operations with most functions, more than the cell of any paper here
MOST = {"every_function": 168}


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """A pool of processes, one per core: NVRTC compiles one program at a time in each."""
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as executor:
        yield executor


def most_registers(name: str, dtype: str) -> dict[str, int]:
    elements = MOST.get(name, ELEMENTS[dtype])
    return {
        f"xprnn_{source.name}": ROWS[dtype] if source.by_rows else elements
        for source in kernels_of(name, dtype)
    }


@pytest.mark.parametrize("dtype", TYPES)
def test_every_kernel_compiles_without_spilling(pool: Executor, dtype: str) -> None:
    needs_dtype(dtype)
    targets = [*[(sm, False) for sm in ARCHITECTURES], ("90", True)]
    jobs = [(name, dtype, *target) for name in DEFINITIONS for target in targets]
    failures = []
    for job, usage in zip(jobs, pool.map(compile_generated, *zip(*jobs, strict=True)), strict=True):
        name, _, architecture, large = job
        where = f"sm_{architecture}{' large' * large}"
        wrong = problems(usage, most_registers(name, dtype))
        failures += [f"{where}: {problem}" for problem in wrong]
    assert not failures
