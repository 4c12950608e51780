"""Every layer against torch's, forward and backward, every result and gradient by value.

Each test runs on every implementation; on CuPy it is compared with torch on CUDA.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.support.cases import (
    TORCH_CELLS,
    Case,
    Problem,
    Results,
    build,
    draw,
    product,
    run,
    run_functional,
)
from tests.support.implementations import assert_selected, each
from tests.support.tolerances import LAYERS, STEPS, WIDTH, assert_close, tolerance
from tests.support.torch_cases import torch_run
from xprnn.backend import Backend

pytest.importorskip("torch")

CHOICES = {
    "cell": TORCH_CELLS,  # and with it the nonlinearity
    "layers": (1, 2, 3),
    "directions": (1, 2),
    "batch_first": (False, True),
    "bias": (True, False),
    "dtype": ("float64", "float32"),
    "lengths": ("full", "ragged"),
    "states": (True, False),
}
MATRIX = tuple(product(**CHOICES))


def assert_parity(case: Case, actual: Results, expected: Results, **sizes: int) -> None:
    """Every result within tolerance, and none of them trivially so."""
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        assert np.abs(reference).max() > 0, f"{case}: {name} is all zero and tests nothing"
        assert_close(actual[name], reference, case.dtype, f"{case}: {name}", **sizes)


@each(MATRIX)
def test_layer_equals_torch(case: Case, backend: Backend, implementation: str) -> None:
    layer, problem = build(case, backend.name), draw(case)
    expected = torch_run(case, layer, problem)
    assert_selected(implementation, layer, case.T, case.N)
    assert_parity(case, run(layer, case, problem), expected)


def test_the_matrix_is_large_and_complete() -> None:
    assert len(set(MATRIX)) == len({str(case) for case in MATRIX}) >= 300
    for cell in TORCH_CELLS:
        for option, values in CHOICES.items():
            seen = {getattr(case, option) for case in MATRIX if case.cell == cell}
            assert seen == ({cell} if option == "cell" else set(values))
    for case in MATRIX:
        assert case.T <= STEPS and case.layers <= LAYERS
        assert max(case.I, case.directions * case.H) + case.H <= WIDTH


def test_the_inputs_can_reveal_a_fault() -> None:
    for case in MATRIX:
        problem = draw(case)
        for array in (problem.x, *problem.initial, problem.doutput, *problem.dfinal):
            assert np.unique(array).size == array.size and array.all()
        if problem.lengths is not None:
            ordered = sorted(problem.lengths)
            assert list(problem.lengths) not in (ordered, ordered[::-1])


@each(case for case in MATRIX if case.layers == case.directions == 1)
def test_functional_equals_torch(case: Case, backend: Backend, implementation: str) -> None:
    layer, problem = build(case, backend.name), draw(case)
    expected = torch_run(case, layer, problem)
    assert_parity(case, run_functional(case, layer, problem), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_larger_sizes(cell: str, dtype: str, backend: Backend, implementation: str) -> None:
    case = Case(cell, layers=2, directions=2, dtype=dtype, T=40, N=7, I=19, H=33)
    layer, problem = build(case, backend.name), draw(case)
    expected = torch_run(case, layer, problem)
    assert_selected(implementation, layer, case.T, case.N)
    actual = run(layer, case, problem)
    assert_parity(case, actual, expected, steps=40, width=3 * 33, layers=2)


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1},
        {"N": 1},
        {"H": 1},
        {"H": 1, "N": 8, "dtype": "float32"},  # a gate is one column of an array
        {"I": 1},
        {"T": 1, "N": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_sizes_of_one(
    cell: str, sizes: dict[str, int], backend: Backend, implementation: str
) -> None:
    case = Case(cell, layers=2, directions=2, **sizes)
    layer, problem = build(case, backend.name), draw(case)
    expected = torch_run(case, layer, problem)
    assert_selected(implementation, layer, case.T, case.N)
    actual = run(layer, case, problem)
    for name, reference in expected.items():
        assert_close(actual[name], reference, case.dtype, name)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_unbatched(cell: str, backend: Backend, implementation: str) -> None:
    case = Case(cell, layers=2, directions=2, N=1)
    layer, batched = build(case, backend.name), draw(case)
    problem = Problem(
        x=batched.x[:, 0],
        initial=tuple(state[:, 0] for state in batched.initial),
        lengths=None,
        doutput=batched.doutput[:, 0],
        dfinal=tuple(state[:, 0] for state in batched.dfinal),
    )
    expected = torch_run(case, layer, problem)
    assert_parity(case, run(layer, case, problem), expected)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_each_upstream_gradient_alone(cell: str, backend: Backend, implementation: str) -> None:
    case = Case(cell, layers=2, directions=2, lengths="ragged")
    problem = draw(case)
    upstream = (problem.doutput, *problem.dfinal)
    for alone in range(len(upstream)):
        single = [d if k == alone else None for k, d in enumerate(upstream)]
        zeros = [d if k == alone else np.zeros_like(d) for k, d in enumerate(upstream)]
        layer = build(case, backend.name)
        actual = run(layer, case, replace(problem, doutput=single[0], dfinal=tuple(single[1:])))
        filled = replace(problem, doutput=zeros[0], dfinal=tuple(zeros[1:]))
        assert_parity(case, actual, torch_run(case, layer, filled))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_rows_of_length_zero(
    cell: str,
    layers: int,
    directions: int,
    batch_first: bool,
    backend: Backend,
    implementation: str,
) -> None:
    """torch refuses them: it computes the other rows, and these keep their state and gradient."""
    case = Case(cell, layers, directions, batch_first, lengths="zero")
    layer, problem = build(case, backend.name), draw(case)
    actual = run(layer, case, problem)
    empty = np.array(problem.lengths) == 0
    outer = 0 if batch_first else 1  # the batch axis of x; of states it is 1

    def others(array: np.ndarray, axis: int) -> np.ndarray:
        return np.compress(~empty, array, axis)

    rest = Problem(
        x=others(problem.x, outer),
        initial=tuple(others(state, 1) for state in problem.initial),
        lengths=tuple(length for length in problem.lengths if length),
        doutput=others(problem.doutput, outer),
        dfinal=tuple(others(state, 1) for state in problem.dfinal),
    )
    expected = torch_run(replace(case, N=len(rest.lengths)), layer, rest)
    for name in ("output", "dx"):
        assert not np.compress(empty, actual[name], outer).any()
        actual[name] = others(actual[name], outer)
    for k, name in enumerate(case.state_names):
        end, dstart = f"{name}_n", f"d{name}0"
        assert np.array_equal(actual[end][:, empty], problem.initial[k][:, empty])
        assert np.array_equal(actual[dstart][:, empty], problem.dfinal[k][:, empty])
        actual[end], actual[dstart] = others(actual[end], 1), others(actual[dstart], 1)
    assert_parity(case, actual, expected)


@pytest.mark.parametrize("sizes", [{"T": 0}, {"N": 0}, {"T": 0, "N": 0}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_no_steps_or_no_rows(
    cell: str, batch_first: bool, sizes: dict[str, int], backend: Backend, implementation: str
) -> None:
    case = Case(cell, layers=2, directions=2, batch_first=batch_first, **sizes)
    layer, problem = build(case, backend.name), draw(case)
    actual = run(layer, case, problem)
    assert actual["output"].shape == problem.doutput.shape
    assert actual["dx"].shape == problem.x.shape
    for k, name in enumerate(case.state_names):
        assert np.array_equal(actual[f"{name}_n"], problem.initial[k])
        assert np.array_equal(actual[f"d{name}0"], problem.dfinal[k])
    assert not any(actual[f"d{name}"].any() for name in layer.parameters)


@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_x_past_the_end_of_a_row_is_not_read(
    cell: str, backend: Backend, implementation: str
) -> None:
    case = Case(cell, layers=2, directions=2, lengths="ragged")
    problem = draw(case)
    expected = run(build(case, backend.name), case, problem)
    past = np.arange(case.T)[:, None] >= np.array(problem.lengths)
    x, doutput = problem.x.copy(), problem.doutput.copy()
    x[past] = doutput[past] = np.nan
    actual = run(build(case, backend.name), case, replace(problem, x=x, doutput=doutput))
    for name, array in expected.items():
        assert np.array_equal(actual[name], array), name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_tolerance_is_not_vacuous(dtype: str) -> None:
    """Errors of 1e-4 of the largest element and of ten times the tolerance fail."""
    expected = np.random.default_rng(0).standard_normal((4, 5))
    actual = expected.astype(dtype)
    expected = actual.astype(np.float64)
    assert_close(actual, expected, dtype)
    for fault in (1e-4, 10 * tolerance(dtype)):
        wrong = actual.copy()
        wrong[2, 3] += fault * np.abs(expected).max()
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(wrong, expected, dtype)


def test_invalid_comparisons_are_refused() -> None:
    one = np.ones((2, 3))
    for actual, expected, message in (
        (one.astype(np.float32), one, "dtype"),
        (one, one.astype(np.float32), "the reference is float32"),
        (one[0], one, r"\(3,\), expected \(2, 3\)"),
        (one * np.nan, one, "not finite"),
        (one, one * np.nan, "the reference is not finite"),
        (one, 0 * one, "relative error inf"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_close(actual, expected, "float64")
