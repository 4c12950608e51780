"""Functions on explicit weights equal the layers, and each of their caches can be used once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.targets import (
    FUNCTIONS,
    LAYERS,
    WEIGHTS,
    arguments,
    arrays,
    assert_same,
    backward,
    copies,
    forward,
    is_lstm,
    make,
    run,
    state_of,
)
from tests.support.tolerances import assert_close
from tests.unit.test_inputs import DEFECTS
from xprnn import functional

LENGTHS = (4, 0, 2)


def upstream(inputs: dict[str, Any], names: tuple[str, ...] = ("h", "c")) -> Any:
    """dh_n, for an LSTM (dh_n, dc_n)."""
    parts = tuple(inputs[f"d{n}_n"] for n in names if f"d{n}_n" in inputs)
    return parts if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("how", ["time first", "batch first", "unbatched"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_function_equals_its_layer(
    name: str, how: str, lengths: Any, bias: bool, dtype: str, implementation: str
) -> None:
    """Every result and every gradient, to the bit; with `forward` and without."""
    options = {"bias": bias, "batch_first": how == "batch first", "dtype": dtype}
    layer, function = make(name, **options), make(f"{name}_function", **options)
    inputs = arguments(layer, batched=how != "unbatched")
    if how == "unbatched" and lengths is not None:
        lengths = [3]
    expected = run(layer, inputs, lengths=lengths)
    assert_same(run(function, inputs, lengths=lengths), expected)

    plain = getattr(functional, name.partition("_")[0])
    hx = (inputs["h0"], inputs["c0"]) if is_lstm(name) else inputs["h0"]
    results = plain(inputs["x"], hx, *function.weights, lengths=lengths, **function.options)
    assert_same(results, expected[: len(arrays(results))])


@pytest.mark.parametrize("name", LAYERS)
def test_no_state_means_zeros(name: str, implementation: str) -> None:
    function = make(f"{name}_function")
    inputs = arguments(function)
    zeros = {n: a * 0.0 if n in ("h0", "c0") else a for n, a in inputs.items()}
    expected = run(function, zeros)
    actual = copies(function(inputs["x"], None)) + copies(backward(function, inputs))
    assert_same(actual, expected[: len(actual)])


@pytest.mark.parametrize("name", LAYERS)
def test_names_and_shapes_of_the_gradients(name: str, implementation: str) -> None:
    for bias in (True, False):
        function = make(f"{name}_function", bias=bias)
        inputs = arguments(function)
        forward(function, inputs)
        (cache,) = function.caches
        gradients = functional.backward(inputs["doutput"], upstream(inputs), cache)
        variables = {"x": inputs["x"], "h0": inputs["h0"]}
        variables |= {"c0": inputs["c0"]} if is_lstm(name) else {}
        weights = zip(WEIGHTS, function.weights, strict=True)
        variables |= {n: w for n, w in weights if w is not None}
        assert {n: g.shape for n, g in gradients.items()} == {
            f"d{n}": a.shape for n, a in variables.items()
        }
        assert all(np.abs(gradient).max() > 0.0 for gradient in gradients.values())


def test_backward_has_a_name_for_each_kind() -> None:
    for name in ("rnn_backward", "gru_backward", "lstm_backward"):
        assert getattr(functional, name) is functional.backward


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cache_can_be_used_once(name: str, implementation: str) -> None:
    function = make(name)
    inputs = arguments(function)
    expected = run(function, inputs)
    forward(function, inputs)
    (cache,) = function.caches
    actual = functional.backward(inputs["doutput"], upstream(inputs), cache)
    assert_same(actual["dx"], expected[1 + (2 if is_lstm(name) else 1)])
    for need_dx in (True, False):
        with pytest.raises(RuntimeError, match="cache: it has been used"):
            functional.backward(inputs["doutput"], upstream(inputs), cache, need_dx=need_dx)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_caches_are_independent(name: str, implementation: str) -> None:
    """Backward may run in any order; calls and their caches are independent."""
    function = make(name)
    calls = [arguments(function, T=3 + k, N=1 + k, seed=k) for k in range(3)]
    expected = [run(function, inputs) for inputs in calls]
    for inputs in calls:
        forward(function, inputs)
    for k in (1, 0, 2):
        gradients = functional.backward(
            calls[k]["doutput"], upstream(calls[k]), function.caches[k], need_dx=k != 2
        )
        assert ("dx" in gradients) == (k != 2)
        grads = [gradients[f"d{weight}"] for weight in WEIGHTS]
        assert_same(grads, expected[k][-4:], f"call {k}")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_writing_weights_after_the_call_does_not_change_backward(
    name: str, implementation: str
) -> None:
    function = make(name)
    inputs = arguments(function)
    expected = run(function, inputs)
    function.weights = [weight.copy() for weight in function.weights]
    results = copies(forward(function, inputs))
    for weight in function.weights:
        weight[...] = np.nan
    actual = results + copies(backward(function, inputs)) + list(function.layer.grads.values())
    assert_same(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_share_no_memory(name: str, implementation: str) -> None:
    function = make(name)
    inputs = arguments(function)
    forward(function, inputs)
    forward(function, inputs)
    first = functional.backward(inputs["doutput"], upstream(inputs), function.caches.pop())
    before = copies(list(first.values()))
    second = functional.backward(inputs["doutput"], upstream(inputs), function.caches.pop())
    assert_same(list(first.values()), before)
    assert_same(list(second.values()), before)
    held = [*first.values(), *second.values(), *inputs.values()]
    held += [weight for weight in function.weights if weight is not None]
    for k, one in enumerate(held):
        assert not any(np.shares_memory(one, other) for other in held[:k])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_sequence_in_chunks(name: str, implementation: str) -> None:
    """h_n of one chunk is h0 of the next; in backward, dh0 of one is dh_n of the previous one."""
    function = make(name)
    inputs = arguments(function, T=9)
    expected = run(function, inputs)
    states = ("h", "c") if is_lstm(name) else ("h",)

    bounds = [(0, 4), (4, 4), (4, 5), (5, 9)]  # one of them empty
    carried = {f"{s}0": inputs[f"{s}0"] for s in states}
    outputs = []
    for start, stop in bounds:
        output, end = forward(function, {"x": inputs["x"][start:stop], **carried})
        outputs.append(output)
        carried = dict(zip(carried, arrays(end), strict=True))
    dcarried = {f"d{s}_n": inputs[f"d{s}_n"] for s in states}
    dpieces = []
    for start, stop in reversed(bounds):
        dx, dstart = backward(function, {"doutput": inputs["doutput"][start:stop], **dcarried})
        dpieces.append(dx)
        dcarried = dict(zip(dcarried, arrays(dstart), strict=True))

    actual = [np.concatenate(outputs), *carried.values()]
    actual += [np.concatenate(dpieces[::-1]), *dcarried.values()]
    actual += list(function.layer.grads.values())
    for k, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_close(one, other, "float64", f"array {k}")


# -- weights that do not fit


@pytest.mark.parametrize("defect", ["int", "float16", "list", "masked", "wider", "one more axis"])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_weights_are_refused(
    name: str, weight: str, defect: str, implementation: str
) -> None:
    function = make(name)
    inputs = arguments(function)
    expected = run(function, inputs)
    forward(function, inputs)
    index = WEIGHTS.index(weight)
    original = function.weights[index]
    function.weights[index] = DEFECTS[defect](original)
    # a wider weight_ih requires a wider x: the error may name either
    named = f"{weight}|x" if (weight, defect) == ("weight_ih", "wider") else weight
    with pytest.raises((TypeError, ValueError), match=rf"\b({named})\b.*expected"):
        forward(function, inputs)
    function.weights[index] = original
    actual = copies(backward(function, inputs))
    assert_same(actual, expected[-len(actual) - 4 : -4])
    assert_same(run(function, inputs), expected)


@pytest.mark.parametrize("missing", WEIGHTS)
def test_a_missing_weight_is_named(missing: str) -> None:
    function = make("gru_function")
    function.weights[WEIGHTS.index(missing)] = None
    with pytest.raises(TypeError, match=rf"\b{missing}\b"):
        forward(function, arguments(function))


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("gru", "batch_first", 1),
        ("gru", "reset_after", "no"),
        ("lstm", "batch_first", None),
        ("rnn_tanh", "nonlinearity", "sigmoid"),
    ],
)
def test_a_wrong_option_is_named(name: str, option: str, value: Any) -> None:
    function = make(f"{name}_function")
    before = state_of(function)
    function.options[option] = value
    with pytest.raises((TypeError, ValueError), match=f"{option}: expected"):
        forward(function, arguments(function))
    assert_same(state_of(function), before)


@pytest.mark.parametrize(
    ("name", "dhx"), [("rnn", None), ("gru", None), ("lstm", None), ("lstm", (None, None))]
)
def test_backward_without_a_gradient_is_refused(name: str, dhx: Any, implementation: str) -> None:
    """Zeros for every parameter would hide the mistake."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[name]
    forward = getattr(functional, f"{name}_forward")
    output, _, cache = forward(np.ones((3, 2)), None, np.ones((gates, 2)), np.ones((gates, 1)))
    with pytest.raises(ValueError, match="backward: expected doutput or dhx, got None for every"):
        functional.backward(None, dhx, cache)
    assert functional.backward(output, dhx, cache)["dx"].any()  # the cache can still be used
