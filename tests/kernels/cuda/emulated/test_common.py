"""`common.h`, which all kernels include, and the emulation of elementwise kernels on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import HostElementwiseKernel, needs_compiler, with_fault
from tests.support.pointwise_cases import dtype_of, needs_dtype
from xprnn.cells.numerics import sigmoid
from xprnn.kernels.cuda.pointwise import source

pytestmark = needs_compiler

COMMON = source("rnn.h")
MAX_EXPONENT = {"float32": 88.0, "float64": 709.0}  # the clamp of the exponent
Elementwise = type[HostElementwiseKernel]


def host_kernel(
    reads: str, writes: str, operation: str, elementwise: Elementwise = HostElementwiseKernel
) -> Any:
    return elementwise(reads, writes, operation, "kernel", preamble=COMMON, no_return=True)


def check_sigmoid(dtype: str, elementwise: Elementwise = HostElementwiseKernel) -> None:
    """σ to six units in the last place; beyond the clamp and for NaN equal to `numerics.sigmoid`.

    CuPy compiles with subnormal float32 numbers flushed to zero.
    """
    kernel = host_kernel("raw A a", "raw A y", "y[i] = xprnn::sigmoid(a[i])", elementwise)
    limits, flushed = np.finfo(dtype), np.finfo(dtype).tiny if dtype == "float32" else 0.0
    a = np.linspace(-MAX_EXPONENT[dtype], MAX_EXPONENT[dtype], 4001).astype(dtype)
    actual, exact = np.empty_like(a), 1 / (1 + np.exp(-a.astype(np.longdouble)))
    kernel(a, actual, size=a.size)
    normal = exact >= 2 * limits.tiny
    assert normal.sum() > 3900
    assert (abs(actual - exact)[normal] <= 6 * limits.eps * exact[normal]).all()

    beyond = np.array([-MAX_EXPONENT[dtype], -1e3, -np.inf, np.inf, np.nan], dtype)
    actual = np.empty_like(beyond)
    kernel(beyond, actual, size=5)
    sigmoid(np, beyond)
    np.testing.assert_allclose(actual, beyond, rtol=6 * limits.eps, atol=flushed)
    assert actual[0] == actual[1] == actual[2]


@pytest.mark.parametrize("dtype", MAX_EXPONENT)
def test_sigmoid_is_as_accurate_near_zero_as_near_one(dtype: str) -> None:
    check_sigmoid(dtype)


@pytest.mark.parametrize(
    ("dtype", "old", "new"),
    [
        ("float32", "A exponent = -a;", "A exponent = a;"),
        ("float32", "A(1) + exp_of", "A(1.00001) + exp_of"),
        ("float32", "A(1) / (A(1) + exp_of(exponent))", "(A(1) + tanh_of(a / 2)) / 2"),
        ("float32", "return 88.0f;", "return 80.0f;"),
        ("float64", "return 709.0;", "return 708.0;"),
        ("float64", "exponent > largest_exponent(a)", "!(exponent <= largest_exponent(a))"),
        ("float64", "exponent = largest_exponent(a)", "exponent += 0"),
    ],
)
def test_a_fault_in_the_sigmoid_is_detected(dtype: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        check_sigmoid(dtype, with_fault(old, new))


def gate_offsets(
    first: int, H: int, blocks: int, elementwise: Elementwise = HostElementwiseKernel
) -> np.ndarray:
    """Offsets of five elements of the state, from `first` on, in an array of several gates."""
    at = np.empty(5, np.int64)
    operation = "at[i] = xprnn::gate_offset(first + i, H, blocks)"
    kernel = host_kernel(
        "int64 first, int32 H, int32 blocks", "raw int64 at", operation, elementwise
    )
    kernel(first, H, blocks, at, size=5)
    return at


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**32 - 3, 2**40 + 1])
@pytest.mark.parametrize(("H", "blocks"), [(1, 3), (7, 4), (1024, 3), (2**20 + 1, 4), (12, 1)])
def test_gate_offsets_in_arrays_of_any_size(first: int, H: int, blocks: int) -> None:
    element = np.arange(first, first + 5)
    expected = element // H * blocks * H + element % H
    np.testing.assert_array_equal(gate_offsets(first, H, blocks), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("i >> 31 ?", "i >> 32 ?"),
        ("i >> 31 ? i / H :", ""),
        ("(gates - 1)", "gates"),
        ("(gates - 1) * H", "(gates - 1) * static_cast<int>(i)"),
        ("typedef long long Index", "typedef int Index"),
    ],
)
def test_a_fault_in_the_offset_is_detected(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        for first in (2**31 - 3, 2**40 + 1):
            element = np.arange(first, first + 5)
            actual = gate_offsets(first, 7, 4, with_fault(old, new))
            np.testing.assert_array_equal(actual, element // 7 * 28 + element % 7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types_on_the_host_round_as_in_numpy(dtype: str) -> None:
    needs_dtype(dtype)
    bits = np.random.default_rng(3).integers(0, 2**32, 300_000, dtype=np.uint32)
    ties = np.arange(2**16, dtype=np.uint32) << 16 | 0x8000  # between two bfloat16
    values = np.concatenate([bits, ties, ties - 1, ties + 1]).view(np.float32)
    rounded, restored = np.empty(values.size, dtype_of(dtype)), np.empty_like(values)
    host_kernel("raw A a", "raw C y", "y[i] = static_cast<C>(a[i])")(
        values, rounded, size=values.size
    )
    host_kernel("raw C a", "raw A y", "y[i] = static_cast<A>(a[i])")(
        rounded, restored, size=values.size
    )
    with np.errstate(all="ignore"):
        expected = values.astype(dtype_of(dtype))
    np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))
    np.testing.assert_array_equal(restored, expected.astype(np.float32))


ARRAY = np.ones((2, 3), np.float32)
READ_ONLY = ARRAY.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((3, ARRAY, ARRAY.astype(np.float64)), TypeError, "y: Type is mismatched"),
        ((3, ARRAY), TypeError, "expected 3 arguments: 2"),
        ((3, ARRAY[:, :2], ARRAY), ValueError, r"x: expected a C-contiguous array"),
        ((3, ARRAY, READ_ONLY), ValueError, "y: the array is read-only"),
        ((3.0, ARRAY, ARRAY), TypeError, "H: expected an integer"),
        ((3, None, ARRAY), TypeError, "x: expected an array"),
    ],
)
def test_invalid_kernel_arguments_are_rejected(
    args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    kernel = host_kernel("int32 H, raw C x", "raw C y", "y[i] = x[i] * H")
    with pytest.raises(error, match=message):
        kernel(*args, size=6)


def test_outputs_must_be_raw_and_passed_by_the_caller() -> None:
    head = ("raw C x", "raw C y", "y[i] = x[i]", "copy")
    with pytest.raises(ValueError, match="no_return=True"):
        HostElementwiseKernel(*head)
    with pytest.raises(ValueError, match="every output to be raw"):
        HostElementwiseKernel("raw C x", "C y", "y = x[i]", "copy", no_return=True)
