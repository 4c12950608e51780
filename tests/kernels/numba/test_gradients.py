"""The CPU kernels of the products over all steps: blocks, panels and slices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.support.numba_cases import faulty, needs_numba, uncached

pytestmark = needs_numba
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@DTYPES
@pytest.mark.parametrize("bounds", [(0, 1), (0, 8, 21), (0, 0, 16, 39)])
@pytest.mark.parametrize("K", [1, 16, 33, 64])
@pytest.mark.parametrize("S", [0, 1, 255, 256, 257, 700])
def test_gradients_of_weights_are_sums_over_all_rows(
    S: int, K: int, bounds: tuple[int, ...], dtype: str
) -> None:
    from xprnn.kernels.numba.gradients import BLOCK, _weights
    from xprnn.kernels.numba.product import width_of

    rng, width = np.random.default_rng(S), width_of(np.dtype(dtype))
    dgates = rng.standard_normal((S, bounds[-1])).astype(dtype)
    inputs = rng.standard_normal((S, K)).astype(dtype)
    dweight, dbias = np.full((bounds[-1], K), np.nan, dtype), np.full(bounds[-1], np.nan, dtype)
    for low, high in pairwise(bounds):
        sizes = (BLOCK, width), (high - low, width), (2, high - low)
        scratch = [np.full(size, np.nan, dtype) for size in sizes]
        _weights(np.dtype(dtype))(dgates, inputs, dweight, dbias, *scratch, low, high)
    upcast = dgates.astype(np.float64)
    bound = 4 * np.finfo(dtype).eps * max(S, 1) ** 0.5  # rounding in S sums of numbers of size 1
    np.testing.assert_allclose(
        dweight, upcast.T @ inputs, rtol=0, atol=4 * bound * max(S, 1) ** 0.5
    )
    np.testing.assert_allclose(dbias, upcast.sum(axis=0), rtol=0, atol=4 * bound * max(S, 1) ** 0.5)


@pytest.mark.parametrize("needed", ["dweight", "dbias"])
def test_unneeded_gradients_are_left_out(needed: str) -> None:
    from xprnn.kernels.numba.gradients import BLOCK, _weights
    from xprnn.kernels.numba.product import width_of

    dtype = np.dtype("float32")
    dgates, inputs, width = np.ones((300, 9), dtype), np.ones((300, 5), dtype), width_of(dtype)
    dweight = np.zeros((9, 5) if needed == "dweight" else (0, 0), dtype)
    dbias = np.zeros(9 if needed == "dbias" else 0, dtype)
    scratch = [np.empty(size, dtype) for size in ((BLOCK, width), (9, width), (2, 9))]
    _weights(dtype)(dgates, inputs, dweight, dbias, *scratch, 0, 9)
    assert (dweight == 300).all() and (dbias == 300).all()


@DTYPES
def test_sums_of_many_rows_are_as_accurate_as_those_of_few(dtype: str) -> None:
    """Numbers just above 1: a running sum would lose accuracy, sums of block sums do not."""
    from xprnn.kernels.numba import gradients

    check_many_rows(gradients, dtype)
    for change in (
        ("        block_sum[j] = 0.0\n", "        block_sum[j] = 0.0 if last else block_sum[j]\n"),
        ("            total[j] = 0.0\n", ""),
    ):
        broken = faulty(gradients, change)
        broken.compile_for = uncached
        with pytest.raises(AssertionError, match="exact"):
            check_many_rows(broken, dtype)


def check_many_rows(gradients: Any, dtype: str) -> None:
    from xprnn.core.sums import sum_rows

    BLOCK = gradients.BLOCK
    S, small = 3 * BLOCK**2 + 5, {"float32": 1e-4, "float64": 1e-13}[dtype]
    dgates = np.full((S, 3), 1 + small, dtype)
    dbias, plain = np.empty(3, dtype), np.empty(3, dtype)
    scratch = [np.empty(size, dtype) for size in ((BLOCK, 32), (0, 32), (2, 3))]
    outputs = np.empty((0, 0), dtype), dbias
    gradients._weights(np.dtype(dtype))(dgates, np.empty((S, 1), dtype), *outputs, *scratch, 0, 3)
    sum_rows(np, dgates, plain)
    exact = S * np.longdouble(dgates[0, 0])
    errors = [abs(float(sums[0] - exact)) for sums in (dbias, plain)]
    assert errors[0] <= max(2 * errors[1], 4 * np.finfo(dtype).eps * S), f"not exact: {errors}"


@DTYPES
@pytest.mark.parametrize("bounds", [(0, 1), (0, 64, 131), (0, 0, 64)])
@pytest.mark.parametrize("I", [1, 32, 45])
def test_gradients_of_the_input_are_products(bounds: tuple[int, ...], I: int, dtype: str) -> None:  # noqa: E741
    from xprnn.kernels.numba.gradients import ROWS, _input
    from xprnn.kernels.numba.product import panels_of, width_of
    from xprnn.kernels.numba.sequence import _packing

    rng, kind = np.random.default_rng(0), np.dtype(dtype)
    dgates, weight = rng.standard_normal((bounds[-1], 12)), rng.standard_normal((12, I))
    dgates, weight = dgates.astype(kind), weight.astype(kind)
    panels = np.full((panels_of(I, kind), 12, width_of(kind)), np.nan, kind)
    _packing("pack", kind)(weight, panels)
    dx = np.full((bounds[-1], I), np.nan, kind)
    scratch = np.full((ROWS, len(panels) * panels.shape[2]), np.nan, kind)
    for low, high in pairwise(bounds):
        _input(kind)(dgates, panels, dx, scratch, low, high)
    upcast = dgates.astype(np.float64)
    np.testing.assert_allclose(dx, upcast @ weight, rtol=0, atol=100 * np.finfo(kind).eps)
