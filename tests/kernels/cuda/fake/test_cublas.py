"""Products of the CUDA backend in every dtype, size and layout, and the operands that are rejected.

They run on the fake CuPy, whose gemmEx reads memory as cuBLAS does, and on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_cupy.array import FakeArray, FakeModule
from tests.support.fake_cupy.cuda import BFLOAT16, CUDA, LOG
from tests.support.products import (
    BACKENDS,
    COPIED,
    LAYOUTS,
    OUTPUTS,
    RESULTS,
    SIZES,
    assert_product,
    cut,
    draw,
    numpy_type,
    opened,
    zeros,
)
from xprnn.backend import Backend
from xprnn.backend.cublas import CudaModule

IEEE = CudaModule(FakeModule(), "ieee")


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with opened(request.param) as backend:
        yield backend


@pytest.mark.parametrize("add", [False, True], ids=["=", "+="])
@pytest.mark.parametrize("types", RESULTS, ids=RESULTS.values())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_and_type(
    size: tuple[int, int, int], types: tuple[str, str], add: bool, any_backend: Backend
) -> None:
    for out in OUTPUTS:
        assert_product(any_backend, size, types, ("by rows", "by columns", out), add)


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize("types", RESULTS, ids=RESULTS.values())
def test_every_layout(types: tuple[str, str], out: str, any_backend: Backend) -> None:
    for a, b in itertools.product(LAYOUTS | COPIED, LAYOUTS | COPIED):
        for size in ((4, 7, 5), (1, 5, 3), (3, 1, 2), (3, 4, 1)):
            assert_product(any_backend, size, types, (a, b, out), add=False)


@st.composite
def strided(draw: Any, rows: int, columns: int, dtype: str) -> FakeArray:
    """A view of a larger matrix, of small integers, whose products are exact in every dtype."""
    cuts, shape = [], []
    for size in (rows, columns):
        step, before, after = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.booleans())
        cuts.append(slice(before, before + size * step, step))
        shape.append(before + size * step + after)
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(-3, 4, shape)
    matrix = values.astype(numpy_type(dtype), order=draw(st.sampled_from("CF")))[tuple(cuts)]
    for axis in (0, 1):
        if draw(st.integers(0, 9)) == 0:
            matrix = np.flip(matrix, axis)
    return FakeArray(matrix)


@settings(deadline=None)  # the machine may be busy
@given(
    st.data(),
    st.sampled_from([t for t in RESULTS if BFLOAT16 or t[0] != "bfloat16"]),
    st.booleans(),
)
def test_any_shape_and_stride(data: Any, types: tuple[str, str], add: bool) -> None:
    m, k, n = (data.draw(st.integers(0, 5)) for _ in range(3))
    a = data.draw(strided(m, k, types[0]))
    b = data.draw(strided(k, n, types[0]))
    out = data.draw(strided(m, n, types[1]))
    values = [array._inner.astype(np.float64) for array in (a, b, out)]
    expected = values[0] @ values[1] + (values[2] if add else 0.0)
    call = IEEE.add_matmul if add else IEEE.matmul
    contiguous = out.strides[1] == out.dtype.itemsize or n == 1
    distance = out.strides[0] // out.dtype.itemsize
    if m and n and k and not (contiguous and (distance >= n or m == 1)):
        with pytest.raises(ValueError, match="with contiguous rows"):
            call(a, b, out)
        return
    assert call(a, b, out) is out
    np.testing.assert_array_equal(out._inner.astype(np.float64), expected)


@pytest.mark.parametrize("types", RESULTS, ids=RESULTS.values())
def test_a_new_result_has_the_type_of_the_factors(
    types: tuple[str, str], any_backend: Backend
) -> None:
    a = any_backend.from_host(np.full((2, 3), 2.0).astype(numpy_type(types[0])))
    actual = CudaModule(any_backend.xp, "ieee").matmul(a, a.T)
    assert actual.dtype == a.dtype and actual.shape == (2, 2)
    assert (any_backend.to_host(actual) == 12.0).all()


@pytest.mark.parametrize("add", [False, True], ids=["=", "+="])
@pytest.mark.parametrize("size", tuple(itertools.product((0, 2), repeat=3)), ids=str)
def test_empty_products(size: tuple[int, int, int], add: bool, any_backend: Backend) -> None:
    m, k, n = size
    xp = CudaModule(any_backend.xp, "ieee")
    base = any_backend.from_host(np.full((m, n + 2), 7.0))
    out = base[:, 1 : 1 + n]
    a, b = (any_backend.from_host(np.ones(shape)) for shape in ((m, k), (k, n)))
    assert (xp.add_matmul if add else xp.matmul)(a, b, out) is out
    actual = any_backend.to_host(base)
    assert (actual[:, 1 : 1 + n] == k + 7.0 * add).all()
    assert (actual[:, 0] == 7.0).all() and (actual[:, -1] == 7.0).all()


# -- rejected operands


REJECTED: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "k differs": lambda: (zeros(2, 3), zeros(4, 5), zeros(2, 5)),
    "m differs": lambda: (zeros(2, 3), zeros(3, 5), zeros(3, 5)),
    "n differs": lambda: (zeros(2, 3), zeros(3, 5), zeros(2, 4)),
    "out transposed": lambda: (zeros(2, 3), zeros(3, 5), zeros(5, 2)),
    "a has one dimension": lambda: (zeros(3), zeros(3, 5), zeros(5)),
    "b has one dimension": lambda: (zeros(2, 3), zeros(3), zeros(2)),
    "out has one dimension": lambda: (zeros(1, 3), zeros(3, 5), zeros(5)),
    "three dimensions": lambda: (zeros(2, 2, 3), zeros(2, 3, 5), zeros(2, 2, 5)),
    "a and b differ": lambda: (zeros(2, 3), zeros(3, 5, dtype="float64"), zeros(2, 5)),
    "a wide result": lambda: (zeros(2, 3), zeros(3, 5), zeros(2, 5, dtype="float64")),
    "a narrow result": lambda: (zeros(2, 3), zeros(3, 5), zeros(2, 5, dtype="float16")),
    "integers": lambda: (
        *(zeros(2, 3, dtype="int32"), zeros(3, 5, dtype="int32")),
        zeros(2, 5, dtype="int32"),
    ),
    "columns contiguous": lambda: (zeros(2, 3), zeros(3, 5), zeros(5, 2).T),
    "every other column": lambda: (zeros(2, 3), zeros(3, 5), zeros(2, 10)[:, ::2]),
    "upside down": lambda: (zeros(2, 3), zeros(3, 5), zeros(2, 5)[::-1]),
    "one row over the other": lambda: (zeros(2, 3), zeros(3, 5), strided_zeros((2, 5), (8, 4))),
    "rows between elements": lambda: (zeros(2, 3), zeros(3, 5), strided_zeros((2, 5), (22, 4))),
    "NumPy's a": lambda: (np.zeros((2, 3), "float32"), zeros(3, 5), zeros(2, 5)),
    "NumPy's b": lambda: (zeros(2, 3), np.zeros((3, 5), "float32"), zeros(2, 5)),
    "NumPy's out": lambda: (zeros(2, 3), zeros(3, 5), np.zeros((2, 5), "float32")),
    "k over 31 bits": lambda: (
        *(strided_zeros((1, 2**31), (4, 4)), strided_zeros((2**31, 1), (4, 4))),
        zeros(1, 1),
    ),
    "n over 31 bits": lambda: (
        *(zeros(1, 1), strided_zeros((1, 2**31), (4, 4))),
        strided_zeros((1, 2**31), (4, 4)),
    ),
    "rows far apart": lambda: (strided_zeros((2, 3), (2**33, 4)), zeros(3, 5), zeros(2, 5)),
}


def strided_zeros(shape: tuple[int, int], strides: tuple[int, int]) -> FakeArray:
    """An array with arbitrary strides; nothing is read from it."""
    return FakeArray(np.lib.stride_tricks.as_strided(np.zeros(64, "float32"), shape, strides))


@pytest.mark.parametrize("name", ["matmul", "add_matmul"])
@pytest.mark.parametrize("arrays", REJECTED.values(), ids=REJECTED.keys())
def test_invalid_operands_are_rejected(arrays: Callable[[], Any], name: str) -> None:
    a, b, out = arrays()
    LOG.clear()
    with pytest.raises(ValueError, match=rf"^{name}: expected CuPy arrays a \(m, k\)") as caught:
        getattr(IEEE, name)(a, b, out)
    for array in (a, b, out):
        assert f"{array.shape} {array.dtype} with strides {array.strides}" in str(caught.value)
    assert not LOG.launches


def test_products_in_a_captured_stream_are_rejected() -> None:
    stream = CUDA.Stream()
    out = zeros(2, 2)
    with stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="during stream capture"):
            IEEE.matmul(zeros(2, 2), zeros(2, 2), out=out)
    IEEE.matmul(zeros(2, 2), zeros(2, 2), out=out)


# -- memory, and other names of CuPy


@pytest.mark.parametrize("a", LAYOUTS | COPIED)
def test_memory_is_allocated_only_for_copies(a: str) -> None:
    base = FakeArray(draw(np.random.default_rng(0), 4, 6, "float32", a))
    matrix, b, out = cut(base, 4, 6, a), zeros(5, 6).T, zeros(4, 8)[:, 2:7]
    LOG.clear()
    IEEE.matmul(matrix, b, out=out)
    IEEE.add_matmul(matrix, b, out)
    copies = 2 * (a in COPIED)
    assert (LOG.products, LOG.others, LOG.memory) == (2, copies, [4 * 6 * 4] * copies)
    IEEE.matmul(matrix, b)
    assert LOG.memory[copies:] == [4 * 5 * 4, *[4 * 6 * 4] * (a in COPIED)]


def test_other_names_come_from_cupy() -> None:
    assert IEEE.tanh(zeros(2))._inner.tolist() == [0.0, 0.0]
    assert IEEE.ndarray is FakeArray
    with pytest.raises(AttributeError, match="nonexistent"):
        IEEE.nonexistent  # noqa: B018
