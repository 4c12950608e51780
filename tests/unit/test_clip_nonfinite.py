"""Clipping where the norm is infinite or NaN: an error, or zeros; never NaN everywhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.backend import Backend
from xprnn.optim import Adam, clip_grad_norm

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
BAD = {"inf": np.inf, "nan": np.nan, "the squares overflow": 1e200}


def modules(backend: str = "numpy") -> list[Any]:
    kinds = xprnn.GRU(3, 4, dtype="float64", backend=backend, seed=1), xprnn.Linear(4, 2, seed=2)
    return [kinds[0], kinds[1].to(backend)]


def fill_gradients(pair: list[Any], value: float) -> list[np.ndarray]:
    """Ones, and `value` in one element of the first module's gradients; returns all of them."""
    for module in pair:
        backend = module.backend
        with backend.activate():
            for gradient in module.grads.values():
                gradient[...] = 1.0
            module.grads["weight_hh_l0" if module is pair[0] else "bias"][..., 0] = 2.0
            if module is pair[0]:
                module.grads["weight_hh_l0"][1, 2] = value
    return [module.backend.to_host(module.grads.flat).copy() for module in pair]


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_nonfinite_norm_is_an_error_and_nothing_changes(value: float) -> None:
    pair = modules()
    before = fill_gradients(pair, value)
    norm = "nan" if math.isnan(value) else "inf"
    with pytest.raises(RuntimeError, match=f"norm of the gradients is {norm}; they are unchanged"):
        clip_grad_norm(pair, 1.0)
    for module, previous in zip(pair, before, strict=True):
        np.testing.assert_array_equal(module.grads.flat, previous)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_without_the_error_all_gradients_become_zero(value: float) -> None:
    pair = modules()
    fill_gradients(pair, value)
    norm = clip_grad_norm(pair, 1.0, error_if_nonfinite=False)
    np.testing.assert_equal(float(norm), value if math.isnan(value) else math.inf)
    assert not any(module.grads.flat.any() for module in pair)
    before = [np.array(module.parameters.flat) for module in pair]
    Adam(pair).step()
    for module, previous in zip(pair, before, strict=True):
        np.testing.assert_array_equal(module.parameters.flat, previous)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_clipping_does_not_read_the_device(value: float, fake_cupy: Backend) -> None:
    """The fake CuPy raises where a value is read; only the requested error reads one."""
    pair = modules("fake_cupy")
    before = fill_gradients(pair, value)
    with pytest.raises(RuntimeError, match="they are unchanged"):
        clip_grad_norm(pair, 1.0, error_if_nonfinite=True)
    for module, previous in zip(pair, before, strict=True):
        np.testing.assert_array_equal(fake_cupy.to_host(module.grads.flat), previous)

    def refuse(array: Any) -> Any:
        raise AssertionError("the device was waited for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fake_cupy), "to_host", refuse)
        norm = clip_grad_norm(pair, 1.0)
    np.testing.assert_equal(
        float(fake_cupy.to_host(norm)), value if math.isnan(value) else math.inf
    )
    assert not any(fake_cupy.to_host(module.grads.flat).any() for module in pair)


@pytest.mark.parametrize("error", [None, False])
@pytest.mark.parametrize("value", [5.0, *BAD.values()], ids=["finite", *BAD])
def test_an_infinite_bound_only_computes_the_norm(value: float, error: bool | None) -> None:
    pair = modules()
    before = fill_gradients(pair, value)
    norm = float(clip_grad_norm(pair, np.float32("inf"), error))  # type: ignore[arg-type]
    squares = sum(float(np.sum(previous.astype(float) ** 2)) for previous in before)
    np.testing.assert_allclose(norm, math.sqrt(squares), rtol=1e-13)
    for module, previous in zip(pair, before, strict=True):
        np.testing.assert_array_equal(module.grads.flat, previous)


def test_an_infinite_bound_raises_if_requested() -> None:
    pair = modules()
    fill_gradients(pair, math.inf)
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        clip_grad_norm(pair, math.inf, error_if_nonfinite=True)


@pytest.mark.parametrize("backend", ["numpy", "fake_cupy"])
@pytest.mark.parametrize("error", [None, True, False])
def test_finite_norms_are_clipped_as_usual(
    error: bool | None, backend: str, fake_cupy: Backend
) -> None:
    pair = modules(backend)
    before = fill_gradients(pair, 3.0)
    norm = float(pair[0].backend.to_host(clip_grad_norm(pair, 2.0, error)))
    assert norm == pytest.approx(math.hypot(*np.concatenate(before)), rel=1e-13)
    for module, previous in zip(pair, before, strict=True):
        scale = np.float64(2.0 / (norm + 1e-6)).astype(module.dtype)
        np.testing.assert_array_equal(module.backend.to_host(module.grads.flat), previous * scale)


@pytest.mark.parametrize("max_norm", ["1", None, np.ones(3), True])
def test_max_norm_must_be_a_number(max_norm: Any) -> None:
    with pytest.raises(TypeError, match="max_norm: expected a number"):
        clip_grad_norm(modules(), max_norm)


def test_error_if_nonfinite_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="error_if_nonfinite: expected True or False, got 1"):
        clip_grad_norm(modules(), 1.0, 1)  # type: ignore[arg-type]
