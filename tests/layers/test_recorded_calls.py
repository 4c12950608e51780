"""Recorded calls that wait for `backward`: their number, and that unusable ones are dropped."""

from __future__ import annotations

import gc
import logging
import tracemalloc
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import (
    MODULES,
    arguments,
    assert_same,
    backward,
    copies,
    forward,
    make,
    run,
)

CHANGED = "parameters were changed after the call"
NONE = "there is no recorded call"


def change(module: Any) -> None:
    with module.writable() as flat:
        flat *= 0.5


def linear() -> xprnn.Linear:
    return xprnn.Linear(64, 256, seed=0).train()


@pytest.mark.parametrize("name", MODULES)
def test_waiting_calls_are_counted(name: str, implementation: str) -> None:
    module = make(name)
    inputs = arguments(module)
    counts = [module.recorded_calls]
    for act in (forward, forward, backward, forward, backward, backward):
        act(module, inputs)
        counts.append(module.recorded_calls)
    assert counts == [0, 1, 2, 1, 2, 1, 0]
    forward(module, inputs)
    change(module)
    assert module.recorded_calls == 0, "it can no longer be used"
    forward(module, inputs)
    assert module.recorded_calls == 1
    module.eval()
    assert module.recorded_calls == 0
    with pytest.raises(AttributeError):
        module.recorded_calls = 3


@pytest.mark.parametrize("name", MODULES)
def test_dropped_calls_change_no_result_and_no_message(name: str, implementation: str) -> None:
    module, fresh = make(name), make(name)
    inputs = arguments(module)
    change(fresh)
    expected = run(fresh, inputs)

    forward(module, inputs)
    forward(module, inputs)
    change(module)
    with pytest.raises(RuntimeError, match=CHANGED):
        backward(module, inputs)
    actual = copies(forward(module, inputs))
    assert len(module._records) == 1
    actual += copies(backward(module, inputs)) + copies(list(module.grads.values()))
    assert_same(actual, expected)
    with pytest.raises(RuntimeError, match=CHANGED):  # the two previous calls
        backward(module, inputs)

    for _ in range(2):
        forward(module, inputs)
    for _ in range(2):
        backward(module, inputs)
    with pytest.raises(RuntimeError, match=NONE):
        backward(module, inputs)
    forward(module, inputs)
    change(module)
    for _ in range(2):
        forward(module, inputs)
    for _ in range(2):
        backward(module, inputs)
    with pytest.raises(RuntimeError, match=CHANGED):
        backward(module, inputs)
    module.eval()
    with pytest.raises(RuntimeError, match=NONE):
        backward(module, inputs)


def test_a_linear_layer_drops_unusable_calls() -> None:
    module = linear()
    x = np.ones((3, 64), np.float32)
    y = module(x)
    change(module)
    module(x)
    assert module.recorded_calls == len(module._records) == 1
    module.backward(y)
    with pytest.raises(RuntimeError, match=CHANGED):
        module.backward(y)


def test_a_layer_with_unusable_calls_can_be_moved() -> None:
    layer = make("gru")
    inputs = arguments(layer)
    forward(layer, inputs)
    change(layer)
    layer.to(dtype="float32")
    assert not layer._records
    with pytest.raises(RuntimeError, match=CHANGED):
        layer.backward(np.ones((4, 3, 5), np.float32))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: xprnn.GRU(64, 128, seed=0).train(), (20, 16, 64)),
        (lambda: xprnn.LSTM(64, 64, 2, bidirectional=True, seed=0).train(), (20, 16, 64)),
        (lambda: xprnn.GRU(64, 128, recompute=5, seed=0).train(), (20, 16, 64)),
        (lambda: xprnn.LSTMCell(64, 256, seed=0).train(), (64, 64)),
        (linear, (1000, 64)),
    ],
    ids=["GRU", "LSTM", "recompute", "LSTMCell", "Linear"],
)
def test_skipped_batches_leave_no_memory(
    build: Any, shape: tuple[int, ...], implementation: str
) -> None:
    """Between two steps one batch is skipped, as if its loss were NaN."""
    module = build()
    x = np.ones(shape, np.float32)

    def learn(skip: bool) -> None:
        if skip:
            module(x)
        y = module(x)
        gradient = y[0] if isinstance(y, tuple) else y
        module.backward((gradient, None) if isinstance(module, xprnn.LSTMCell) else gradient)
        change(module)

    for _ in range(3):
        learn(skip=True)
    tracemalloc.start()
    try:
        gc.collect()
        learn(skip=True)
        held = tracemalloc.get_traced_memory()[0]
        for _ in range(20):
            learn(skip=True)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    assert grown < x.nbytes, f"20 skipped batches leave {grown:,} bytes"


def test_many_waiting_calls_are_logged_once(
    caplog: pytest.LogCaptureFixture, implementation: str
) -> None:
    layer = xprnn.RNN(1, 1, seed=0).train()
    x = np.ones((1, 1), np.float32)
    with caplog.at_level(logging.DEBUG, "xprnn"):
        for _ in range(99):
            layer(x)
        assert not caplog.records
        for _ in range(101):
            layer(x)
        layer.eval().train()
        for _ in range(150):
            layer(x)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "xprnn"
    assert record.getMessage().startswith("RNN: 100 recorded calls wait for backward()")


def test_steps_of_cells_and_dropped_calls_are_not_logged(
    caplog: pytest.LogCaptureFixture, implementation: str
) -> None:
    """A cell and its read-out record one call per step; calls of changed parameters are dropped."""
    x = np.ones((1, 1), np.float32)
    layer = xprnn.RNN(1, 1, seed=0).train()
    cell, readout = xprnn.GRUCell(1, 1, seed=0).train(), xprnn.Linear(1, 1, seed=0).train()
    with caplog.at_level(logging.DEBUG, "xprnn"):
        for _ in range(120):
            readout(cell(x))
            layer(x)
            change(layer)
    assert cell.recorded_calls == readout.recorded_calls == 120
    assert not caplog.records
