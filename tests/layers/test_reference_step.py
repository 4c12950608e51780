"""One step of the plain cells, forward and backward, against `reference_step.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.reference_step import REFERENCE_STEPS, States, gradient
from xprnn.cells import CELLS, Buffers, Cell, Weights

SIZES = [(3, 2, 4), (1, 1, 1), (5, 3, 2)]  # N, I, H


def problem(cell: Cell, sizes: tuple[int, int, int], bias: bool) -> tuple[Any, ...]:
    """x, the states, the weights and the gradients of the next states."""
    N, I, H = sizes  # noqa: E741
    rng, GH = np.random.default_rng(N + I + H), cell.gates * H
    biases = (rng.standard_normal(GH), rng.standard_normal(GH)) if bias else (None, None)
    weights = Weights(rng.standard_normal((GH, I)), rng.standard_normal((GH, H)), *biases)
    states, dnext = (
        tuple([rng.standard_normal((N, H)) for _ in cell.state_names]) for _ in range(2)
    )
    return rng.standard_normal((N, I)), states, weights, dnext


def run_step(
    cell: Cell, x: np.ndarray, states: States, weights: Weights, dnext: States
) -> tuple[States, dict[str, np.ndarray]]:
    """The next states and all gradients of one step of the plain code."""
    (N, H), GH = states[0].shape, len(weights.weight_hh)
    gates = x @ weights.weight_ih.T
    if (input_bias := cell.input_bias(weights, np.float64)) is not None:
        gates += input_bias
    saved = np.full((N, cell.saved * H), np.nan)
    next_states, dstates = tuple(np.full_like(h, np.nan) for h in states), copy.deepcopy(dnext)

    def step(widths: tuple[int, ...], dstates: States) -> Buffers:
        scratch = tuple(np.full((N, width * H), np.nan) for width in widths)
        return Buffers(gates, saved, states, next_states, dstates, scratch)

    cell.forward(np, weights, step(cell.forward_scratch, ()))
    cell.backward(np, weights, step(cell.backward_scratch, dstates))
    dweight_hh = np.full((GH, H), np.nan)
    dweights = Weights(None, dweight_hh, None, None)
    for term in cell.gradient_terms(
        (states.__getitem__, next_states.__getitem__), gates, saved, dweights
    ):
        term.dweight[...] = term.d.T @ term.inputs
    gradients = {f"d{name}": array for name, array in zip(cell.state_names, dstates, strict=True)}
    gradients |= {"dweight_hh": dweight_hh, "dbias_hh": gates.sum(axis=0)}
    cell.to_input_side(gates, saved)
    gradients |= {"dx": gates @ weights.weight_ih, "dweight_ih": gates.T @ x}
    return next_states, gradients | {"dbias_ih": gates.sum(axis=0)}


def reference_gradients(
    name: str, x: np.ndarray, states: States, weights: Weights, dnext: States
) -> dict[str, np.ndarray]:
    """The gradients that `run_step` computes, of the reference."""
    step = REFERENCE_STEPS[name]
    gradients = {"dx": gradient(lambda a: step(a, states, weights), x, dnext)}
    for k, state in enumerate(states):

        def of_state(a: np.ndarray, k: int = k) -> States:
            return step(x, (*states[:k], a, *states[k + 1 :]), weights)

        gradients[f"d{CELLS[name].state_names[k]}"] = gradient(of_state, state, dnext)
    for field, array in weights._asdict().items():
        if array is not None:

            def of_weight(a: np.ndarray, field: str = field) -> States:
                return step(x, states, weights._replace(**{field: a}))

            gradients[f"d{field}"] = gradient(of_weight, array, dnext)
    return gradients


def check(cell: Cell, sizes: tuple[int, int, int], bias: bool) -> None:
    x, states, weights, dnext = problem(cell, sizes, bias)
    next_states, gradients = run_step(cell, x, states, weights, dnext)
    expected = REFERENCE_STEPS[cell.name](x, states, weights)
    for name, actual, wanted in zip(cell.state_names, next_states, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-13, atol=1e-14, err_msg=name)
    for name, wanted in reference_gradients(cell.name, x, states, weights, dnext).items():
        np.testing.assert_allclose(gradients[name], wanted, rtol=1e-12, atol=1e-13, err_msg=name)


def test_every_cell_has_a_reference() -> None:
    assert REFERENCE_STEPS.keys() == CELLS.keys()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_a_step_equals_the_reference(name: str, sizes: tuple[int, int, int], bias: bool) -> None:
    check(CELLS[name], sizes, bias)


def scaled(ops: Callable[..., None], buffer: str) -> Callable[..., None]:
    """A pointwise op whose result in a buffer is too large by 1e-9."""

    def op(xp: Any, *arguments: Any) -> None:
        ops(xp, *arguments)
        array = getattr(arguments[-1], buffer)
        array = array[0] if isinstance(array, tuple) else array
        array *= 1 + 1e-9

    return op


@pytest.mark.parametrize("target", [(0, "gates"), (-1, "gates")], ids=["forward", "backward"])
@pytest.mark.parametrize("name", CELLS)
def test_a_relative_error_of_1e_9_shows(name: str, target: tuple[int, str]) -> None:
    """The assertions above can fail."""
    cell, (index, buffer) = copy.copy(CELLS[name]), target
    op = cell.pointwise_ops[index]
    if name.startswith("rnn") and index == 0:
        buffer = "next_states"  # its forward op writes no gates
    setattr(cell, op, scaled(getattr(cell, op), buffer))
    with pytest.raises(AssertionError):
        check(cell, SIZES[0], True)
