"""How far a result may lie from its float64 reference: one table by dtype, and one comparison.

An array's error is its largest absolute error divided by the largest magnitude in the
reference array: single elements may cancel to nothing, arrays do not.

float64: 1e-10, the figure that the project promises; the bound below gives about 3e-14. Between two
ways through the same equations, whose sums are taken in another order: 1e-12. Between a step that
is taken as one, by a stepper, a cell or a layer called with T = 1, and the sequence's: 1e-13, which
the bound below, with u = 2^-53, gives at L T (K + 8) = 6,340.

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
3e-14, so not once in the 1e6 elements that the tests compare. The bound takes it that a step
does not magnify an error: true of weights uniform in 1/sqrt(H), where a gated state is a mean of
bounded terms and the spectral radius of an Elman layer is near 1/sqrt(3); and that partial sums
are no larger than results, true of data with mean zero.

float16, bfloat16: float32 beside this compute dtype. The reference gets numbers that the narrow
type holds; a product of two of them is exact in float32 and sums are float32's, so all that
rounds beyond float32 is storing: u = 2^-11 for the 11 significant bits of float16, 2^-8 for the
8 of bfloat16. Stored in a step are gx (twice with a bias), the gates, what else is saved, h, and
on the way back dgh and dgx. They count with their weight in the result: gx goes through
activations, |a| σ'(a) < 0.23 and |a| tanh'(a) < 0.45, so all gates' together weigh less than one
rounding; h, r, 1 - z, dgh and dgx weigh at most one each, n in 1 - n² two. That is 8 a step:

    n = 8 L min(T, 2)

for steps forget: of the variance of the error that a state carries, a step passes on less than
half (weights uniform in 1/sqrt(H): an Elman step a third, a gated one z² or f² ~ 1/4), and the
sum 1 + 1/2 + 1/4 + ... stays below 2. A rounding is uniform within ±u of the value at most, its
deviation u/sqrt(3); six deviations of the sum, 6/sqrt(3) u sqrt(n), are exceeded by one element
in 5e8. The float32 bound is added for what float32 does. Largest error of an array seen in
sizes from T = 1 to 100: 1.5 to 3 u in layers of 17 and more, 8 u in layers of 5, where the bound
is 10 to 24 u.

tf32: products read operands of 11 significant bits, which the hardware may cut off instead of
rounding, so u = 2^-10. Each step rounds the two operands of its products, two forward and one
back, and of those for the weights: no more than the 8 that the narrow types store.
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
LARGEST = {  # finite number
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
STORED = 8  # roundings to a narrow type in a step, forward and back
LASTING = 2  # steps that such a rounding is felt for
NARROW_DEVIATIONS = 6.0 / sqrt(3.0)


def tolerance(numbers: str, *, steps: int, width: int, layers: int) -> float:
    """The largest error, relative to the largest element, that rounding to `numbers` explains.

    :param numbers: "float64", "float32", "tf32", "float16" or "bfloat16".
    :param steps: T.
    :param width: K, the terms of the longest inner product in a step.
    :param layers: L.
    :raises KeyError: `numbers` is none of these.

    >>> f"{tolerance('float32', steps=8, width=16, layers=3):.1e}"
    '1.6e-05'
    >>> f"{tolerance('bfloat16', steps=8, width=16, layers=1):.3f}"
    '0.054'
    """
    if numbers in FIXED:
        return FIXED[numbers]
    unit = UNIT_ROUNDOFF[numbers]
    if numbers == "float32":
        return DEVIATIONS * unit * sqrt(2 * layers * steps * (width + 8))
    narrow = NARROW_DEVIATIONS * unit * sqrt(STORED * layers * min(steps, LASTING))
    return narrow + tolerance("float32", steps=steps, width=width, layers=layers)


def error_of(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest absolute error over the largest magnitude in `expected`; 0 for equal arrays.

    Where something is not a number it is infinite.

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
