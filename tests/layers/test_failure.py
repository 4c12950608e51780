"""Errors leave nothing half changed, and nothing silently wrong later."""

from __future__ import annotations

import copy
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.core.workspace import MAX_IDLE
from xprnn.engine import replay

X = np.random.default_rng(0).standard_normal((6, 3, 4))


def recorded() -> tuple[xprnn.GRU, np.ndarray]:
    layer = xprnn.GRU(4, 5, dtype="float64", seed=0).train()
    return layer, layer(X)[0]


def test_an_error_during_backward_invalidates_only_that_call(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    layer, output = recorded()
    layer(2 * X)

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(replay, "weight_gradients", fail)
        if implementation == "numba":
            from xprnn.kernels.numba import gradients

            patched.setattr(gradients, "compute", fail)
        with pytest.raises(MemoryError):
            layer.backward(output)
    assert not layer.grads.flat.any()
    with pytest.raises(
        RuntimeError, match="was interrupted"
    ):  # does not silently use the previous call
        layer.backward(output)
    layer.eval().train()
    layer(X)
    layer.backward(output)
    fresh, output = recorded()
    fresh.backward(output)
    np.testing.assert_array_equal(layer.grads.flat, fresh.grads.flat)


def test_forward_and_backward_are_refused_inside_a_writable_block(implementation: str) -> None:
    layer, output = recorded()
    with layer.writable() as flat:
        with pytest.raises(RuntimeError, match="not inside a writable"):
            layer(X)
        with pytest.raises(RuntimeError, match="not inside a writable"):
            layer.backward(output)
        flat *= 1.0
    with pytest.raises(RuntimeError, match="parameters were changed"):
        layer.backward(output)
    readout = xprnn.Linear(5, 2, dtype="float64").train()
    with readout.writable(), pytest.raises(RuntimeError, match="not inside a writable"):
        readout(output)


@pytest.mark.parametrize("name", ["parameters", "grads"])
def test_the_mappings_cannot_be_replaced(name: str) -> None:
    layer, _ = recorded()
    with pytest.raises(AttributeError):
        setattr(layer, name, {})


def test_update_writes_all_or_nothing() -> None:
    layer, _ = recorded()
    before = layer.parameters.flat.copy()
    good = np.zeros(15)
    with pytest.raises(ValueError, match=r"'bias_hh_l0': expected shape \(15,\), got \(14,\)"):
        layer.parameters.update({"bias_ih_l0": good, "bias_hh_l0": good[:14]})
    with pytest.raises(KeyError, match="expected one of"):
        layer.parameters.update({"bias_ih_l0": good, "bias": good})
    np.testing.assert_array_equal(layer.parameters.flat, before)


def test_old_parameters_cannot_be_written_after_a_move() -> None:
    layer = xprnn.GRU(4, 5, dtype="float64", seed=0)
    old, pending = layer.parameters, layer.writable()
    with layer.writable(), pytest.raises(RuntimeError, match="to: not inside a writable"):
        layer.to(dtype="float32")
    layer.to(dtype="float32")
    with pytest.raises(RuntimeError, match=r"use module\.parameters again"):
        old["bias_ih_l0"] = np.zeros(15)
    with pytest.raises(RuntimeError, match=r"use module\.parameters again"), pending:
        pass


def test_parameters_may_be_swapped() -> None:
    layer = xprnn.GRU(4, 5, dtype="float64", seed=0)
    before = layer.state_dict()
    p = layer.parameters
    p.update({"bias_ih_l0": p["bias_hh_l0"], "bias_hh_l0": p["bias_ih_l0"]})
    np.testing.assert_array_equal(p["bias_ih_l0"], before["bias_hh_l0"])
    np.testing.assert_array_equal(p["bias_hh_l0"], before["bias_ih_l0"])


def test_values_beyond_the_dtype_are_refused() -> None:
    layer = xprnn.Linear(2, 1, seed=0)
    state = {name: p.astype(np.float64) for name, p in layer.state_dict().items()}
    state["bias"][0] = 1e300
    with pytest.raises(ValueError, match="bias: expected values within float32, got 1e"):
        layer.load_state_dict(state)
    optimizer = xprnn.optim.SGD([layer], lr=0.1, momentum=0.9)
    slots = optimizer.state_dict()
    slots["0.momentum_buffer"] = np.full(layer.grads.flat.shape, 1e300)
    with pytest.raises(ValueError, match=r"momentum_buffer: expected values within float32"):
        optimizer.load_state_dict(slots)


def test_copies_of_a_cache_are_used_up_together(implementation: str) -> None:
    output, _, cache = xprnn.functional.rnn_forward(X, None, np.ones((5, 4)), np.eye(5))
    other = copy.copy(cache)
    xprnn.functional.rnn_backward(output, None, cache)
    with pytest.raises(RuntimeError, match="has been used"):
        xprnn.functional.rnn_backward(output, None, other)


class Named(xprnn.GRU):
    """A user's subclass with a constructor of its own."""

    def __init__(self, size: int) -> None:
        super().__init__(size, size, dtype="float64", seed=0)


def test_a_subclass_is_copied_and_pickled_and_saved_as_its_base(
    tmp_path: Any, implementation: str
) -> None:
    layer = Named(3)
    x = X[..., :3]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is Named
        np.testing.assert_array_equal(other(x)[0], layer(x)[0])
    xprnn.gradcheck(layer, x)
    layer.save(tmp_path / "gru")
    loaded = xprnn.load(tmp_path / "gru")
    assert type(loaded) is xprnn.GRU
    np.testing.assert_array_equal(loaded(x)[0], layer(x)[0])


def test_memory_of_recorded_and_of_large_calls_is_released(implementation: str) -> None:
    layer = xprnn.LSTM(8, 32, num_layers=3, seed=0).train()
    x = np.ones((50, 40, 8), np.float32)
    layer(x)
    layer.eval()
    for warm in (x[:2], x[:1, :1]):  # what is compiled now needs memory too
        layer(warm)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        layer.train()
        for _ in range(3):
            layer(x)
        held = tracemalloc.get_traced_memory()[0] - before
        assert held > 3 * 50 * 40 * 32 * 4 * 4 * 3  # the gates alone of three calls
        layer.eval()
        layer(x)
        for _ in range(MAX_IDLE):
            layer(x[:1, :1])
        assert tracemalloc.get_traced_memory()[0] - before < held / 20
    finally:
        tracemalloc.stop()


def test_an_eval_call_needs_the_memory_of_one_layer(implementation: str) -> None:
    x = np.ones((100, 50, 64), np.float32)

    def peak(layers: int) -> int:
        layer = xprnn.GRU(64, 64, num_layers=layers, seed=0)
        layer(x[:2])
        tracemalloc.start()
        try:
            layer(x)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(6) < 2.5 * peak(1)
