"""`layer.xp` and `layer.asarray`: the same program on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.backend import Backend, backend_of

MODULES = {
    "layer": lambda **place: xprnn.GRU(3, 4, seed=0, **place),
    "cell": lambda **place: xprnn.LSTMCell(3, 4, seed=0, **place),
    "linear": lambda **place: xprnn.Linear(3, 4, seed=0, **place),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_calls_accept_the_result(name: str, dtype: str, fake_cupy: Backend) -> None:
    """A nested list and a host array of another dtype, which calls reject as they are."""
    module = MODULES[name](backend="fake_cupy", dtype=dtype)
    values = np.arange(6.0).reshape(1, 2, 3) if name == "layer" else np.arange(6.0).reshape(2, 3)
    with pytest.raises(TypeError, match="fake_cupy"):
        module(values)
    for data in (values, values.tolist(), values.astype("float16")):
        x = module.asarray(data)
        assert x.dtype == dtype
        assert backend_of(x) is module.backend
        np.testing.assert_array_equal(xprnn.to_numpy(x), values)
        module(x)


def test_the_array_module_is_that_of_the_backend(fake_cupy: Backend) -> None:
    layer = xprnn.GRU(3, 4, backend="numpy", seed=0)
    assert layer.xp is np
    layer.to("fake_cupy")
    assert layer.xp is fake_cupy.xp
    output, _ = layer(layer.xp.zeros((2, 1, 3), layer.dtype))
    assert backend_of(layer.xp.exp(output)) is fake_cupy


@pytest.mark.parametrize("values", [[2, 0], [True, False], [1j]])
def test_other_values_keep_their_dtype(values: list[Any]) -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    assert layer.asarray(values).dtype == np.asarray(values).dtype


def test_a_dtype_is_kept_that_is_stated() -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    assert layer.asarray([1.0], "float64").dtype == np.float64
    assert layer.asarray([1], layer.dtype).dtype == np.float32


def test_nothing_is_copied_without_need() -> None:
    layer, x = xprnn.GRU(3, 4, seed=0), np.zeros((2, 1, 3), np.float32)
    assert layer.asarray(x) is x


def test_bfloat16_becomes_the_dtype_of_the_module() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = xprnn.GRU(3, 4, seed=0)
    x = layer.asarray(np.ones((2, 1, 3), ml_dtypes.bfloat16))
    assert x.dtype == np.float32
    layer(x)


def test_a_mask_is_rejected() -> None:
    with pytest.raises(TypeError, match="without a mask"):
        xprnn.GRU(3, 4, seed=0).asarray(np.ma.masked_array([1.0], [True]))
