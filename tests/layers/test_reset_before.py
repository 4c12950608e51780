"""GRU(reset_after=False) against an independent float64 reference; torch has no such layer."""

from __future__ import annotations

from dataclasses import replace
from math import exp, tanh

import numpy as np
import pytest

import xprnn
from tests.support.cases import (
    Case,
    Results,
    build,
    draw,
    parameters_of,
    product,
    run,
    run_functional,
    unroll,
)
from tests.support.implementations import assert_selected, each
from tests.support.tolerances import assert_close
from xprnn.backend import Backend

torch = pytest.importorskip("torch")
from tests.support.reset_before_reference import gates_of, reference_run, step  # noqa: E402

MATRIX = tuple(
    product(
        cell=("gru_reset_before",),
        layers=(1, 2, 3),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=("full", "ragged", "zero"),
        states=(True, False),
    )
)


def assert_parity(case: Case, actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert np.abs(reference).max() > 0, f"{case}: {name} is all zero and tests nothing"
        assert_close(actual[name], reference, case.dtype, f"{case}: {name}")


@each(MATRIX)
def test_layer_equals_the_reference(case: Case, backend: Backend, implementation: str) -> None:
    layer, problem = build(case, backend.name), draw(case)
    expected = reference_run(case, parameters_of(layer), problem)
    assert_selected(implementation, layer, case.T, case.N)
    assert_parity(case, run(layer, case, problem), expected)


@each(case for case in MATRIX if case.layers == case.directions == 1)
def test_functional_equals_the_reference(case: Case, backend: Backend, implementation: str) -> None:
    layer, problem = build(case, backend.name), draw(case)
    expected = reference_run(case, parameters_of(layer), problem)
    assert_parity(case, run_functional(case, layer, problem), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False])
def test_cell_equals_the_reference(
    bias: bool, dtype: str, backend: Backend, implementation: str
) -> None:
    case = Case("gru_reset_before", bias=bias, dtype=dtype)
    problem = draw(case)
    problem = replace(problem, dfinal=(np.zeros_like(problem.dfinal[0]),))  # a cell has no h_n
    options = {"reset_after": False, "backend": backend.name, "dtype": dtype, "seed": 1}
    cell = xprnn.GRUCell(case.I, case.H, bias, **options).train()
    weights = {f"{name}_l0": array for name, array in parameters_of(cell).items()}
    expected = reference_run(case, weights, problem)
    renamed = {"h": expected["output"], "dx": expected["dx"], "dh0": expected["dh0"][0]}
    renamed |= {f"d{name}": expected[f"d{name}_l0"] for name in cell.parameters}
    actual = unroll(cell, problem.x, (problem.initial[0][0],), (problem.doutput,))
    assert_parity(case, actual, renamed)


def test_the_reference_by_hand() -> None:
    """One hidden unit, one input, one step, by hand: H_t = (1 - z) tanh(...) + z H_{t-1}."""
    numbers = {
        "weight_ih": [[0.5], [-0.3], [0.8]],
        "weight_hh": [[0.2], [0.7], [-0.6]],
        "bias_ih": [0.1, -0.2, 0.3],
        "bias_hh": [-0.4, 0.5, 0.25],
    }
    parameters = {name: torch.tensor(v, dtype=torch.float64) for name, v in numbers.items()}
    x, h = 1.5, -0.9
    r = 1 / (1 + exp(-(0.5 * x + 0.2 * h + 0.1 - 0.4)))
    z = 1 / (1 + exp(-(-0.3 * x + 0.7 * h - 0.2 + 0.5)))
    n = tanh(0.8 * x - 0.6 * (r * h) + 0.3 + 0.25)
    inputs = (torch.tensor([value], dtype=torch.float64) for value in (x, h))
    actual = step(gates_of(parameters, ""), *inputs)
    assert actual.item() == pytest.approx((1 - z) * n + z * h, rel=1e-14)


def test_the_two_forms_differ(implementation: str) -> None:
    before = Case("gru_reset_before")
    layer, problem = build(before), draw(before)
    after = xprnn.GRU(before.I, before.H, dtype="float64")
    after.load_state_dict(layer.state_dict())
    one, _ = layer(problem.x, *problem.initial)
    other, _ = after(problem.x, *problem.initial)
    assert np.abs(one - other).max() > 1e-2
