"""How far a result may lie from its float64 reference: one table by dtype, and one comparison.

An array's error is its largest absolute error divided by the largest magnitude in the
reference array: single elements may cancel to nothing, arrays do not.

float64: 1e-10, the figure that the project promises; the bound below gives about 3e-14.

float32: the reference is computed in float64 from the same float32 numbers, so all that
differs is rounding. Each operation rounds by a factor 1 + δ, |δ| <= u = 2^-24. Along the longest
chain of operations that a result hangs on there are

    n = 2 L T (K + 8)

of them: T steps in each of L layers, forward and back again (2); in a step one inner product of
K terms (K = I + H, or N where that is longer, since a weight's gradient sums N rows a step) and
about 8 roundings in the gates and the update of the state. The δ are of either sign and nearly
independent, so they add up like a random walk: with Azuma's inequality an accumulated error
exceeds λ u sqrt(n) with probability below 2 exp(-λ²/2) (N. J. Higham, T. Mary, "A new approach
to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). λ = 8 makes that
3e-14, so not once in the 1e6 elements that these tests compare. The bound takes it that a step
does not magnify an error: true of weights uniform in 1/sqrt(H), where a gated state is a mean of
bounded terms and the spectral radius of an Elman layer is near 1/sqrt(3); and that partial sums
are no larger than results, true of data with mean zero.

For the sizes below it is 1.6e-5: a fault of 1e-4 of the largest element does not pass, and
`test_parity.py` checks that it does not.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

STEPS, WIDTH, LAYERS = 8, 16, 3  # the largest T, K and L unless a test says otherwise

FIXED = {"float64": 1e-10}
UNIT_ROUNDOFF = {"float32": 2.0**-24}
DEVIATIONS = 8.0  # λ


def tolerance(dtype: Any, steps: int = STEPS, width: int = WIDTH, layers: int = LAYERS) -> float:
    """The largest error, relative to the largest element, that rounding in `dtype` explains.

    >>> tolerance("float64"), f"{tolerance('float32'):.1e}"
    (1e-10, '1.6e-05')
    """
    name = np.dtype(dtype).name
    if name in FIXED:
        return FIXED[name]
    return DEVIATIONS * UNIT_ROUNDOFF[name] * sqrt(2 * layers * steps * (width + 8))


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error over the largest magnitude in `expected`; 0 for equal arrays."""
    if actual.size == 0:
        return 0.0
    error = float(np.abs(actual.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    return error / scale if scale else (np.inf if error else 0.0)


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: Any, what: str = "", **sizes: int
) -> None:
    """Fail unless `actual` has `dtype` and `expected`'s shape, is finite and within tolerance.

    `expected` is float64; `sizes` are those of `tolerance`.
    """
    assert actual.dtype == np.dtype(dtype), f"{what}: dtype {actual.dtype}, expected {dtype}"
    assert expected.dtype == np.float64, f"{what}: the reference is {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    assert np.isfinite(expected).all(), f"{what}: the reference is not finite"
    assert np.isfinite(actual).all(), f"{what}: not finite"
    error, most = error_of(actual, expected), tolerance(dtype, **sizes)
    assert error <= most, f"{what}: relative error {error:.2e}, tolerance {most:.2e}"
