"""A stepper equals the layer on a sequence, for every cell, dtype and number of layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import LAYERS, Case, draw, move
from tests.support.control_bits import callers_environment
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.implementations import SelectKernels
from tests.support.streaming import MATRIX, assert_streams, make, packed, states, stream
from xprnn.backend import Backend
from xprnn.engine import loop, replay

# on "numba": tests/kernels/numba/test_stepper.py
pytestmark = pytest.mark.usefixtures("reference")
STACKS = [Case(cell, layers=3) for cell in LAYERS]


def require_dtype(case: Case) -> None:
    if case.compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")


# -- by value


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case}-N{case.N}")
def test_on_numpy(case: Case, implementation: str) -> None:
    require_dtype(case)
    assert_streams(case, make(case))


@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case}-N{case.N}")
def test_on_the_fake_cupy(case: Case, fake_cupy: Backend) -> None:
    require_dtype(case)
    assert_streams(case, make(case, fake_cupy.name))
    assert LOG.products and not LOG.kernels, "the reference code runs"


@needs_compiler
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case}-N{case.N}")
def test_on_the_fake_cupy_with_pointwise_kernels(
    case: Case, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    require_dtype(case)
    select_kernels("pointwise")
    assert_streams(case, make(case, fake_cupy.name))
    assert LOG.kernels


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cupy"], indirect=True)
@pytest.mark.parametrize("case", MATRIX, ids=lambda case: f"{case}-N{case.N}")
def test_on_a_gpu(case: Case, backend: Backend, implementation: str) -> None:
    require_dtype(case)
    assert_streams(case, make(case, backend.name))


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_every_captured_call_is_needed(case: Case) -> None:
    """Without any one of them the results differ, or large numbers overflow."""
    layer, large, x = make(case), make(case), draw(case).x
    with large.writable() as flat:
        flat *= 1e5

    def streamed(layer: Any, left_out: int | None = None) -> np.ndarray:
        stepper = layer.stepper(case.N)
        if left_out is not None:
            for calls in stepper._steps._calls:
                del calls[left_out]
        if layer is not large:
            return stream(stepper, x)
        with callers_environment(), np.errstate(all="ignore", over="raise"):
            return stream(stepper, x)

    expected = streamed(layer)
    for k, call in enumerate(layer.stepper(case.N)._steps._calls[0]):
        if call.func is np.minimum:  # keeps the logistic function's exponential in bounds
            streamed(large)
            with pytest.raises(FloatingPointError):
                streamed(large, k)
        else:
            assert not np.allclose(streamed(layer, k), expected, rtol=1e-9, atol=0), k


def test_calls_that_cannot_be_captured_are_refused() -> None:
    def branching(xp: Any, a: Any) -> None:
        if a.sum() > 0:
            a += 1.0

    def copying(xp: Any, a: Any) -> None:
        chosen = a[[0, 1]]
        chosen += 1.0

    with pytest.raises(AttributeError, match="sum"):
        replay.capture(branching, np.ones(3))
    with pytest.raises(TypeError, match="expected a view, got a copy"):
        replay.capture(copying, np.ones(3))


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_does_not_change_the_shape_of_x(batch_first: bool) -> None:
    layer = xprnn.GRU(3, 5, batch_first=batch_first, dtype="float64", seed=0)
    x = draw(Case("gru")).x
    output, _ = layer(x.transpose(1, 0, 2) if batch_first else x)
    y = stream(layer.stepper(4), x)
    np.testing.assert_allclose(y.transpose(1, 0, 2) if batch_first else y, output, rtol=1e-12)


def test_nothing_is_dropped_or_recorded_in_train_mode() -> None:
    layer = xprnn.GRU(3, 5, 2, dropout=0.5, dtype="float64", seed=0)
    x = draw(Case("gru")).x
    output, _ = layer(x)
    layer.train()
    np.testing.assert_allclose(stream(layer.stepper(4), x), output, rtol=1e-12)
    assert not layer._records and layer._calls == 0


# -- from layer to stepper and back


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_a_sequence_continues_in_a_stepper_and_back_in_the_layer(case: Case) -> None:
    layer, problem = make(case), draw(case)
    expected, end = layer(problem.x, packed(problem.initial))
    first, middle = layer(problem.x[:2], packed(problem.initial))
    stepper = layer.stepper(case.N)
    stepper.load(middle)
    second = stream(stepper, problem.x[2:4])
    third, final = layer(problem.x[4:], stepper.state())
    np.testing.assert_allclose(np.concatenate([first, second, third]), expected, rtol=1e-12)
    for one, other in zip(states(final), states(end), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("compute_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_loaded_state_keeps_its_bits(
    cell: str, compute_dtype: str | None, fake_cupy: Backend
) -> None:
    case = Case(cell, layers=2, dtype="float32", compute_dtype=compute_dtype)
    require_dtype(case)
    for layer in (make(case), make(case, fake_cupy.name)):
        one, other = layer.stepper(case.N), layer.stepper(case.N)
        stream(one, draw(case).x)
        other.load(one.state())
        x = draw(replace(case, T=2)).x
        np.testing.assert_array_equal(stream(one, x), stream(other, x))
        for left, right in zip(states(one.state()), states(other.state()), strict=True):
            assert left.shape == (2, 4, 5) and left.dtype == np.float32
            assert left.flags.c_contiguous
            np.testing.assert_array_equal(*map(layer.backend.to_host, (left, right)))


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda stepper: pickle.loads(pickle.dumps(stepper)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_copy_continues_independently(cell: str, way: str) -> None:
    case = Case(cell, layers=2)
    stepper, x = make(case).stepper(case.N), draw(case).x
    stream(stepper, x[:3])
    other = WAYS[way](stepper)
    continued = stream(other, x[3:])
    np.testing.assert_array_equal(stream(stepper, x[3:]), continued)


def test_either_state_of_an_lstm_may_be_none() -> None:
    stepper = xprnn.LSTM(3, 5, dtype="float64", seed=0).stepper(2)
    x = np.ones((2, 3))
    stepper.step(x)
    h, c = stepper.state()
    zeros = np.zeros_like(h)
    for state, full in (((h, None), (h, zeros)), ((None, c), (zeros, c))):
        stepper.load(state)
        with_none = stepper.step(x)
        stepper.load(full)
        np.testing.assert_array_equal(stepper.step(x), with_none)
    with pytest.raises(TypeError, match="state: expected h and c, got None"):
        stepper.load(None)


# -- launches, and the selected implementation


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernels", ["reference", pytest.param("pointwise", marks=needs_compiler)])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_makes_the_launches_that_explain_states(
    cell: str, kernels: str, bias: bool, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels(kernels)
    case = Case(cell, layers=3, bias=bias, dtype="float32")
    layer = make(case, fake_cupy.name)
    stepper, x = layer.stepper(case.N), move(fake_cupy, draw(case).x[0])
    stepper.step(x)  # copies the parameters
    LOG.clear()
    stepper.step(x)
    every = LOG.launches
    LOG.clear()
    stepper.step(x, rows=[0, 2])
    more = LOG.launches - every
    assert f"a step takes {every} launches, and {more} more where streams wait" in stepper.explain()
    if kernels == "pointwise":
        each = 1 + bias + {"gru_reset_before": 4}.get(cell, 2)
        assert every == 3 * each + 2


def test_explain_names_the_layer_and_the_implementation(fake_cupy: Backend) -> None:
    lines = xprnn.LSTM(3, 4, 2, compute_dtype="float16", seed=0).stepper(7).explain().splitlines()
    assert lines[0] == "LSTM(3, 4) on numpy, float32 with float16, L=2 N=7, one step: reference"
    assert "recorded" not in "".join(lines)
    assert "launches of the plain code in low precision are not counted" in (
        xprnn.LSTM(3, 4, backend="fake_cupy", compute_dtype="float16").stepper(1).explain()
    )


def test_a_missing_forced_kernel_raises(select_kernels: SelectKernels) -> None:
    select_kernels("pointwise")
    with pytest.raises(xprnn.KernelUnavailableError, match=r"pointwise\W*: .*feature-major"):
        xprnn.GRU(3, 4).stepper(1)


def test_a_forced_kernel_that_does_not_fit_raises(
    fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels("sequence")
    with pytest.raises(xprnn.KernelUnavailableError, match=r"needs compute capability 8\.0"):
        xprnn.GRU(3, 4, backend=fake_cupy.name).stepper(1)


def test_a_step_uses_the_arithmetic_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sign in `loop.layer_step` reaches the stepper, and `assert_streams` detects it."""
    original = loop.layer_step

    def wrong(xp: Any, cell: Any, weights: Any, bias: Any, x: Any, buffers: Any) -> None:
        original(xp, cell, weights, bias, x, buffers)
        h = buffers.next_states[0]
        h *= -1.0

    monkeypatch.setattr(loop, "layer_step", wrong)
    case = Case("gru", layers=2)
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_streams(case, make(case))
