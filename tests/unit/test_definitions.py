"""Definitions: each derived step and gradient against torch's autograd, and against differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.definition_steps import H, N, Step, draw, ours, with_folded
from tests.support.definitions import DEFINITIONS, SIZES
from tests.support.torch_cases import on_one_thread
from tests.support.torch_definition import torch_step
from xprnn import cells
from xprnn.cells.definition import operations, saving
from xprnn.cells.definition.derived_step import DerivedStep, Leaves
from xprnn.core.cell import Buffers, Weights

BOUND = 1e-10
EXACT = 1e-14  # between two evaluations of the same equations


@on_one_thread
def by_torch(derived: DerivedStep, step: Step, definition: Any, options: Any) -> dict[str, Any]:
    """The same by torch's autograd."""
    import torch

    leaves, upstream = step

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(array, requires_grad=True)

    parameters = {name: tensor(value) for name, value in leaves.parameters.items()}
    gates = {name: tensor(value) for name, value in leaves.gates.items()}
    names = [*derived.trace.signature.states]
    states = {n: tensor(value) for n, value in zip(names, leaves.states, strict=True)}
    inputs = {name: torch.tensor(value) for name, value in leaves.inputs.items()}
    masks = [torch.tensor(mask) for mask in leaves.masks]
    result = torch_step(definition, options, parameters, gates, states, inputs, masks)
    torch.autograd.backward(result, [torch.tensor(d) for d in upstream])
    grad = {
        name: np.zeros(value.shape) if value.grad is None else value.grad.numpy()
        for name, value in {**gates, **states, **parameters}.items()
    }
    results = {f"next {k}": value.detach().numpy() for k, value in enumerate(result)}
    results |= {f"d{k}": states[name].grad for k, name in enumerate(names)}
    results |= {f"dgx {name}": gates[name].grad for name in gates}
    for name, matrix in derived.trace.matrices.items():
        blocks = matrix.blocks or ("",)
        if matrix.columns is None:
            results[f"d {name}"] = grad[name]
            continue
        for block, d in zip(blocks, np.split(grad[name], len(blocks)), strict=True):
            results[f"d {name}.{block}"] = d
        if "bias_hh" in parameters and matrix.biased:
            for gate, d in zip(
                matrix.biased, np.split(grad["bias_hh"], len(matrix.biased)), strict=True
            ):
                results[f"d b_hh.{gate}"] = d
    results |= {f"d {name}": grad[name] for name in derived.trace.signature.vectors}
    return {
        name: np.zeros(()) if value is None else np.asarray(value)
        for name, value in results.items()
    }


def assert_equal(actual: dict[str, Any], expected: dict[str, Any], bound: float = BOUND) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(np.asarray(actual[name]) - value).max() / max(np.abs(value).max(), 1.0)
        assert error <= bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_a_step_and_every_gradient_equal_autograd(name: str, bias: bool) -> None:
    definition = DEFINITIONS[name]
    derived = definition.derive(H, SIZES.get(name, {}), {}, bias)
    for seed in range(3):
        step = draw(derived, bias, seed)
        assert_equal(ours(derived, step), by_torch(derived, step, definition, {}))


def test_states_that_begin_at_minus_infinity() -> None:
    """The sLSTM's first step, whose gradients are finite."""
    definition = DEFINITIONS["slstm"]
    derived = definition.derive(H, {}, {}, True)
    step = draw(derived, True)
    h, c, n, m = (np.zeros((N, H)) for _ in range(4))
    leaves = step.leaves._replace(states=(h, c, n, m - np.inf))
    for shift in (0.0, -800.0):
        gates = {**leaves.gates, "i": leaves.gates["i"] + shift}
        first = Step(leaves._replace(gates=gates), step.upstream)
        results = ours(derived, first)
        assert all(np.isfinite(value).all() for name, value in results.items() if name != "next 3")
        assert_equal(results, by_torch(derived, first, definition, {}))


# -- what is saved

SAVED = {
    "gru": ["add", "sigmoid", "sigmoid", "tanh"],  # gh_n, r, z, n
    "gru2014": ["sigmoid", "sigmoid", "tanh"],
    "lstm": ["sigmoid", "sigmoid", "sigmoid", "tanh", "tanh"],  # i, f, o, g, tanh(c')
    "li_gru": ["relu", "sigmoid"],
    "min_gru": ["sigmoid", "sub"],  # z, n - h
    "min_lstm": ["gate", "sigmoid", "sigmoid"],  # the quotient is the next state
}
BIAS_FOLDED = {"gru": ("r", "z"), "lstm": ("i", "f", "g", "o"), "layer_norm_lstm": ()}


@pytest.mark.parametrize("name", sorted(SAVED))
def test_what_is_saved(name: str) -> None:
    derived = DEFINITIONS[name].derive(H, {}, {}, True)
    assert sorted(node.op for node in derived.saved) == SAVED[name]
    assert all(node.width == H for node in derived.saved)


@pytest.mark.parametrize("name", sorted(BIAS_FOLDED))
def test_where_dgx_is_dgh(name: str) -> None:
    assert DEFINITIONS[name].derive(H, {}, {}, True).bias_folded == BIAS_FOLDED[name]
    assert DEFINITIONS[name].derive(H, {}, {}, False).bias_folded == ()


def test_the_gru_saves_gh_n_and_not_its_parts() -> None:
    derived = DEFINITIONS["gru"].derive(H, {}, {}, True)
    (gh_n,) = [node for node in derived.saved if node.op == "add"]
    assert [arg.op for arg in gh_n.args] == ["part", "vector"]


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_a_branch_is_decided_by_saved_bits(name: str) -> None:
    """What the backward step compares is read, or computed without rounding from what is."""
    derived = DEFINITIONS[name].derive(H, SIZES.get(name, {}), {}, True)
    given = set(derived._given())
    todo = [arg for node in derived.backward_nodes if node.is_condition for arg in node.args]
    while todo:
        node = todo.pop()
        if node not in given and node.args:
            assert operations.OPERATIONS[node.op].again is operations.Again.EXACT, node
            todo += node.args


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_functions_and_products_are_not_computed_again(name: str) -> None:
    """Nor are values saved that are not read; what all rows share costs nothing."""
    derived = DEFINITIONS[name].derive(H, SIZES.get(name, {}), {}, True)
    forward, backward = set(derived.forward_nodes), derived.backward_nodes
    for node in backward:
        if node in forward and node.has_rows and node.op in operations.OPERATIONS:
            assert operations.OPERATIONS[node.op].again is not operations.Again.NEVER, node
        assert node not in forward or node.op not in ("product", "gate")
    read = {arg for node in backward for arg in node.args}
    assert all(node in read for node in derived.saved)


def test_phases() -> None:
    """Products and sums over rows begin a phase; a phase reads only earlier ones."""
    counts = {"gru": (1, 2), "gru2014": (2, 3), "lstm": (1, 2), "min_gru": (1, 1)}
    for name, (forward, backward) in counts.items():
        derived = DEFINITIONS[name].derive(H, {}, {}, True)
        assert len(derived.forward_phases) == forward, name
        assert len(derived.backward_phases) == backward, name
    for name, definition in DEFINITIONS.items():
        derived = definition.derive(H, SIZES.get(name, {}), {}, True)
        for cut in (derived.forward_phases, derived.backward_phases):
            computed = {node for phase in cut for part in phase for node in part}
            done: set[Any] = set()
            for barriers, elementwise in cut:
                for node in barriers:
                    assert all(arg in done or arg not in computed for arg in node.args)
                done |= {*barriers}
                for node in elementwise:
                    assert all(arg in done or arg not in computed for arg in node.args)
                    done.add(node)
            assert done == computed


# -- other evaluations of the same equations


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("name", "written"), [("gru", "gru"), ("gru2014", "gru_reset_before"), ("lstm", "lstm")]
)
def test_definitions_equal_hand_written_cells(name: str, written: str, bias: bool) -> None:
    derived = DEFINITIONS[name].derive(H, {}, {}, bias)
    step = draw(derived, bias)
    leaves, cell = step.leaves, cells.CELLS[written]
    gx = np.concatenate([*with_folded(derived, leaves).values()], axis=1) if bias else None
    gx = np.concatenate([*leaves.gates.values()], axis=1) if gx is None else gx
    W, b = leaves.parameters["weight_hh"], leaves.parameters.get("bias_hh")
    assert (b is not None) == bias
    if name == "gru2014" and bias:
        assert derived.bias_folded == ("r", "z", "n")
    weights = Weights(np.zeros((len(W), 1)), W, b, b)
    saved, following = np.zeros((N, cell.saved * H)), tuple(map(np.zeros_like, leaves.states))

    def buffers(dstates: Any, widths: Any) -> Buffers:
        scratch = tuple(np.zeros((N, width * H)) for width in widths)
        return Buffers(gx, saved, leaves.states, following, dstates, scratch)

    dstates = tuple(d.copy() for d in step.upstream)
    cell.forward(np, weights, buffers((), cell.forward_scratch))
    cell.backward(np, weights, buffers(dstates, cell.backward_scratch))
    dgh = gx.copy()
    cell.to_input_side(gx, saved)
    results = ours(derived, step)
    expected = {f"next {k}": state for k, state in enumerate(following)}
    expected |= {f"d{k}": d for k, d in enumerate(dstates)}
    for k, gate in enumerate(cell.gate_names):
        part = slice(k * H, (k + 1) * H)
        expected[f"dgx {gate}"] = gx[:, part]
        if bias:
            expected[f"d b_hh.{gate}"] = dgh[:, part].sum(0)
        operand = saved if name == "gru2014" and gate == "n" else leaves.states[0]
        expected[f"d weight_hh.{gate}"] = dgh[:, part].T @ operand
    assert_equal(results, expected, EXACT)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_evaluation_on_the_array_api(name: str) -> None:
    """With the functions and the types of the standard alone."""
    xp = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    derived = DEFINITIONS[name].derive(H, SIZES.get(name, {}), {}, True)
    for dtype, bound in (("float64", EXACT), ("float32", 1e-5)):
        step = draw(derived, True)

        def moved(value: Any, dtype: str = dtype) -> Any:
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            return xp.asarray(value.astype(dtype))

        strict = Step(Leaves(*map(moved, step.leaves)), moved(step.upstream))
        results = ours(derived, strict, xp)
        arrays = [value for value in results.values() if not isinstance(value, float)]  # 0.0
        assert all(value.dtype == getattr(xp, dtype) for value in arrays)
        assert_equal(results, ours(derived, step), bound)


# -- kinks

KINKS = {
    "relu": (lambda f, a: f.relu(a), 0.0, 0.0),
    "abs": (lambda f, a: f.abs(a), 0.0, 0.0),
    "clip, low": (lambda f, a: f.clip(a, -0.5, 0.5), -0.5, 1.0),
    "clip, high": (lambda f, a: f.clip(a, -0.5, 0.5), 0.5, 1.0),
    "clip, outside": (lambda f, a: f.clip(a, -0.5, 0.5), 0.75, 0.0),
    "hard_sigmoid, 0": (lambda f, a: f.hard_sigmoid(a, 0.25, 0.5), -2.0, 0.0),
    "hard_sigmoid, 1": (lambda f, a: f.hard_sigmoid(a, 0.25, 0.5), 2.0, 0.0),
    "hard_sigmoid, within": (lambda f, a: f.hard_sigmoid(a, 0.25, 0.5), 1.0, 0.25),
    "minimum": (lambda f, a: f.minimum(a, 1.0), 1.0, 0.5),
    "maximum": (lambda f, a: f.maximum(1.0, a), 1.0, 0.5),
    "maximum of one value": (lambda f, a: f.maximum(a, a), 1.0, 1.0),
    "leaky_relu": (lambda f, a: f.leaky_relu(a, 0.125), 0.0, 0.125),
    "elu": (lambda f, a: f.elu(a, 0.5), 0.0, 0.5),
}


@pytest.mark.parametrize("name", sorted(KINKS))
def test_the_derivative_at_a_kink(name: str) -> None:
    function, at, expected = KINKS[name]
    definition = one_gate(lambda f, x, s: function(f, x.a) + s.h)
    derived = definition.derive(1, {}, {}, False)
    leaves = Leaves((np.zeros((1, 1)),), {}, {"a": np.full((1, 1), at)})
    results = ours(derived, Step(leaves, (np.full((1, 1), 3.0),)))
    assert results["dgx a"].item() == 3.0 * expected


SELECTIONS = {
    "where": lambda f, a: f.where(a > 0.0, a, 2.0),
    "relu": lambda f, a: f.relu(a),
    "clip": lambda f, a: f.clip(a, 0.0, 1.0),
    "hard_sigmoid": lambda f, a: f.hard_sigmoid(a, 1.0, 0.0),
    "maximum": lambda f, a: f.maximum(a, 0.0),
}


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_what_is_not_selected_may_be_infinite(name: str) -> None:
    """0 times infinity would be NaN."""
    definition = one_gate(lambda f, x, s: SELECTIONS[name](f, x.a) + s.h)
    derived = definition.derive(1, {}, {}, False)
    leaves = Leaves((np.zeros((1, 1)),), {}, {"a": np.full((1, 1), -1.0)})
    results = ours(derived, Step(leaves, (np.full((1, 1), np.inf),)))
    assert results["dgx a"].item() == 0.0


def one_gate(step: Any) -> cells.definition.Definition:
    return xprnn.cell(gates=("a",))(step)


# -- injected faults


def faulty_rules() -> list[str]:
    return [name for name, each in operations.OPERATIONS.items() if each.gradient]


@pytest.mark.parametrize("op", faulty_rules())
def test_a_wrong_rule_is_detected(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, applied = operations.OPERATIONS[op], []

    def wrong(d: Any, y: Any, *args: Any) -> Any:
        applied.append(op)
        shares = right.gradient(d, y, *args)
        return tuple(None if share is None else share * 1.001 for share in shares)

    monkeypatch.setitem(operations.OPERATIONS, op, right._replace(gradient=wrong))
    definition = DEFINITIONS["every_function"]
    derived = DerivedStep(definition.trace({}), {"H": H}, True)
    assert applied
    step = draw(derived, True)
    with pytest.raises(AssertionError, match="d"):
        assert_equal(ours(derived, step), by_torch(derived, step, definition, {}))


def test_a_value_that_is_not_saved_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = DerivedStep(DEFINITIONS["gru"].trace({}), {"H": H}, True)
    right = saving.choose
    monkeypatch.setattr(
        "xprnn.cells.definition.derived_step.choose", lambda *arguments: right(*arguments)[:-1]
    )
    faulty = DerivedStep(DEFINITIONS["gru"].trace({}), {"H": H}, True)
    assert len(faulty.saved) == len(derived.saved) - 1
    with pytest.raises(KeyError):
        ours(faulty, draw(faulty, True))


def test_a_wrong_cut_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut nearest to the forward step: as small, and not what is expected."""
    right = saving._Flow._reaching_sink

    def nearest_to_source(flow: Any) -> Any:
        found, todo = {saving._SOURCE}, [saving._SOURCE]
        while todo:
            a = todo.pop()
            for b, left in flow._left[a].items():
                if left and b not in found:
                    found.add(b)
                    todo.append(b)
        assert found.isdisjoint(right(flow))
        return {*flow._left} - found

    monkeypatch.setattr(saving._Flow, "_reaching_sink", nearest_to_source)
    derived = DerivedStep(DEFINITIONS["li_gru"].trace({}), {"H": H}, True)
    assert sorted(node.op for node in derived.saved) != SAVED["li_gru"]
