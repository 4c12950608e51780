"""Parameters: their place in memory, the permitted writes, and errors for all others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import (
    MODULES,
    arguments,
    assert_same,
    backward,
    forward,
    is_cell,
    make,
    normal,
    run,
    state_of,
)


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_starts_on_64_bytes_and_padding_is_zero(name: str) -> None:
    module = make(name, 3, 5, dtype="float32")
    for buffers in (module.parameters, module.grads):
        assert all(array.ctypes.data % 64 == 0 for array in buffers.values())
        assert all(np.shares_memory(array, buffers.flat) for array in buffers.values())
    inputs = arguments(module)
    assert_padding_is_zero(module)
    forward(module, inputs)
    backward(module, inputs)
    assert np.abs(module.grads.flat).max() > 0.0
    with module.writable() as flat:
        flat[...] += 1.0
    assert_padding_is_zero(module)
    module.parameters["weight_hh" if is_cell(name) else "weight_hh_l0"] = np.ones(
        (module._spec.cell.gates * 5, 5), np.float32
    )
    module.load_state_dict({n: p + 1.0 for n, p in module.state_dict().items()})
    assert_padding_is_zero(module)


def assert_padding_is_zero(module: Any) -> None:
    padding = np.ones(module.parameters.flat.size, bool)
    for name, array in module.parameters.items():
        start = module.parameters.starts[name]
        padding[start : start + array.size] = False
    assert padding.any()
    for flat in (module.parameters.flat, module.grads.flat):
        np.testing.assert_array_equal(flat[padding], 0.0)


# -- permitted and forbidden writes


def by_item(module: Any, values: dict[str, np.ndarray]) -> None:
    for name, value in values.items():
        module.parameters[name] = value


def by_writable(module: Any, values: dict[str, np.ndarray]) -> None:
    with module.writable() as flat:
        for name, value in values.items():
            start = module.parameters.starts[name]
            flat[start : start + value.size] = value.ravel()


WAYS: dict[str, Callable[[Any, dict[str, np.ndarray]], None]] = {
    "parameters[name] =": by_item,
    "load_state_dict": lambda module, values: module.load_state_dict(values),
    "writable": by_writable,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_written_parameters_take_effect_in_the_next_call(
    name: str, way: str, implementation: str
) -> None:
    module = make(name)
    inputs = arguments(module)
    first = run(module, inputs)
    values = {n: normal(k, *p.shape) for k, (n, p) in enumerate(module.parameters.items())}
    version = module.parameters.version
    WAYS[way](module, values)
    assert module.parameters.version > version

    fresh = make(name, seed=99)
    fresh.load_state_dict(values)
    actual = run(module, inputs)
    assert_same(actual, run(fresh, inputs))
    assert not any(np.array_equal(one, other) for one, other in zip(actual, first, strict=True))
    assert_same(list(module.parameters.values()), list(values.values()))


def kept_buffer(module: Any) -> None:
    with module.writable() as flat:
        pass
    flat[...] = 0.0


def kept_buffer_made_writable(module: Any) -> None:
    with module.writable() as flat:
        pass
    flat.flags.writeable = True


def buffer_kept_past_an_error(module: Any) -> None:
    try:
        with module.writable() as flat:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    flat[0] = 0.0


def add_in_place(module: Any) -> None:
    module.parameters["bias_hh"] += 1.0


def write(array: np.ndarray) -> None:
    array[...] = 0.0


FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "parameters[name][...] =": lambda m: write(m.parameters["bias_hh"]),
    "parameters[name][0] =": lambda m: write(m.parameters["weight_hh"][0]),
    "parameters[name] +=": add_in_place,
    "out=": lambda m: np.add(1.0, 1.0, out=m.parameters["bias_hh"]),
    "fill": lambda m: m.parameters["bias_hh"].fill(0.0),
    "reshaped": lambda m: write(m.parameters["weight_hh"].reshape(-1)),
    "made writable": lambda m: m.parameters["bias_hh"].setflags(write=True),
    "flat": lambda m: write(m.parameters.flat),
    "flat made writable": lambda m: m.parameters.flat.setflags(write=True),
    "a view of flat made writable": lambda m: m.parameters.flat[2:4].setflags(write=True),
    "memoryview": lambda m: memoryview(m.parameters["bias_hh"]).__setitem__(0, 0.0),
    "readinto": lambda m: io.BytesIO(bytes(99)).readinto(m.parameters["bias_hh"]),
    "buffer kept": kept_buffer,
    "buffer kept, made writable": kept_buffer_made_writable,
    "buffer kept past an error": buffer_kept_past_an_error,
}
COPIED = {
    "itself": lambda module: module,
    "copied": copy.copy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "moved": lambda module: module.to(dtype="float64"),
}


@pytest.mark.parametrize("origin", COPIED)
@pytest.mark.parametrize("way", FORBIDDEN)
def test_a_write_that_would_not_be_noticed_raises(way: str, origin: str) -> None:
    cell = COPIED[origin](make("rnn_tanh_cell"))
    before = cell.parameters.flat.copy()
    with pytest.raises((ValueError, TypeError, BufferError)):
        FORBIDDEN[way](cell)
    assert_same(cell.parameters.flat, before)


@pytest.mark.parametrize("way", ["int", "float32", "shape", "list", "masked", "name"])
def test_a_wrong_value_for_a_parameter_is_refused(way: str) -> None:
    cell = make("gru_cell")
    right = normal(1, 15)
    wrong = {
        "int": right.astype(np.int64),
        "float32": right.astype(np.float32),
        "shape": normal(1, 1),  # numpy would broadcast it
        "list": right.tolist(),
        "masked": np.ma.array(right, mask=right > 0),
        "name": right,
    }
    before, version = cell.parameters.flat.copy(), cell.parameters.version
    name = "bias" if way == "name" else "bias_ih"
    with pytest.raises((TypeError, ValueError, KeyError), match=f"'{name}': expected"):
        cell.parameters[name] = wrong[way]
    assert_same(cell.parameters.flat, before)
    assert cell.parameters.version == version


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_backward_after_a_change_of_parameters_is_refused(
    name: str, way: str, implementation: str
) -> None:
    module = make(name)
    inputs = arguments(module)
    run(module, inputs)
    forward(module, inputs)
    module.grads.flat[...] = 0.25
    WAYS[way](module, module.state_dict())  # the same values are a change too
    before = state_of(module)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="parameters were changed"):
            backward(module, inputs)
        assert_same(state_of(module), before)
    module.eval().train()
    expected = run(make(name), inputs)
    assert_same(run(module, inputs), expected)


def test_backward_of_a_call_recorded_after_the_change_works(implementation: str) -> None:
    """Backward of the older call still raises."""
    layer = make("gru")
    inputs = arguments(layer)
    forward(layer, inputs)
    layer.parameters["bias_ih_l0"] = normal(4, 15)
    forward(layer, inputs)
    backward(layer, inputs)
    with pytest.raises(RuntimeError, match="parameters were changed"):
        backward(layer, inputs)


def test_gradients_may_be_written_in_place(implementation: str) -> None:
    layer = make("gru")
    layer.grads["bias_ih_l0"][...] = 2.0
    layer.grads.flat *= 0.5
    np.testing.assert_array_equal(layer.grads["bias_ih_l0"], 1.0)
    with pytest.raises(TypeError):
        layer.grads["bias_ih_l0"] = np.zeros(15)


@pytest.mark.parametrize(
    "weights",
    [
        {"weight_ih": np.ones((15, 3), int)},
        {"weight_ih": np.ones((15, 3), "float16")},
        {"weight_ih": [[1.0]]},
        {"weight_ih": np.ones(15)},
        {"weight_ih": np.ones((16, 3))},
        {"weight_hh": None},
        {"weight_hh": np.ones(5)},
        {"weight_hh": np.ones((15, 5), "float32")},
        {"weight_hh": np.ones((15, 4))},
        {"bias_ih": None},
        {"bias_hh": None},
        {"bias_hh": np.ones((15, 1))},
        {"bias_ih": np.ma.ones(15)},
    ],
    ids=lambda weights: f"{next(iter(weights))}-{np.shape(next(iter(weights.values())))}",
)
def test_from_weights_refuses_what_does_not_fit(weights: dict[str, Any]) -> None:
    right = {"weight_ih": np.ones((15, 3)), "weight_hh": np.ones((15, 5))}
    right |= {"bias_ih": np.ones(15), "bias_hh": np.ones(15)}
    (name,) = weights
    # either of two weights that contradict each other may be the wrong one
    names = f"{name}|weight_ih|weight_hh"
    with pytest.raises((TypeError, ValueError), match=rf"\b({names})\b.*expected"):
        xprnn.GRUCell.from_weights(**{**right, **weights})
