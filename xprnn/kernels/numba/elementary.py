"""Functions of one number, in code that vectorizes: no branch, no table, no call but that of log.

Those of powers of e use e^y - 1 = (2^k - 1) + 2^k (e^r - 1) with y = k ln 2 + r,
|r| <= ln(2)/2, where e^r - 1 = r + r² q(r) and q is a polynomial. They replace
`numerics.sigmoid` and NumPy's functions. NaN stays NaN.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from .jit import INLINED, inlined


@intrinsic
def of_type(typing: Any, x: Any, value: Any) -> Any:
    """Return `value` as a number of x's type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[1], signature.args[1], signature.args[0])

    return x(x, value), generate


@intrinsic
def _largest_exponent(typing: Any, y: Any) -> Any:
    """Return the largest integer of y's type whose power of e is finite."""
    exponent = 88.0 if y == types.float32 else 709.0

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(y, exponent)

    return y(y), generate


@intrinsic
def _power_of_two(typing: Any, shifted: Any) -> Any:
    """Return 2^k from 1.5 * 2^23 + k, or 1.5 * 2^52 + k in float64; 0 one below the smallest k."""
    bits, mantissa, bias = (32, 23, 127) if shifted == types.float32 else (64, 52, 1023)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        integer = ir.IntType(bits)  # whose lowest bits are k
        k = builder.bitcast(arguments[0], integer)
        power = builder.add(builder.shl(k, integer(mantissa)), integer(bias << mantissa))
        return builder.bitcast(power, arguments[0].type)

    return shifted(shifted), generate


def _expm1_parts(y: Any) -> Any:
    """Return e^r - 1 and 2^k; overloaded by type below."""


@overload(_expm1_parts, jit_options=INLINED)
def _expm1_parts_by_type(y: Any) -> Any:
    return _expm1_parts_float32 if y == types.float32 else _expm1_parts_float64


def _expm1_parts_float32(y: Any) -> Any:
    """The relative error of the polynomial for e^r - 1 is at most 6e-10."""
    shifted = y * of_type(y, 1.4426950408889634) + of_type(y, 12582912.0)
    k = shifted - of_type(y, 12582912.0)
    r = y - k * of_type(y, 0.693359375)  # ln 2 as a sum of two constants, the first so
    r = r - k * of_type(y, -2.12194440e-4)  # short that k times it is exact
    q = of_type(y, 1.98910805e-4)
    q = q * r + of_type(y, 1.39337307e-3)
    q = q * r + of_type(y, 8.33331084e-3)
    q = q * r + of_type(y, 4.16664642e-2)
    q = q * r + of_type(y, 1.66666667e-1)
    q = q * r + of_type(y, 0.5)
    return q * (r * r) + r, _power_of_two(shifted)


def _expm1_parts_float64(y: Any) -> Any:
    """The relative error of the polynomial for e^r - 1 is at most 6e-19."""
    shifted = y * 1.4426950408889634 + 6755399441055744.0
    k = shifted - 6755399441055744.0
    r = y - k * 0.6931471803691238
    r = r - k * 1.9082149292705877e-10
    q = 2.09147553258932e-09
    q = q * r + 2.5105312729622103e-08
    q = q * r + 2.755727347871858e-07
    q = q * r + 2.755725517000089e-06
    q = q * r + 2.480158732567746e-05
    q = q * r + 1.984126987500228e-04
    q = q * r + 1.3888888888883711e-03
    q = q * r + 8.333333333326084e-03
    q = q * r + 4.166666666666667e-02
    q = q * r + 1.666666666666667e-01
    q = q * r + 0.5
    return q * (r * r) + r, _power_of_two(shifted)


@inlined
def _clipped(y: Any) -> Any:
    """Return y, clipped to exponents whose powers are finite; NaN stays NaN."""
    limit = _largest_exponent(y)
    y = limit if y > limit else y
    return -limit if y < -limit else y


@inlined
def sigmoid(x: Any) -> Any:
    """Return σ(x) = 1 / (1 + e^-x), within 4 units in the last place where it is a normal number.

    As in `numerics.sigmoid`, it is constant where -x exceeds 88, or 709 in float64.
    """
    rest, power = _expm1_parts(_clipped(-x))
    one = of_type(x, 1.0)
    return one / (one + (power * rest + power))


@inlined
def tanh(x: Any) -> Any:
    """Return tanh(x) = e / (e + 2) with e = e^2x - 1, within 4 units in the last place."""
    rest, power = _expm1_parts(_clipped(x + x))
    one = of_type(x, 1.0)
    e = power * rest + (power - one)
    return e / (e + (one + one))


@inlined
def exp(x: Any) -> Any:
    """Return e^x, within 4 units in the last place where it is a normal number; 0 and inf beyond.

    It is the square of e^(x/2), whose exponent is in range wherever that of the result is.
    """
    rest, power = _expm1_parts(_clipped(of_type(x, 0.5) * x))
    root = power * rest + power
    return root * root


@inlined
def expm1(x: Any) -> Any:
    """Return e^x - 1 for x <= 0, within 4 units in the last place."""
    rest, power = _expm1_parts(_clipped(x))
    return power * rest + (power - of_type(x, 1.0))


def _log1p(t: Any) -> Any:
    """Return log(1 + t) for 0 <= t <= 1; overloaded by type below."""


@overload(_log1p, jit_options=INLINED)
def _log1p_by_type(t: Any) -> Any:
    return _log1p_float32 if t == types.float32 else _log1p_float64


# log(1 + t) = 2 (s + s³/3 + s⁵/5 + ...) with s = t / (2 + t) <= 1/3


def _log1p_float32(t: Any) -> Any:
    """The relative error of the sum of eight terms is at most 2e-9."""
    s = t / (of_type(t, 2.0) + t)
    z = s * s
    q = of_type(t, 1 / 15)
    q = q * z + of_type(t, 1 / 13)
    q = q * z + of_type(t, 1 / 11)
    q = q * z + of_type(t, 1 / 9)
    q = q * z + of_type(t, 1 / 7)
    q = q * z + of_type(t, 1 / 5)
    q = q * z + of_type(t, 1 / 3)
    return (s + s) * (q * z) + (s + s)


def _log1p_float64(t: Any) -> Any:
    """The relative error of the sum of seventeen terms is at most 2e-18."""
    s = t / (2.0 + t)
    z = s * s
    q = 1 / 33
    q = q * z + 1 / 31
    q = q * z + 1 / 29
    q = q * z + 1 / 27
    q = q * z + 1 / 25
    q = q * z + 1 / 23
    q = q * z + 1 / 21
    q = q * z + 1 / 19
    q = q * z + 1 / 17
    q = q * z + 1 / 15
    q = q * z + 1 / 13
    q = q * z + 1 / 11
    q = q * z + 1 / 9
    q = q * z + 1 / 7
    q = q * z + 1 / 5
    q = q * z + 1 / 3
    return (s + s) * (q * z) + (s + s)


@inlined
def softplus(x: Any) -> Any:
    """Return log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)."""
    zero = of_type(x, 0.0)
    return maximum(x, zero) + _log1p(exp(-absolute(x)))


@inlined
def log(x: Any) -> Any:
    """Return log x."""
    return math.log(x)


@inlined
def sqrt(x: Any) -> Any:
    """Return the square root of x."""
    return math.sqrt(x)


@inlined
def elu(x: Any, alpha: Any) -> Any:
    """Return x where x > 0, else alpha (e^x - 1)."""
    zero = of_type(x, 0.0)
    return x if x > zero else alpha * expm1(minimum(x, zero))


@inlined
def relu(x: Any) -> Any:
    """Return max(x, 0)."""
    zero = of_type(x, 0.0)
    return zero if x < zero else x


@inlined
def absolute(x: Any) -> Any:
    """Return |x|."""
    return math.fabs(x)


@inlined
def minimum(a: Any, b: Any) -> Any:
    """Return the smaller one; NaN if one is."""
    smaller = a if a < b else b
    return a if a != a else smaller


@inlined
def maximum(a: Any, b: Any) -> Any:
    """Return the larger one; NaN if one is."""
    larger = a if a > b else b
    return a if a != a else larger


@inlined
def clip(x: Any, low: Any, high: Any) -> Any:
    """Return x, or the bound that it is beyond."""
    return minimum(maximum(x, low), high)
