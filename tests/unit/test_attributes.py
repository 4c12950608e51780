"""Attributes: torch's names can be read, and none can be set where the value would be ignored."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import pydoc
import re
from typing import Any

import numpy as np
import pytest

import xprnn

LAYER = {
    "input_size": 3,
    "hidden_size": 4,
    "num_layers": 2,
    "bias": False,
    "batch_first": True,
    "dropout": 0.25,
    "bidirectional": True,
}
CELL = {"input_size": 3, "hidden_size": 4, "bias": False}
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (xprnn.RNN, {**LAYER, "nonlinearity": "relu"}),
    (xprnn.GRU, {**LAYER, "reset_after": False}),
    (xprnn.LSTM, LAYER),
    (xprnn.RNNCell, {**CELL, "nonlinearity": "relu"}),
    (xprnn.GRUCell, {**CELL, "reset_after": False}),
    (xprnn.LSTMCell, CELL),
    (xprnn.Linear, {"in_features": 3, "out_features": 4, "bias": False}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=lambda value: str(value)[:24])
def test_options_are_readable_attributes(kind: Any, options: dict[str, Any]) -> None:
    module = kind(**options, seed=0)
    before = repr(module)
    for name, value in options.items():
        assert getattr(module, name) == value and type(getattr(module, name)) is type(value)
        text = rf"^{kind.__name__}\.{name} cannot be set to 'more': it is fixed at .* when the"
        with pytest.raises(AttributeError, match=text):
            setattr(module, name, "more")
        setattr(module, name, value)  # as constructors of torch's subclasses do
        assert getattr(kind, name).__doc__
        with pytest.raises(TypeError, match="options cannot be changed"):
            module.options[name] = value
    assert module.options == {**options, "seed": 0}
    assert repr(module) == before


def test_options_are_json_and_are_copied() -> None:
    options = xprnn.GRU(3, 4, seed=0).options
    for change in (options.clear, lambda: options.pop("bias"), lambda: options.update(bias=False)):
        with pytest.raises(TypeError, match="options cannot be changed"):
            change()
    copies = copy.copy(options), copy.deepcopy(options), pickle.loads(pickle.dumps(options))
    for other in (json.loads(json.dumps(options)), *copies):
        assert other == options
        other["bias"] = False
    assert options["bias"] is True


def test_a_subclass_that_sets_an_option_too_early() -> None:
    class Early(xprnn.GRU):
        def __init__(self) -> None:
            self.hidden_size = 4
            super().__init__(3, 4)

    with pytest.raises(AttributeError, match=r"hidden_size cannot be set: super\(\).__init__"):
        Early()


STATE = {
    "backend": "move the module with to",
    "dtype": r"to\(dtype=",
    "parameters": "load_state_dict",
    "grads": "grads.name.",
    "frozen": "unfreeze",
}


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("kind", [xprnn.GRU, xprnn.LSTMCell, xprnn.Linear])
def test_state_is_changed_by_methods(kind: Any, name: str) -> None:
    module = kind(3, 4, seed=0)
    before = getattr(module, name)
    with pytest.raises(AttributeError, match=f"{name} cannot be set: .*{STATE[name]}"):
        setattr(module, name, "cupy")
    assert getattr(module, name) is before
    with pytest.raises(AttributeError):
        delattr(module, name)


@pytest.mark.parametrize("wrong", ["no", 1, None, np.float32(1)])
def test_the_mode_is_true_or_false(wrong: Any) -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    with pytest.raises(TypeError, match="training: expected True or False"):
        layer.training = wrong
    assert layer.training is False
    layer.training = True
    layer(np.ones((2, 1, 3), np.float32))
    assert layer.backward(np.ones((2, 1, 4), np.float32))[0].shape == (2, 1, 3)


def test_precision_policies_cannot_be_set() -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    with pytest.raises(AttributeError, match=r"GRU.arithmetic cannot be set: .*to\(compute_dtype"):
        layer.arithmetic = "float16"
    stepper = layer.stepper(2)
    for name in ("batch", "backend", "arithmetic"):
        with pytest.raises(AttributeError, match=f"Stepper.{name} cannot be set"):
            setattr(stepper, name, 3)
    assert stepper.step(np.ones((2, 3), np.float32)).shape == (2, 4)


def test_the_gradient_buffer_is_written_and_not_replaced() -> None:
    linear = xprnn.Linear(3, 4, seed=0)
    linear.grads.flat[...] = 2.0
    linear.grads.flat *= 0.5
    assert (linear.grads["weight"] == 1.0).all()
    with pytest.raises(AttributeError, match=r"flat cannot be set: write flat\[...\]"):
        linear.grads.flat = np.zeros_like(linear.grads.flat)
    assert (linear.grads["weight"] == 1.0).all()


@pytest.mark.parametrize("kind", [kind for kind, _ in OPTIONS])
def test_help_names_every_parameter_of_the_constructor(kind: Any) -> None:
    parameters = list(inspect.signature(kind).parameters)
    assert re.findall(r"^:param (\w+):", inspect.getdoc(kind), re.MULTILINE) == parameters
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    assert all(f":param {name}:" in shown for name in parameters)
