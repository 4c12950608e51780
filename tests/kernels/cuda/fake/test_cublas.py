"""The products of the CUDA backend by value: every type, size and layout; what is refused.

They run on the stand-in for CuPy, whose gemmEx reads memory as cuBLAS does, and on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_cupy.array import StrictArray, StrictModule
from tests.support.fake_cupy.cuda import BFLOAT16, CUDA, LOG
from tests.support.products import (
    COPIED,
    LAYOUTS,
    OUTPUTS,
    PLACES,
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

IEEE = CudaModule(StrictModule(), "ieee")


@pytest.fixture(params=PLACES)
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
def strided(draw: Any, rows: int, columns: int, dtype: str) -> StrictArray:
    """A matrix of small whole numbers, which every dtype multiplies exactly, cut from a larger."""
    cuts, shape = [], []
    for size in (rows, columns):
        step, before, after = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.booleans())
        cuts.append(slice(before, before + size * step, step))
        shape.append(before + size * step + after)
    numbers = np.random.default_rng(draw(st.integers(0, 99))).integers(-3, 4, shape)
    matrix = numbers.astype(numpy_type(dtype), order=draw(st.sampled_from("CF")))[tuple(cuts)]
    for axis in (0, 1):
        if draw(st.integers(0, 9)) == 0:
            matrix = np.flip(matrix, axis)
    return StrictArray(matrix)


@settings(deadline=None)  # of a busy machine
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
    numbers = [array._inner.astype(np.float64) for array in (a, b, out)]
    expected = numbers[0] @ numbers[1] + (numbers[2] if add else 0.0)
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
    found = CudaModule(any_backend.xp, "ieee").matmul(a, a.T)
    assert found.dtype == a.dtype and found.shape == (2, 2)
    assert (any_backend.to_host(found) == 12.0).all()


@pytest.mark.parametrize("add", [False, True], ids=["=", "+="])
@pytest.mark.parametrize("size", tuple(itertools.product((0, 2), repeat=3)), ids=str)
def test_empty_products(size: tuple[int, int, int], add: bool, any_backend: Backend) -> None:
    m, k, n = size
    xp = CudaModule(any_backend.xp, "ieee")
    base = any_backend.from_host(np.full((m, n + 2), 7.0))
    out = base[:, 1 : 1 + n]
    a, b = (any_backend.from_host(np.ones(shape)) for shape in ((m, k), (k, n)))
    assert (xp.add_matmul if add else xp.matmul)(a, b, out) is out
    found = any_backend.to_host(base)
    assert (found[:, 1 : 1 + n] == k + 7.0 * add).all()
    assert (found[:, 0] == 7.0).all() and (found[:, -1] == 7.0).all()


# -- what is refused


REFUSED: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
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


def strided_zeros(shape: tuple[int, int], strides: tuple[int, int]) -> StrictArray:
    """An array of these strides, whatever they are; nothing is read from it."""
    return StrictArray(np.lib.stride_tricks.as_strided(np.zeros(64, "float32"), shape, strides))


@pytest.mark.parametrize("name", ["matmul", "add_matmul"])
@pytest.mark.parametrize("arrays", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(arrays: Callable[[], Any], name: str) -> None:
    a, b, out = arrays()
    LOG.clear()
    with pytest.raises(ValueError, match=rf"^{name}: expected CuPy arrays a \(m, k\)") as caught:
        getattr(IEEE, name)(a, b, out)
    for array in (a, b, out):
        assert f"{array.shape} {array.dtype} with strides {array.strides}" in str(caught.value)
    assert not LOG.launches


def test_nothing_is_multiplied_in_a_captured_stream() -> None:
    stream = CUDA.Stream()
    out = zeros(2, 2)
    with stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="during stream capture"):
            IEEE.matmul(zeros(2, 2), zeros(2, 2), out=out)
    IEEE.matmul(zeros(2, 2), zeros(2, 2), out=out)


# -- memory, and the rest of CuPy


@pytest.mark.parametrize("a", LAYOUTS | COPIED)
def test_memory_is_taken_for_copies_only(a: str) -> None:
    base = StrictArray(draw(np.random.default_rng(0), 4, 6, "float32", a))
    matrix, b, out = cut(base, 4, 6, a), zeros(5, 6).T, zeros(4, 8)[:, 2:7]
    LOG.clear()
    IEEE.matmul(matrix, b, out=out)
    IEEE.add_matmul(matrix, b, out)
    copies = 2 * (a in COPIED)
    assert (LOG.products, LOG.others, LOG.memory) == (2, copies, [4 * 6 * 4] * copies)
    IEEE.matmul(matrix, b)
    assert LOG.memory[copies:] == [4 * 5 * 4, *[4 * 6 * 4] * (a in COPIED)]


def test_everything_else_is_cupys() -> None:
    assert IEEE.tanh(zeros(2))._inner.tolist() == [0.0, 0.0]
    assert IEEE.ndarray is StrictArray
    with pytest.raises(AttributeError, match="nonexistent"):
        IEEE.nonexistent  # noqa: B018
