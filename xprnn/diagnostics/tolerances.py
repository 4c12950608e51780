"""The allowed deviation of a result from its float64 reference, by type, and its computation.

An array's error is its largest absolute error divided by the largest magnitude in the reference
array: single elements may cancel to zero, whole arrays do not.

float64: 1e-10, the accuracy that the project guarantees; the bound below gives about 3e-14. Between
two evaluations of the same equations with another order of summation: 1e-12. Between a single step,
by a stepper, a cell or a layer called with T = 1, and the same step of a sequence: 1e-13, which the
bound below, with u = 2^-53, gives at L T (K + 8) = 6,340.

float32: the reference is computed in float64 from the same float32 values, so the only difference
is rounding. Each operation rounds by a factor 1 + δ with δ from -u to u, u = 2^-24. The longest
chain of operations on which a result depends has

    n = 2 L T (K + 8)

of them: T steps in each of L layers, forward and backward (2); in a step one inner product of K
terms (K = I + H, or N if that is larger, since a weight's gradient sums N rows per step) and about
8 roundings in the gates and the update of the state. The δ have either sign and are nearly
independent, so they accumulate like a random walk: by Azuma's inequality an accumulated error
exceeds λ u sqrt(n) with probability below 2 exp(-λ²/2) (N. J. Higham, T. Mary, "A new approach
to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). λ = 8 makes that
3e-14, so that no failure is expected in the 1e6 elements that the tests compare. The bound assumes
that a step does not amplify an error, which holds for weights uniform in 1/sqrt(H), where a gated
state is a mean of bounded terms and the spectral radius of an Elman layer is near 1/sqrt(3); and
that partial sums are not larger than results, which holds for data with mean zero.

float16, bfloat16: float32 layers with this compute dtype. The reference gets values that are
representable in low precision; the product of two of them is exact in float32 and sums are
accumulated in float32, so the only additional rounding occurs on storing: u = 2^-11 for the 11
significant bits of float16, 2^-8 for the 8 of bfloat16. A step stores gx (twice with a bias), the
gates, other saved activations, h, and in the backward pass dgh and dgx. Each contributes with its
weight in the result: gx passes through activations, abs(a) σ'(a) < 0.23 and abs(a) tanh'(a) < 0.45,
so that all gates together weigh less than one rounding; h, r, 1 - z, dgh and dgx weigh at most one
each, n in 1 - n² two. That is 8 per step:

    n = 8 L min(T, 2)

because errors decay: a step passes on less than half of the variance of a state's error (with
weights uniform in 1/sqrt(H) an Elman step a third, a gated one z² or f² ~ 1/4), and the sum
1 + 1/2 + 1/4 + ... is below 2. A rounding error is uniform within ±u of the value at most, with a
standard deviation of u/sqrt(3); six standard deviations of the sum, 6/sqrt(3) u sqrt(n), are
exceeded by one element in 5e8. The float32 bound is added for the float32 operations. The largest
observed errors of arrays, for T from 1 to 100, are 1.5 to 3 u in layers of 17 units and more, and
8 u in layers of 5, where the bound is 10 to 24 u.

tf32: products read operands of 11 significant bits, which the hardware may truncate instead of
rounding, so u = 2^-10. Each step rounds the two operands of its products, two forward and one
backward, and those of the products for the weights: not more than the 8 stored values of
float16 and bfloat16.
"""

from __future__ import annotations

from math import inf, isnan, sqrt

import numpy as np

EPSILON = {  # the distance from 1 to the next number
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "tf32": 2.0**-10,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}
LARGEST = {  # the largest finite number
    "float64": 2.0**1023 * (2 - 2.0**-52),
    "float32": 2.0**127 * (2 - 2.0**-23),
    "tf32": 2.0**127 * (2 - 2.0**-10),
    "float16": 2.0**15 * (2 - 2.0**-10),
    "bfloat16": 2.0**127 * (2 - 2.0**-7),
}
FIXED = {"float64": 1e-10}
REORDERED = 1e-12  # float64
STEPWISE = 1e-13  # float64
UNIT_ROUNDOFF = {"float32": 2.0**-24, "tf32": 2.0**-10, "float16": 2.0**-11, "bfloat16": 2.0**-8}
DEVIATIONS = 8.0  # λ
STORED = 8  # roundings to low precision in a step, forward and backward
LASTING = 2  # effective number of steps over which such errors accumulate
LOW_PRECISION_DEVIATIONS = 6.0 / sqrt(3.0)


def tolerance(operand_type: str, *, steps: int, width: int, layers: int) -> float:
    """The largest error, relative to the largest element, that rounding can cause.

    :param operand_type: "float64", "float32", "tf32", "float16" or "bfloat16".
    :param steps: T.
    :param width: K, the number of terms of the longest inner product in a step.
    :param layers: L.
    :raises KeyError: `operand_type` is none of these.

    >>> f"{tolerance('float32', steps=8, width=16, layers=3):.1e}"
    '1.6e-05'
    >>> f"{tolerance('bfloat16', steps=8, width=16, layers=1):.3f}"
    '0.054'
    """
    if operand_type in FIXED:
        return FIXED[operand_type]
    unit = UNIT_ROUNDOFF[operand_type]
    if operand_type == "float32":
        return DEVIATIONS * unit * sqrt(2 * layers * steps * (width + 8))
    storing = LOW_PRECISION_DEVIATIONS * unit * sqrt(STORED * layers * min(steps, LASTING))
    return storing + tolerance("float32", steps=steps, width=width, layers=layers)


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error over the largest magnitude in `expected`; 0 for equal arrays.

    It is infinite if an element is NaN.

    >>> error_of(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
    0.25
    """
    if actual.size == 0:
        return 0.0
    error = float(np.abs(actual.astype(np.float64) - expected).max())
    scale = float(np.abs(expected).max())
    if isnan(error) or not scale:
        return inf if error else 0.0
    return error / scale
