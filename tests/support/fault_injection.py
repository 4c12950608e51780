"""Faults for the cells' gradients: wrong signs, missing terms, factors of 1.001.

A fault is a function of a cell and of `patch(name, function)`, which replaces one of its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from xprnn.cells import CELLS, Cell

Patch = Callable[[str, Callable[..., None]], None]


def after_backward(change: Callable[..., None]) -> Callable[[Any, Patch], None]:
    """A fault that changes dgh (N, G, H) and the states' gradients after each backward step."""

    def inject(cell: Any, patch: Patch) -> None:
        original = cell.backward

        def broken(xp: Any, weights: Any, step: Any) -> None:
            original(xp, weights, step)
            change(step.gates.reshape(len(step.gates), cell.gates, -1), step.dstates)

        patch("backward", broken)

    return inject


def scaled_gate(gate: int, factor: float) -> Callable[[Any, Patch], None]:
    """One gate's gradient times `factor`: 0 is a missing term, -1 a wrong sign."""

    def change(dgates: np.ndarray, dstates: Any) -> None:
        dgates[:, gate] *= factor

    return after_backward(change)


def scaled_state(state: int, factor: float) -> Callable[[Any, Patch], None]:
    """The gradient that is passed to the step before, times `factor`."""

    def change(dgates: np.ndarray, dstates: Any) -> None:
        dstates[state][...] *= factor

    return after_backward(change)


def states_shifted(cell: Any, patch: Patch) -> None:
    """dW_hh from the state of another row."""
    original = cell.gradient_terms

    def broken(states: Any, *rest: Any) -> Any:
        read, written = states
        return original((lambda k: np.roll(read(k), 1, axis=0), written), *rest)

    patch("gradient_terms", broken)


def no_derivative_of_tanh(cell: Any, patch: Patch) -> None:
    """da = dh' without (1 - h'^2)."""

    def broken(xp: Any, weights: Any, step: Any) -> None:
        step.gates[...] = step.dstates[0]
        xp.matmul(step.gates, weights.weight_hh, out=step.dstates[0])

    patch("backward", broken)


def one_gradient_for_both_sides(cell: Any, patch: Patch) -> None:
    """The reset gate between the input and the recurrent side of n is missing."""
    patch("to_input_side", lambda dgates, saved: None)


def plain_product(cell: Any, patch: Patch) -> None:
    """dW_hn from h instead of r h."""

    patch("gradient_terms", partial(Cell.gradient_terms, cell))


OWN_FAULTS = {
    ("rnn_tanh", "no 1 - h^2"): no_derivative_of_tanh,
    ("gru", "dgx = dgh"): one_gradient_for_both_sides,
    ("gru_reset_before", "dW_hn from h"): plain_product,
    ("lstm", "dc times 0"): scaled_state(1, 0.0),
    ("lstm", "dc times -1"): scaled_state(1, -1.0),
    ("lstm", "dc times 1.001"): scaled_state(1, 1.001),
}

FAULTS = {
    **{
        (kind, f"gate {gate} times {factor}"): scaled_gate(gate, factor)
        for kind in CELLS
        for gate in range(CELLS[kind].gates)
        for factor in (0.0, -1.0, 1.001)
    },
    **{
        (kind, f"dh times {factor}"): scaled_state(0, factor)
        for kind in CELLS
        for factor in (0.0, -1.0, 1.001)
    },
    **{(kind, "dW_hh from shifted states"): states_shifted for kind in CELLS},
    **OWN_FAULTS,
}


def inject(kind: str, fault: Callable[[Any, Patch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inject a fault into the cell `kind` for the rest of a test."""
    attributes = vars(CELLS[kind])  # pytest before 9.2 leaves an attribute that the class has too
    fault(CELLS[kind], lambda name, broken: monkeypatch.setitem(attributes, name, broken))
