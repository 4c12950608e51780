"""The pointwise kernels on a GPU, launched by CuPy: the host's tests with the same bounds.

On the host exp and tanh differ, and there are neither threads nor device memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.cuda.emulated.test_common import check_sigmoid, gate_offsets
from tests.kernels.cuda.emulated.test_pointwise_values import SIZES, each_dtype, each_kernel, scaled
from tests.support.pointwise_cases import draw, excess, needs_dtype, run_fused, with_specials
from xprnn.backend import Backend
from xprnn.kernels.cuda.pointwise import PointwiseKernel

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]


@pytest.fixture
def elementwise(backend: Backend) -> Any:
    """CuPy's ElementwiseKernel on NumPy arrays, which are copied to the device and back."""

    class OnDevice:
        def __init__(self, *args: str, **kwargs: Any) -> None:
            self._kernel = backend.xp.ElementwiseKernel(*args, **kwargs)

        def __call__(self, *args: Any, size: int) -> None:
            moved = [backend.from_host(a) if isinstance(a, np.ndarray) else a for a in args]
            self._kernel(*moved, size=size)
            for array, device_array in zip(args, moved, strict=True):
                if isinstance(array, np.ndarray):
                    array[...] = backend.to_host(device_array)

    return OnDevice


@each_dtype
@each_kernel
def test_a_kernel_equals_the_pointwise_op(
    kernel: PointwiseKernel, dtype: str, elementwise: Any
) -> None:
    needs_dtype(dtype)
    for N, H in (*SIZES, (33, 129), (300, 1025)):
        ratio = excess(kernel, draw(kernel, dtype, N, H), elementwise)
        assert ratio <= 1, f"N={N} H={H}: {ratio:.2f} of what rounding explains"


@each_dtype
@each_kernel
def test_large_numbers_infinity_and_nan(
    kernel: PointwiseKernel, dtype: str, elementwise: Any
) -> None:
    needs_dtype(dtype)
    for arrays in (scaled(draw(kernel, dtype, 9, 33), 200.0), with_specials(kernel, dtype)):
        assert excess(kernel, arrays, elementwise) <= 1


@each_dtype
@each_kernel
def test_two_launches_give_the_same_bits(
    kernel: PointwiseKernel, dtype: str, elementwise: Any
) -> None:
    needs_dtype(dtype)
    arrays = draw(kernel, dtype, 33, 129)
    one, other = (run_fused(kernel, arrays, elementwise) for _ in range(2))
    assert all(one[name].tobytes() == other[name].tobytes() for name in arrays)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sigmoid(dtype: str, elementwise: Any) -> None:
    check_sigmoid(dtype, elementwise)


@pytest.mark.parametrize("first", [0, 2**31 - 3, 2**40 + 1])
def test_gate_offsets_in_arrays_of_any_size(first: int, elementwise: Any) -> None:
    element = np.arange(first, first + 5)
    actual = gate_offsets(first, 7, 4, elementwise)
    np.testing.assert_array_equal(actual, element // 7 * 28 + element % 7)
