"""Vanishing gradients: zero within the stated bound, and the same with any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.control_bits import callers_environment, needs_flushing, subnormals
from tests.support.numba_cases import SEQUENCE, forced, needs_numba, several
from tests.support.public_calls import slots_of
from tests.support.targets import LAYERS, arrays, assert_same
from tests.support.tolerances import assert_close

WAYS = [
    *(("reference", cell) for cell in LAYERS),
    *(pytest.param("sequence", cell, marks=needs_numba) for cell in SEQUENCE),
    pytest.param("pointwise", "gru_reset_before", marks=needs_numba),
]


def vanishing(cell: str, dtype: str = "float32", T: int = 400, N: int = 3, H: int = 8) -> Any:
    """A layer, its x, and a gradient of the last state only."""
    kind, options = LAYERS[cell]
    layer = kind(5, H, seed=0, dtype=dtype, **options).train()
    x = np.random.default_rng(0).standard_normal((T, N, 5)).astype(dtype)
    dh_n = np.ones((1, N, H), dtype)
    return layer, x, (dh_n, None) if cell == "lstm" else dh_n


def gradients(layer: Any, x: np.ndarray, dhx: Any) -> list[np.ndarray]:
    """dx, and the gradients of the states and of the parameters."""
    layer.zero_grad()
    layer(x)
    return [*arrays(layer.backward(None, dhx)), *(grad.copy() for grad in layer.grads.values())]


def in_the_callers_environment(layer: Any, x: np.ndarray, dhx: Any) -> list[np.ndarray]:
    with callers_environment():
        return gradients(layer, x, dhx)


@needs_flushing
@pytest.mark.parametrize(("kernels", "cell"), WAYS)
def test_a_vanished_gradient_is_zero_within_the_bound(kernels: str, cell: str) -> None:
    layer, x, dhx = vanishing(cell)
    actual = forced(kernels, gradients, layer, x, dhx)
    exact = forced(kernels, in_the_callers_environment, layer, x, dhx)
    assert subnormals(exact) > 0
    assert subnormals(actual) == 0
    assert not actual[0][0].any() and actual[0][-1].all()

    # sums of G*H terms at each of T steps, and over the N rows of all steps
    terms = len(x) * max(len(layer.parameters["weight_hh_l0"]), x.shape[1])
    factor = max(1.0, float(np.abs(x).max()), float(np.abs(layer.parameters.flat).max()))
    bound = terms * float(np.finfo(np.float32).tiny) * factor
    for one, other in zip(actual, exact, strict=True):
        error = np.abs(one.astype(np.float64) - other.astype(np.float64))
        assert (error[np.abs(other) < bound] <= bound).all()
        np.testing.assert_array_equal(one[np.abs(other) >= 1e-20], other[np.abs(other) >= 1e-20])
    assert any((one != other).any() for one, other in zip(actual, exact, strict=True))


@needs_flushing
def test_a_vanished_gradient_in_float64_is_zero(implementation: str) -> None:
    layer, x, dhx = vanishing("rnn_tanh", "float64")
    with layer.writable() as flat:
        flat *= 0.2
    assert subnormals(in_the_callers_environment(layer, x, dhx)) > 0
    actual = gradients(layer, x, dhx)
    assert subnormals(actual) == 0 and not actual[0][0].any()


@needs_flushing
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_recomputed_gradients_vanish_to_the_same_bits(name: str, implementation: str) -> None:
    """Compiled loops sum in another order where a chunk of rows ends elsewhere."""
    layer, x, dhx = vanishing(name)
    expected = gradients(layer, x, dhx)
    layer.recompute = 50
    actual = gradients(layer, x, dhx)
    assert subnormals(actual) == 0
    if implementation == "reference":
        assert_same(actual[:2], expected[:2])
    for k, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other.astype(np.float64), "float32", f"array {k}", steps=len(x))


@needs_numba
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_bits_are_the_same_however_many_threads(cell: str) -> None:
    """Vanishing rows are shared among threads, each with its own control bits."""
    layer, x, dhx = vanishing(cell, N=23, H=16)

    def computed(threads: int) -> list[np.ndarray]:
        with several(threads):
            return forced("sequence", gradients, layer, x, dhx)

    alone = computed(1)
    for threads in (2, 3):
        assert_same(computed(threads), alone, f"{threads} threads")


@needs_flushing
@pytest.mark.parametrize("kind", [xprnn.optim.SGD, xprnn.optim.Adam, xprnn.optim.AdamW])
def test_moments_end_at_zero(kind: Any) -> None:
    """Moments without new gradients keep decaying, but not below the smallest normal number."""
    options = {"momentum": 0.5} if kind is xprnn.optim.SGD else {"betas": (0.5, 0.5)}
    linear = xprnn.Linear(4, 3, seed=0)
    optimizer = kind([linear], lr=1e-3, **options)
    linear.grads.update({name: np.ones_like(grad) for name, grad in linear.grads.items()})
    optimizer.step()
    linear.zero_grad()
    for _ in range(200):
        optimizer.step()
        assert subnormals(slots_of(optimizer)) == 0
    assert not any(slot.any() for slot in slots_of(optimizer))


@needs_flushing
@pytest.mark.parametrize("kernels", ["reference", pytest.param("sequence", marks=needs_numba)])
def test_states_that_decay_end_at_zero(kernels: str) -> None:
    """Of a stepper and of a cell, with zeros as inputs and without bias."""
    layer = xprnn.RNN(3, 4, bias=False, seed=0)
    cell = xprnn.RNNCell(3, 4, bias=False, seed=0)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    x, h = np.zeros((2, 3), np.float32), np.ones((2, 4), np.float32)

    def decay() -> list[np.ndarray]:
        stepper, state, seen = layer.stepper(2), h, []
        stepper.load(h[None])
        for _ in range(500):
            state = cell(x, state)
            seen += [stepper.step(x), state]
        return seen

    seen = forced(kernels, decay)
    assert subnormals(seen) == 0
    assert seen[20].all() and not seen[-1].any() and not seen[-2].any()
