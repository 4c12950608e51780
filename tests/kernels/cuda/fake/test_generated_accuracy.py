"""Built-in cells by kernels generated from definitions: as accurate as the hand-written ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.cases import LAYERS, Case, build, draw, numpy_run, run
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16
from tests.support.implementations import SelectKernels
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.cells import Cell
from xprnn.cells.shipped import builtin_cell
from xprnn.core.precision import PrecisionPolicy
from xprnn.kernels.cuda import package
from xprnn.kernels.cuda.generated import generated_cell

pytestmark = needs_compiler

# Of rounding errors that differ by chance, in calls with 128 units: the ratio of their sizes
BOUND = 1.2
TYPES = (("float32", None), ("float32", "float16"), ("float32", "bfloat16"))


def errors(case: Case, layer: Any) -> dict[str, float]:
    """The root mean square of the error of each result."""
    problem = draw(case)
    expected, actual = numpy_run(case, layer, problem), run(layer, case, problem)
    return {
        name: float(np.sqrt(np.mean((actual[name].astype("float64") - value) ** 2)))
        for name, value in expected.items()
    }


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_generated_kernels_are_as_accurate(
    name: str,
    dtype: str,
    compute_dtype: str | None,
    fake_cupy: Backend,
    monkeypatch: pytest.MonkeyPatch,
    select_kernels: SelectKernels,
) -> None:
    if compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    select_kernels("pointwise")
    case = Case(name, dtype=dtype, compute_dtype=compute_dtype, T=12, N=16, I=8, H=128)
    layer = build(case, fake_cupy.name)
    by_hand = errors(case, layer)
    used = []

    def generated(cell: Cell, precision: PrecisionPolicy, record: bool) -> Cell:
        used.append(generated_cell(builtin_cell(cell.name, case.H), record, precision.is_mixed))
        return used[-1]

    kernels.forget_plans()
    monkeypatch.setattr(package, "fused_cell", generated)
    ours = errors(case, build(case, fake_cupy.name))
    kernels.forget_plans()
    assert used
    assert ours.keys() == by_hand.keys()
    worse = {n: (ours[n], by_hand[n]) for n in ours if not 0 < ours[n] <= BOUND * by_hand[n]}
    assert not worse
