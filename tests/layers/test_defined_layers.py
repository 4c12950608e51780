"""`xprnn.Recurrent` and `RecurrentCell`: layers of definitions, by the plain code.

The reference is torch's autograd over the steps of each row, one row at a time. The same by
compiled code: `kernels/numba/test_definitions.py`.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support import definitions
from tests.support.cases import move
from tests.support.definitions import DEFINITIONS, SIZES
from tests.support.torch_cases import on_one_thread
from tests.support.torch_definition import torch_step
from xprnn.backend import Backend
from xprnn.core import dropout

BOUND, REORDERED = 1e-10, 1e-12
NAMES = sorted(DEFINITIONS)
MASKED = ("recurrent_dropout", "zoneout")
Results = dict[str, Any]


@pytest.fixture(autouse=True)
def plain_code() -> Iterator[None]:
    """Compiling takes seconds for each cell."""
    with xprnn.use_kernels("reference"):
        yield


@dataclass(frozen=True)
class Case:
    """A layer, and how it is called."""

    name: str
    layers: int = 1
    directions: int = 1
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] | None = (4, 0, 6, 2)
    states: bool = True
    dropout: float = 0.0
    T: int = 6
    N: int = 4
    I: int = 3  # noqa: E741
    H: int = 4

    @property
    def sizes(self) -> dict[str, int]:
        return SIZES.get(self.name, {})


def build(case: Case, backend: str = "numpy", **options: Any) -> Any:
    layer = xprnn.Recurrent(
        DEFINITIONS[case.name],
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == 2,
        dropout=case.dropout,
        **{"dtype": "float64", "seed": 5, **options},
        **case.sizes,
        backend=backend,
    )
    return layer.train()


def as_tuple(states: Any) -> tuple[Any, ...]:
    return states if isinstance(states, tuple) else (states,)


def bare(states: Any) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


class Problem:
    """The arrays of a call and of its backward pass, on the host."""

    def __init__(self, case: Case, layer: Any) -> None:
        rng = np.random.default_rng(7)
        spec = layer._spec
        outer = (case.N, case.T) if case.batch_first else (case.T, case.N)
        shapes = [(case.layers * case.directions, case.N, size) for size in spec.state_sizes]
        self.x = rng.standard_normal((*outer, case.I))
        self.states = [rng.standard_normal(shape) for shape in shapes]
        if case.name == "slstm":  # a divisor
            self.states[2] = abs(self.states[2]) + 0.5
        self.inputs = {name: rng.random(outer) for name in spec.cell.extra_inputs}
        self.doutput = rng.standard_normal((*outer, case.directions * spec.output_size))
        self.dstates = [rng.standard_normal(shape) for shape in shapes]


def run(case: Case, layer: Any, problem: Problem, lengths: Any = "of case") -> Results:
    """All results and gradients, on the host."""
    backend = layer.backend
    hx = bare([move(backend, state) for state in problem.states]) if case.states else None
    inputs = {name: move(backend, value) for name, value in problem.inputs.items()}
    lengths = case.lengths if lengths == "of case" else lengths
    output, final = layer(move(backend, problem.x), hx, lengths=lengths, **inputs)
    dfinal = bare([move(backend, d) for d in problem.dstates])
    dx, dinitial = layer.backward(move(backend, problem.doutput), dfinal)
    results = {"output": output, "dx": dx}
    results |= {f"final {k}": state for k, state in enumerate(as_tuple(final))}
    results |= {f"dinitial {k}": state for k, state in enumerate(as_tuple(dinitial))}
    results |= {f"d{name}": gradient for name, gradient in layer.grads.items()}
    return {name: xprnn.to_numpy(value) for name, value in results.items()}


def as_defined(case: Case) -> Any:
    """A step of the definition itself, on tensors of one row."""
    definition = DEFINITIONS[case.name]
    gates, names = definition.signature.gates, definition.signature.states

    def step(own: Any, x: Any, states: Any, inputs: Any, masks: Any, direction: int) -> Any:
        gx = x @ own["weight_ih"].T
        if "bias_ih" in own:
            gx = gx + own["bias_ih"]
        by_gate = dict(zip(gates, gx.chunk(len(gates), 1), strict=True))
        named = dict(zip(names, states, strict=True))
        return torch_step(definition, {}, own, by_gate, named, inputs, masks)

    return step


@on_one_thread
def by_torch(case: Case, layer: Any, problem: Problem, step: Any = None) -> Results:
    """The same by torch, row by row.

    :param step: from a direction's parameters, x, states, inputs and masks of one row and the
        direction to the next states; None: that of the definition.
    """
    import torch

    step = step or as_defined(case)

    def tensor(array: Any) -> Any:
        return torch.tensor(xprnn.to_numpy(array), requires_grad=True)

    spec = layer._spec
    x = torch.tensor(problem.x, requires_grad=True)
    starts = [
        np.full(s.shape, v) for s, v in zip(problem.states, spec.cell.initial_values, strict=True)
    ]
    initial = [tensor(state) for state in (problem.states if case.states else starts)]
    parameters = {name: tensor(value) for name, value in layer.parameters.items()}
    D = case.directions
    # a row's sequence of each layer, (T, width)
    steps = x.transpose(0, 1) if case.batch_first else x
    lengths = case.lengths or (case.T,) * case.N
    rows = [[steps[t, n] for t in range(lengths[n])] for n in range(case.N)]
    ends = [[[None] * case.N for _ in range(case.layers * D)] for _ in initial]
    for layer_number in range(case.layers):
        outputs: list[list[list[Any]]] = [[] for _ in range(case.N)]
        for d in range(D):
            suffix = f"_l{layer_number}" + ("_reverse" if d else "")
            own = {
                name.removesuffix(suffix): value
                for name, value in parameters.items()
                if name.endswith(suffix) and (d or not name.endswith("_reverse"))
            }
            for n, row in enumerate(rows):
                at = layer_number * D + d
                states = [state[at, n : n + 1] for state in initial]
                found: list[Any] = [None] * len(row)
                for t in range(len(row))[:: -1 if d else 1]:
                    host = (n, t) if case.batch_first else (t, n)
                    inputs = {
                        name: torch.tensor(value[host]).reshape(1, 1)
                        for name, value in problem.inputs.items()
                    }
                    masks = [
                        torch.tensor(mask_of(layer, place, mask, (layer_number, d, t, n), case.H))
                        for place, mask in enumerate(spec.cell.masks)
                    ]
                    states = step(own, row[t][None], states, inputs, masks, d)
                    found[t] = states[0][0]
                outputs[n].append(found)
                for k, state in enumerate(states):
                    ends[k][at][n] = state[0]
        rows = [
            [torch.cat([found[t] for found in each]) for t in range(len(each[0]))]
            for each in outputs
        ]
    final = [torch.stack([torch.stack(row) for row in each]) for each in ends]
    total = sum((e * torch.tensor(d)).sum() for e, d in zip(final, problem.dstates, strict=True))
    output = np.zeros(problem.doutput.shape)
    for n, row in enumerate(rows):
        for t, value in enumerate(row):
            host = (n, t) if case.batch_first else (t, n)
            output[host] = value.detach().numpy()
            total = total + (value * torch.tensor(problem.doutput[host])).sum()
    total.backward()

    def grad(value: Any) -> Any:
        return np.zeros(value.shape) if value.grad is None else value.grad.numpy()

    results = {"output": output, "dx": grad(x)}
    results |= {f"final {k}": state.detach().numpy() for k, state in enumerate(final)}
    results |= {f"dinitial {k}": grad(state) for k, state in enumerate(initial)}
    return results | {f"d{name}": grad(value) for name, value in parameters.items()}


def mask_of(layer: Any, place: int, mask: Any, at: tuple[int, ...], H: int) -> np.ndarray:
    """The mask of one step of one row, (1, H)."""
    number, d, t, n = at
    seed, call = layer.options["seed"], layer._calls
    step = np.array([0 if mask.per_sequence else t]), np.array([n])
    return dropout.keep(np, mask.rate, (seed, call, number, d, place), step, H, np.float64)


def assert_equal(actual: Results, expected: Results, bound: float = BOUND) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        same = np.isinf(value) & (actual[name] == value)
        difference = np.abs(np.where(same, 0.0, actual[name]) - np.where(same, 0.0, value))
        size = np.abs(np.where(same, 0.0, value)).max(initial=1.0)
        assert difference.max(initial=0.0) <= bound * size, f"{name}: {difference.max():.1e}"


# -- layers


def check(case: Case, backend: str = "numpy") -> None:
    layer = build(case, backend)
    problem = Problem(case, layer)
    expected = by_torch(case, layer, problem)
    assert_equal(run(case, layer, problem), expected)


@pytest.mark.parametrize("name", NAMES)
def test_equal_autograd(name: str, any_backend: Backend) -> None:
    case = Case(name, layers=2, directions=2)
    check(case, any_backend.name)
    check(replace(case, lengths=None, bias=False, states=False), any_backend.name)
    check(replace(case, batch_first=True, directions=1), any_backend.name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [{"T": 0}, {"T": 1}, {"N": 1}, {"N": 0}, {"H": 1}], ids=str)
def test_edge_sizes(name: str, sizes: dict[str, int]) -> None:
    case = Case(name, layers=2, directions=2, lengths=None, **sizes)
    layer = build(case)
    problem = Problem(case, layer)
    if case.T and case.N:
        expected = by_torch(case, layer, problem)
        assert_equal(run(case, layer, problem), expected)
    else:
        results = run(case, layer, problem)
        for k, state in enumerate(problem.states):
            assert np.array_equal(results[f"final {k}"], state)
            assert np.array_equal(results[f"dinitial {k}"], problem.dstates[k])
        assert not any(results[f"d{name}"].any() for name in layer.parameters)


BUILT_IN = {
    "gru": (xprnn.GRU, {}),
    "gru2014": (xprnn.GRU, {"reset_after": False}),
    "lstm": (xprnn.LSTM, {}),
}


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_equal_built_in_layers(name: str, any_backend: Backend) -> None:
    """With dropout, whose masks are the same."""
    case = Case(name, layers=2, directions=2, dropout=0.4)
    layer = build(case, any_backend.name)
    kind, options = BUILT_IN[name]
    other = kind(
        case.I,
        case.H,
        2,
        bidirectional=True,
        dropout=0.4,
        dtype="float64",
        seed=5,
        backend=any_backend.name,
        **options,
    ).train()
    for parameter, value in other.parameters.items():  # drawn alike
        assert np.array_equal(xprnn.to_numpy(layer.parameters[parameter]), xprnn.to_numpy(value))
    problem = Problem(case, layer)
    with xprnn.use_kernels("reference"):
        assert_equal(run(case, layer, problem), run(case, other, problem), REORDERED)


@pytest.mark.parametrize("name", sorted({*NAMES} - {*MASKED}))
def test_a_function_equals_its_layer(name: str) -> None:
    case = Case(name)
    layer = build(case)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    parameters = {n.removesuffix("_l0"): value for n, value in layer.parameters.items()}
    output, final, cache = xprnn.functional.recurrent_forward(
        DEFINITIONS[name],
        problem.x,
        bare(problem.states),
        parameters,
        lengths=case.lengths,
        **problem.inputs,
        **case.sizes,
    )
    gradients = xprnn.functional.recurrent_backward(problem.doutput, bare(problem.dstates), cache)
    assert np.array_equal(output, expected["output"])
    for k, (state, end) in enumerate(
        zip(layer._spec.cell.state_names, as_tuple(final), strict=True)
    ):
        assert np.array_equal(end, expected[f"final {k}"])
        assert np.array_equal(gradients[f"d{state}0"], expected[f"dinitial {k}"])
    for parameter in parameters:
        assert np.array_equal(gradients[f"d{parameter}"], expected[f"d{parameter}_l0"])
    fewer = {"weight_ih": parameters["weight_ih"], "bias_ih": parameters["bias_ih"], "more": 0}
    with pytest.raises(ValueError, match=r"parameters: expected weight_ih, .*, more$"):
        xprnn.functional.recurrent(DEFINITIONS[name], problem.x, None, fewer, **case.sizes)


def test_functions_draw_no_masks() -> None:
    layer = build(Case("zoneout"))
    parameters = {n.removesuffix("_l0"): value for n, value in layer.parameters.items()}
    x = np.ones((3, 2, 3))
    output = xprnn.functional.recurrent(definitions.zoneout, x, None, parameters)[0]
    assert np.array_equal(output, layer.eval()(x)[0])
    with pytest.raises(ValueError, match=r"zoneout has random masks; use xprnn\.Recurrent"):
        xprnn.functional.recurrent_forward(definitions.zoneout, x, None, parameters)


def test_parameters_have_the_names_of_torch_and_of_the_definition() -> None:
    def shapes(name: str, **sizes: int) -> dict[str, tuple[int, ...]]:
        return dict(xprnn.Recurrent(DEFINITIONS[name], 3, 4, **sizes).parameters.shapes)

    assert shapes("min_gru") == {"weight_ih_l0": (8, 3), "bias_ih_l0": (8,)}
    assert shapes("projected", proj_size=2) == {
        "weight_ih_l0": (16, 3),
        "weight_hh_l0": (16, 2),
        "bias_ih_l0": (16,),
        "bias_hh_l0": (16,),
        "proj_l0": (2, 4),
        "proj_bias_l0": (2,),
    }
    assert shapes("onnx_lstm")["p_i_l0"] == (4,)
    assert shapes("multiplicative_lstm")["weight_hh_l0"] == (20, 4)
    assert shapes("multiplicative_lstm")["bias_hh_l0"] == (16,)
    two = xprnn.Recurrent(DEFINITIONS["projected"], 3, 4, 2, bidirectional=True, proj_size=2)
    assert two.parameters.shapes["weight_ih_l1_reverse"] == (16, 4)
    assert two.parameters.shapes["proj_l1_reverse"] == (2, 4)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_get_no_gradient(name: str) -> None:
    case = Case(name, layers=2)
    layer = build(case)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    layer.zero_grad()
    frozen = [n for k, n in enumerate(layer.parameters) if k % 2]
    layer.freeze(*frozen)
    layer._calls = 0
    results = run(case, layer, problem)
    for parameter in layer.parameters:
        value = results[f"d{parameter}"]
        assert np.array_equal(
            value, 0 * value if parameter in frozen else expected[f"d{parameter}"]
        )


@pytest.mark.parametrize("name", NAMES)
def test_recompute(name: str) -> None:
    for lengths in (None, (4, 0, 6, 2)):
        case = Case(name, layers=2, directions=2, lengths=lengths)
        layer = build(case)
        problem = Problem(case, layer)
        expected = run(case, layer, problem)
        for k in (1, 4, 9):
            other = build(case, recompute=k)
            assert_equal(run(case, other, problem), expected, REORDERED)


def as_float32(problem: Problem) -> Problem:
    """In place."""
    for key in ("x", "doutput"):
        setattr(problem, key, getattr(problem, key).astype(np.float32))
    for key in ("states", "dstates"):
        setattr(problem, key, [state.astype(np.float32) for state in getattr(problem, key)])
    problem.inputs = {n: value.astype(np.float32) for n, value in problem.inputs.items()}
    return problem


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    case = Case(name, layers=2, directions=2)
    layer, single = build(case), build(case, dtype="float32")
    layer.load_state_dict(single.state_dict())
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    results = run(case, single, as_float32(problem))
    assert all(value.dtype == np.float32 for value in results.values())
    assert_equal(results, expected, 2e-4)


@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision(name: str, compute_dtype: str, any_backend: Backend) -> None:
    """The same equations, up to the rounding of what is stored; no kink is near."""
    case = Case(name, directions=2)
    single = build(case, any_backend.name, dtype="float32")
    low = build(case, any_backend.name, dtype="float32", compute_dtype=compute_dtype)
    problem = as_float32(Problem(case, single))
    results, expected = run(case, low, problem), run(case, single, problem)
    bound = {"float16": 0.01, "bfloat16": 0.1}[compute_dtype]
    assert all(value.dtype == np.float32 for value in results.values())
    for key in ("output", "dx", "dweight_ih_l0"):
        difference = np.abs(results[key] - expected[key]).max()
        assert 0 < difference <= bound * np.abs(expected[key]).max(), key


# -- one step at a time


@pytest.mark.parametrize("name", NAMES)
def test_a_stepper_equals_the_sequence(name: str, any_backend: Backend) -> None:
    case = Case(name, layers=2, states=False, lengths=None)
    layer = build(case, any_backend.name).eval()
    problem = Problem(case, layer)
    inputs = {n: move(any_backend, value) for n, value in problem.inputs.items()}
    output, final = layer(move(any_backend, problem.x), **inputs)
    output = xprnn.to_numpy(output)
    stepper = layer.stepper(case.N)
    for t in range(case.T):
        at_t = {n: move(any_backend, value[t]) for n, value in problem.inputs.items()}
        h = stepper.step(move(any_backend, problem.x[t]), **at_t)
        np.testing.assert_allclose(xprnn.to_numpy(h), output[t], rtol=0, atol=REORDERED)
    for state, end in zip(as_tuple(stepper.state()), as_tuple(final), strict=True):
        np.testing.assert_allclose(xprnn.to_numpy(state), xprnn.to_numpy(end), atol=REORDERED)
    stepper.reset([1, 3])  # these streams begin again
    at_0 = {n: move(any_backend, value[0]) for n, value in problem.inputs.items()}
    h = xprnn.to_numpy(stepper.step(move(any_backend, problem.x[0]), **at_0))
    np.testing.assert_allclose(h[[1, 3]], output[0][[1, 3]], rtol=0, atol=REORDERED)
    assert not np.allclose(h[[0, 2]], output[0][[0, 2]])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_of_one_step_equals_the_sequence(name: str) -> None:
    case = Case(name, layers=2, states=False, lengths=None)
    layer = build(case).eval()
    problem = Problem(case, layer)
    output, _ = layer(problem.x, **problem.inputs)
    first, _ = layer(problem.x[:1], **{n: value[:1] for n, value in problem.inputs.items()})
    np.testing.assert_allclose(first, output[:1], rtol=0, atol=REORDERED)


@pytest.mark.parametrize(
    ("name", "training"),
    # in train mode each call of a cell draws masks of its own
    [(n, t) for n in NAMES for t in (True, False) if not t or n not in MASKED],
)
def test_a_cell_equals_the_layer(name: str, training: bool) -> None:
    case = Case(name, lengths=None)
    layer = build(case)
    cell = xprnn.RecurrentCell(
        DEFINITIONS[name], case.I, case.H, dtype="float64", seed=5, **case.sizes
    )
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in layer.parameters.items()})
    (cell if training else layer).training = training
    problem = Problem(case, layer)
    output, final = layer(problem.x, bare(problem.states), **problem.inputs)
    states = bare([state[0] for state in problem.states])
    for t in range(case.T):
        states = cell(problem.x[t], states, **{n: v[t] for n, v in problem.inputs.items()})
        np.testing.assert_allclose(as_tuple(states)[0], output[t], rtol=0, atol=REORDERED)
    for state, end in zip(as_tuple(states), as_tuple(final), strict=True):
        np.testing.assert_allclose(state, end[0], rtol=0, atol=REORDERED)
    if not training:
        return
    dx, dinitial = layer.backward(problem.doutput, bare(problem.dstates))
    dstates = [d[0].copy() for d in problem.dstates]
    for t in reversed(range(case.T)):
        dstates[0] = dstates[0] + problem.doutput[t]
        dx_t, before = cell.backward(bare(dstates))
        np.testing.assert_allclose(dx_t, dx[t], rtol=0, atol=BOUND)
        dstates = [*as_tuple(before)]
    for d, end in zip(dstates, as_tuple(dinitial), strict=True):
        np.testing.assert_allclose(d, end[0], rtol=0, atol=BOUND)
    for parameter, gradient in cell.grads.items():
        np.testing.assert_allclose(gradient, layer.grads[f"{parameter}_l0"], rtol=0, atol=BOUND)


# -- masks and inputs


def test_a_mask_is_zero_at_its_rate_and_the_same_for_a_sequence() -> None:
    shape = np.arange(2000), np.zeros(2000, int)
    mask = dropout.keep(np, 0.3, (1, 2, 3), shape, 50, np.float64)
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert abs(mask.mean() - 0.7) < 0.01
    other = dropout.keep(np, 0.3, (1, 2, 4), shape, 50, np.float64)
    assert abs((mask * other).mean() - 0.49) < 0.01


def test_masks_differ_by_call_and_row_and_not_by_order_of_rows() -> None:
    case = Case("zoneout", lengths=None, states=False)
    layer = build(case)
    x = np.ones((case.T, case.N, case.I))
    first, second = layer(x)[0], layer(x)[0]
    assert not np.allclose(first, second)
    assert not np.allclose(first[:, 0], first[:, 1])
    layer.eval().train()
    layer._calls = 0
    lengths = (2, case.T, 4, case.T)
    ragged = layer(x, lengths=lengths)[0]
    for n, length in enumerate(lengths):
        np.testing.assert_allclose(ragged[:length, n], first[:length, n], rtol=0, atol=REORDERED)


def test_a_cell_needs_to_know_where_a_sequence_begins() -> None:
    cell = xprnn.RecurrentCell(definitions.recurrent_dropout, 3, 4, seed=0, dtype="float64")
    x = np.ones((2, 3))
    cell(x)  # in eval mode there are no masks
    cell.train()
    with pytest.raises(RuntimeError, match=r"recurrent_dropout: .* call new_sequence\(\)"):
        cell(x)
    state = (np.ones((2, 4)), np.ones((2, 4)))
    cell.new_sequence()
    same = [cell(x, state)[0] for _ in range(2)]
    assert np.array_equal(*same)
    cell.new_sequence()
    assert not np.array_equal(cell(x, state)[0], same[0])
    assert np.array_equal(copy.copy(cell)(x, state)[0], cell(x, state)[0])


def test_inputs_are_checked() -> None:
    layer = xprnn.Recurrent(definitions.continuous, 3, 4, seed=0)
    x = np.ones((5, 2, 3), np.float32)
    with pytest.raises(TypeError, match=r"dt: expected an array \(5, 2\), an input of the cell"):
        layer(x)
    with pytest.raises(ValueError, match=r"dt: expected shape \(5, 2, 1\), got \(4, 2, 1\)"):
        layer(x, dt=np.ones((4, 2, 1), np.float32))
    with pytest.raises(TypeError, match="step: the cell has no such input; expected dt"):
        layer(x, dt=np.ones((5, 2), np.float32), step=1)
    one = layer(x[:, 0], dt=np.ones(5, np.float32))[0]
    both = layer(x, dt=np.ones((5, 2), np.float32))[0]
    np.testing.assert_allclose(one, both[:, 0], rtol=1e-6)


def test_options_change_the_cell() -> None:
    x, dt = np.ones((5, 2, 3)), np.ones((5, 2))

    def output(**options: float) -> Any:
        layer = xprnn.Recurrent(definitions.continuous, 3, 4, dtype="float64", seed=0, **options)
        return layer(x, dt=dt)[0]

    assert np.array_equal(output(), output(leak=0.1))
    assert not np.allclose(output(), output(leak=0.2))
    with pytest.raises(TypeError, match="leak: expected float, got 'a'"):
        output(leak="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rate: the cell continuous has no such argument"):
        output(rate=1.0)
    with pytest.raises(TypeError, match="proj_size: expected a size"):
        xprnn.Recurrent(definitions.projected, 3, 4)
    with pytest.raises(TypeError, match=r"definition: expected what xprnn\.cell makes"):
        xprnn.Recurrent(lambda f, x, s: x.a, 3, 4)  # type: ignore[arg-type]


# -- files, copies, and checks


@pytest.mark.parametrize("kind", ["layer", "cell"])
@pytest.mark.parametrize("name", NAMES)
def test_files(name: str, kind: str, tmp_path: Path) -> None:
    definition, case = DEFINITIONS[name], Case(name)
    if kind == "layer":
        module = build(case)
    else:
        module = xprnn.RecurrentCell(definition, 3, 4, seed=1, **case.sizes)
    path = tmp_path / "file.safetensors"
    module.save(path)
    loaded = xprnn.load(path, cells=[definitions.gru2014, definition])
    assert type(loaded) is type(module)
    assert loaded.options == module.options
    for parameter, value in module.parameters.items():
        assert np.array_equal(loaded.parameters[parameter], value)
    for clone in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert clone.definition is definition
        assert clone.options == module.options
        assert repr(clone) == repr(module)
        assert all(
            np.array_equal(clone.parameters[n], value) for n, value in module.parameters.items()
        )


def test_a_file_needs_its_definition(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    xprnn.Recurrent(definitions.li_gru, 3, 4, seed=0).save(path)
    assert b"tests.support" not in path.read_bytes()  # no module, from which one could import
    with pytest.raises(ValueError, match=r"defined by 'li_gru', .* cells=\[li_gru\] \(got none\)"):
        xprnn.load(path)
    with pytest.raises(ValueError, match=r"cells=\[li_gru\] \(got gru, lstm\)"):
        xprnn.load(path, cells=[definitions.gru, definitions.lstm])

    def li_gru(f: Any, x: Any, s: Any) -> Any:
        gh = f.recurrent(s.h)
        z, n = f.sigmoid(x.z + gh.z), f.tanh(x.n + gh.n)
        return n + z * (s.h - n)

    other = xprnn.cell(gates=("z", "n"))(li_gru)
    with pytest.raises(ValueError, match=r"by other equations than those of the 'li_gru' in cells"):
        xprnn.load(path, cells=[other])
    xprnn.GRU(3, 4, seed=0).save(path)
    xprnn.load(path, cells=[other])  # built-in cells need none, and ignore others


@pytest.mark.parametrize("name", NAMES)
def test_diagnostics(name: str) -> None:
    """`gradcheck`, `verify`, `gradient_flow` and `explain`."""
    case = Case(name, directions=2, T=3, N=2, H=2, lengths=(3, 1))
    layer = build(case)
    problem = Problem(case, layer)
    x, hx = problem.x, bare(problem.states)
    report = xprnn.gradcheck(layer, x, hx, lengths=case.lengths, directions=1, **problem.inputs)
    assert report.worst.excess <= 1
    text = layer.explain((case.T, case.N, case.I))
    assert text.startswith("Recurrent(3, 2) on numpy")
    if problem.inputs:
        return
    if name != "every_function":  # whose gradients cancel
        single = build(replace(case, H=6), dtype="float32")
        report = xprnn.verify(single, (3, 2, 3), lengths=case.lengths)
        assert report.ok, str(report)
    flow = xprnn.gradient_flow(layer, problem.x, hx)
    assert flow.norms.shape == (2, 3)
    assert np.isfinite(flow.norms).all()


def test_explain_says_what_is_saved() -> None:
    text = build(Case("gru")).explain((10, 2, 3))
    assert "saved of each step: add, sigmoid, sigmoid, tanh" in text
    assert "a step: 15 operations, phases: 1; backward 18 operations, phases: 2" in text
    built_in = xprnn.GRU(3, 4, dtype="float64", seed=0).explain((10, 2, 3))
    (moved,) = [line for line in text.splitlines() if "moves at least" in line]
    assert moved in built_in.splitlines()


def test_a_wrong_gradient_of_a_layer_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `gradcheck`: masks drawn again in the backward pass are others."""
    layer = build(Case("zoneout"))
    x = np.random.default_rng(0).standard_normal((4, 2, 3))
    xprnn.gradcheck(layer, x)
    right, calls = dropout.keep, []

    def others(xp: Any, rate: float, key: Any, *rest: Any) -> Any:
        calls.append(key)
        return right(xp, rate, (*key, len(calls)), *rest)

    monkeypatch.setattr(dropout, "keep", others)
    with pytest.raises(xprnn.GradientError):
        xprnn.gradcheck(layer, x)
    assert calls


def test_initial_values_hold_where_a_state_begins() -> None:
    layer = xprnn.Recurrent(definitions.slstm, 3, 4, 2, bidirectional=True, seed=0)
    x = np.ones((5, 3, 3), np.float32)
    _, (h, c, n, m) = layer(x, lengths=[5, 0, 2])
    assert (m[:, 1] == -math.inf).all()
    assert not h[:, 1].any()
    assert not c[:, 1].any()
    assert not n[:, 1].any()
    assert np.isfinite(m[:, [0, 2]]).all()
    given = layer(x, (None, None, None, np.full((4, 3, 4), -np.inf, np.float32)))
    assert np.array_equal(given[0], layer(x)[0])
    stepper = xprnn.Recurrent(definitions.slstm, 3, 4, seed=0).stepper(2)
    stepper.step(x[0, :2])
    stepper.reset([0])
    assert (stepper.state()[3][0, 0] == -math.inf).all()
    assert np.isfinite(stepper.state()[3][0, 1]).all()
