"""Layers and cells between calls: arguments, initial parameters, state, gradients, modes."""

from __future__ import annotations

import inspect
import itertools
import typing
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.implementations import assert_equivalent
from tests.support.targets import (
    MODULES,
    arguments,
    arrays,
    assert_same,
    backward,
    copies,
    forward,
    is_cell,
    make,
    normal,
    run,
    state_of,
)

TORCH = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]


# -- arguments and initial parameters


@pytest.mark.parametrize("kind", TORCH)
def test_arguments_are_named_and_ordered_as_in_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = getattr(torch.nn, kind)
    overloads = typing.get_overloads(theirs.__init__)
    signature = inspect.signature(overloads[0] if overloads else theirs.__init__)
    expected = {n: p.default for n, p in signature.parameters.items()}
    for name in ("self", "proj_size", "device", "dtype"):
        expected.pop(name, None)
    ours = inspect.signature(getattr(xprnn, kind)).parameters
    positional = {n: p.default for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == list(expected)
    for name, default in expected.items():  # some of torch's overloads give no default
        assert default in (positional[name], inspect.Parameter.empty, ...), name


@pytest.mark.parametrize("kind", TORCH)
def test_names_and_shapes_are_those_of_torch(kind: str) -> None:
    torch = pytest.importorskip("torch")
    cell = kind.endswith("Cell")
    choices = [(True, False)] if cell else [(True, False), (1, 2, 3), (True, False)]
    for bias, *deep in itertools.product(*choices):
        options = {"bias": bias}
        if not cell:
            options |= {"num_layers": deep[0], "bidirectional": deep[1]}
        theirs = getattr(torch.nn, kind)(3, 5, **options)
        ours = getattr(xprnn, kind)(3, 5, **options, seed=0)
        expected = [(n, tuple(p.shape)) for n, p in theirs.state_dict().items()]
        assert [(n, p.shape) for n, p in ours.state_dict().items()] == expected
        assert [(n, g.shape) for n, g in ours.grads.items()] == expected


@pytest.mark.parametrize("name", MODULES)
def test_initial_parameters(name: str) -> None:
    """Uniform within 1/sqrt(H) from the host's generator, the same for the same seed."""
    module = make(name, 30, 64, seed=7)
    rng, bound = np.random.Generator(np.random.PCG64(7)), 64**-0.5
    drawn = {n: rng.uniform(-bound, bound, p.shape) for n, p in module.parameters.items()}
    assert_same(list(module.parameters.values()), list(drawn.values()))
    values = np.concatenate([value.ravel() for value in drawn.values()])
    assert 0.99 * bound < values.max() <= bound
    assert -bound <= values.min() < -0.99 * bound
    deviation = bound / 3**0.5
    assert abs(values.mean()) < 5 * deviation / values.size**0.5

    single = make(name, 30, 64, seed=7, dtype="float32")
    rounded = [value.astype(np.float32) for value in drawn.values()]
    assert_same(list(single.parameters.values()), rounded)
    assert not np.array_equal(make(name, 30, 64, seed=8).parameters.flat, module.parameters.flat)
    first, second = make(name, seed=None), make(name, seed=None)
    assert first.options["seed"] != second.options["seed"]
    again = make(name, seed=first.options["seed"])
    assert_same(again.parameters.flat, first.parameters.flat)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"input_size": 0}, ValueError, "input_size: expected at least 1, got 0"),
    ({"input_size": 3.0}, TypeError, "input_size: expected an integer"),
    ({"input_size": True}, TypeError, "input_size: expected an integer"),
    ({"hidden_size": -1}, ValueError, "hidden_size: expected at least 1"),
    ({"hidden_size": "5"}, TypeError, "hidden_size: expected an integer"),
    ({"num_layers": 0}, ValueError, "num_layers: expected at least 1"),
    ({"bias": 1}, TypeError, "bias: expected True or False"),
    ({"batch_first": None}, TypeError, "batch_first: expected True or False"),
    ({"bidirectional": "yes"}, TypeError, "bidirectional: expected True or False"),
    ({"dropout": 1.5}, ValueError, "dropout: expected a probability"),
    ({"dropout": -0.1}, ValueError, "dropout: expected a probability"),
    ({"dropout": float("nan")}, ValueError, "dropout: expected a probability"),
    ({"dropout": True}, TypeError, "dropout: expected a number"),
    ({"nonlinearity": "sigmoid"}, ValueError, "nonlinearity: expected 'tanh' or 'relu'"),
    ({"nonlinearity": None}, ValueError, "nonlinearity: expected 'tanh' or 'relu'"),
    ({"seed": -1}, ValueError, "seed: expected 0 to"),
    ({"seed": 2**63}, ValueError, "seed: expected 0 to"),
    ({"seed": 1.0}, TypeError, "seed: expected an integer"),
    ({"dtype": "float16"}, ValueError, "dtype: expected .*float32 or float64"),
    ({"dtype": ">f4"}, ValueError, "dtype: expected .*float32 or float64"),
    ({"dtype": "single?"}, ValueError, "dtype: expected .*float32 or float64"),
    ({"dtype": None}, ValueError, "dtype: expected .*float32 or float64"),
    ({"backend": "tpu"}, ValueError, "backend: expected"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[str(w) for w, _, _ in WRONG])
def test_wrong_options_are_refused(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        xprnn.RNN(**{"input_size": 3, "hidden_size": 5, **wrong})


# -- gradients


@pytest.mark.parametrize("name", MODULES)
def test_gradients_accumulate_until_they_are_zeroed(name: str, implementation: str) -> None:
    module = make(name)
    first, second = arguments(module, seed=1), arguments(module, seed=2)
    shares = []
    for inputs in (first, second):
        run(module, inputs)
        forward(module, inputs)
        backward(module, inputs)
        shares.append(module.grads.flat.copy())
        module.zero_grad()
        np.testing.assert_array_equal(module.grads.flat, 0.0)
    for inputs in (first, second):
        forward(module, inputs)
        backward(module, inputs)
    assert_same(module.grads.flat, shares[0] + shares[1])


@pytest.mark.parametrize("name", MODULES)
def test_need_dx_changes_no_other_gradient(name: str, implementation: str) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    forward(module, inputs)
    dx, dinitial = backward(module, inputs, need_dx=False)
    assert dx is None
    actual = arrays(dinitial) + list(module.grads.values())
    assert_same(actual, expected[-len(actual) :])


@pytest.mark.parametrize("value", ["no", 1, None, [], np.ones(2)])
@pytest.mark.parametrize("name", ["gru", "lstm_cell", "rnn_tanh_function"])
def test_need_dx_must_be_a_bool(name: str, value: Any, implementation: str) -> None:
    subject = make(name)
    clean = arguments(subject)
    expected = run(subject, clean)
    forward(subject, clean)
    before = state_of(subject)
    with pytest.raises(TypeError, match="need_dx: expected True or False"):
        backward(subject, clean, need_dx=value)
    assert_same(state_of(subject), before)
    actual = copies(backward(subject, clean))
    assert_same(actual, expected[len(expected) - len(actual) - 4 : -4])


@pytest.mark.parametrize("frozen", ["one", "every other", "all"])
@pytest.mark.parametrize("name", MODULES)
def test_frozen_parameters_get_no_gradient_and_others_are_unchanged(
    name: str, frozen: str, implementation: str
) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    gradients = dict(zip(module.grads, expected[-len(module.grads) :], strict=True))
    names = list(module.parameters)
    chosen = {"one": names[1:2], "every other": names[::2], "all": names}[frozen]

    forward(module, inputs)
    module.grads.flat[...] = 0.25
    module.freeze(*([] if frozen == "all" else chosen))
    assert module.frozen == set(chosen)
    for n, grad in module.grads.items():  # freezing clears the accumulated gradient
        np.testing.assert_array_equal(grad, 0.0 if n in chosen else 0.25)
    module.zero_grad()
    actual = arrays(backward(module, inputs))
    assert_same(actual, expected[-len(actual) - len(names) : -len(names)])
    for n, grad in module.grads.items():
        np.testing.assert_array_equal(grad, 0.0 if n in chosen else gradients[n])

    parts = [set(range(*part)) for part in module.trainable()]
    covered = set().union(*parts)
    for n, start in module.parameters.starts.items():
        if n:
            size = module.parameters[n].size
            elements = set(range(start, start + size))
            assert not elements & covered if n in chosen else elements <= covered

    module.unfreeze(*chosen[:1])
    assert module.frozen == set(chosen[1:])
    module.unfreeze()
    assert_same(run(module, inputs), expected)
    with pytest.raises(KeyError, match="no parameter named bias; there are weight_ih"):
        module.freeze(names[0], "bias")
    assert module.frozen == frozenset()


# -- modes


@pytest.mark.parametrize("name", MODULES)
def test_eval_mode_drops_recorded_calls_and_records_none(name: str, implementation: str) -> None:
    kind, options = MODULES[name]
    module = kind(3, 5, **options, dtype="float64", seed=0)
    inputs = arguments(module)
    assert module.training is False
    evaluated = copies(forward(module, inputs))
    with pytest.raises(RuntimeError, match="there is no recorded call"):
        backward(module, inputs)
    assert module.train() is module
    assert module.training is True
    assert_equivalent(implementation, forward(module, inputs), evaluated)
    assert module.eval() is module
    for _ in range(2):
        with pytest.raises(RuntimeError, match="there is no recorded call"):
            backward(module, inputs)
        module.train()
    np.testing.assert_array_equal(module.grads.flat, 0.0)


@pytest.mark.parametrize("name", MODULES)
def test_backward_twice_for_one_call_is_refused(name: str, implementation: str) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    forward(module, inputs)
    backward(module, inputs)
    before = state_of(module)
    with pytest.raises(RuntimeError, match=r"call train\(\) first, then the .*, then backward"):
        backward(module, inputs)
    assert_same(state_of(module), before)
    module.zero_grad()
    assert_same(run(module, inputs), expected)


@pytest.mark.parametrize("name", MODULES)
def test_no_upstream_gradient_means_zeros(name: str, implementation: str) -> None:
    module = make(name)
    inputs = arguments(module)
    upstream = [n for n in inputs if n.startswith("d")]
    for keep in [(), *((n,) for n in upstream), upstream]:
        zeros = {n: a if n in keep or n not in upstream else a * 0.0 for n, a in inputs.items()}
        omitted = {n: a if n in keep or n not in upstream else None for n, a in inputs.items()}
        actual = run(module, omitted)
        assert_same(actual, run(module, zeros))
        assert keep == () or np.abs(actual[-1]).max() > 0.0
    if not is_cell(name):
        forward(module, inputs)
        for no_upstream in ({}, {"dhx": None}):
            with pytest.raises(ValueError, match=r"backward: expected .* doutput, .* dhx"):
                module.backward(**no_upstream)
        dx, dinitial = module.backward(None, None)
        assert all((array == 0.0).all() for array in arrays((dx, dinitial)))


def test_the_base_class_cannot_be_built() -> None:
    with pytest.raises(TypeError, match="use one of its subclasses"):
        type(make("gru")).__mro__[-2]()


def test_positional_arguments(implementation: str) -> None:
    layer = xprnn.RNN(3, 5, 2, "relu", False, True, 0.25, True)
    assert layer.options == {
        "input_size": 3,
        "hidden_size": 5,
        "num_layers": 2,
        "nonlinearity": "relu",
        "bias": False,
        "batch_first": True,
        "dropout": 0.25,
        "bidirectional": True,
        "seed": layer.options["seed"],
    }
    x = normal(0, 2, 4, 3, dtype="float32")
    assert_same(layer(x), xprnn.RNN(**layer.options)(x))
