"""The table of tolerances, `xprnn/diagnostics/tolerances.py`, for the sizes of these tests.

For the sizes below float32's tolerance is 1.6e-5, so that an error of 1e-4 of the largest element
fails, as `test_parity.py` checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.diagnostics import tolerances
from xprnn.diagnostics.tolerances import error_of

STEPS, WIDTH, LAYERS = 8, 16, 3  # the default T, K and L, the largest of most tests

listeners: list[Callable[[str, float, float, str], None]] = []  # of dtype, error, bound, what


def tolerance(
    dtype: Any,
    steps: int = STEPS,
    width: int = WIDTH,
    layers: int = LAYERS,
    compute_dtype: str | None = None,
) -> float:
    """The largest error, relative to the largest element, that rounding explains.

    `dtype` is that of the array, `compute_dtype` that of the products' operands, or "tf32".

    >>> tolerance("float64"), f"{tolerance('float32'):.1e}"
    (1e-10, '1.6e-05')
    """
    numbers = compute_dtype or np.dtype(dtype).name
    return tolerances.tolerance(numbers, steps=steps, width=width, layers=layers)


def assert_close(
    actual: np.ndarray,
    expected: np.ndarray,
    dtype: Any,
    what: str = "",
    compute_dtype: str | None = None,
    **sizes: int,
) -> None:
    """Fail unless `actual` has `dtype` and `expected`'s shape, is finite and within tolerance.

    `expected` is float64; `compute_dtype` and `sizes` are those of `tolerance`.
    """
    assert actual.dtype == np.dtype(dtype), f"{what}: dtype {actual.dtype}, expected {dtype}"
    assert expected.dtype == np.float64, f"{what}: the reference is {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    assert np.isfinite(expected).all(), f"{what}: the reference is not finite"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error = error_of(actual, expected)
    most = tolerance(dtype, compute_dtype=compute_dtype, **sizes)
    for listen in listeners:
        listen(compute_dtype or np.dtype(dtype).name, error, most, what)
    assert error <= most, f"{what}: relative error {error:.2e}, tolerance {most:.2e}"
