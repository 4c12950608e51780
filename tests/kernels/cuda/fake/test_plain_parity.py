"""The plain code on the fake CuPy: NumPy's results bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.cases import (
    CELLS,
    LAYERS,
    Case,
    Results,
    build,
    draw,
    move,
    product,
    run,
    run_functional,
    unroll,
)
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from xprnn.backend import Backend

MATRIX = tuple(
    product(
        cell=LAYERS,
        layers=(1, 2, 3),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=("full", "zero"),
        states=(True, False),
    )
)
DROPOUT = tuple(
    product(
        cell=LAYERS,
        layers=(2, 3),
        directions=(1, 2),
        dtype=("float64", "float32"),
        lengths=("full", "zero"),
        dropout=(0.25, 1.0),
    )
)
LOW_PRECISION = tuple(
    product(
        cell=LAYERS,
        layers=(2,),
        directions=(1, 2),
        bias=(True, False),
        dtype=("float32",),
        compute_dtype=("float16", "bfloat16"),
        lengths=("full", "zero"),
    )
)


def assert_same_bits(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert np.isfinite(array).all(), name
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        assert actual[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("case", MATRIX + DROPOUT + LOW_PRECISION, ids=str)
def test_layer(case: Case, fake_cupy: Backend) -> None:
    if case.compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    problem = draw(case)
    expected = run(build(case), case, problem)
    assert_same_bits(run(build(case, fake_cupy.name), case, problem), expected)
    assert LOG.products and not LOG.kernels, "the plain code runs"


def test_dropout_changes_the_results() -> None:
    case = Case("gru", layers=2, dropout=0.25)
    layer, problem = build(case), draw(case)
    trained, _ = layer(problem.x)
    evaluated, _ = layer.eval()(problem.x)
    assert not np.array_equal(trained, evaluated)


@pytest.mark.parametrize("case", [c for c in MATRIX if c.layers == 2 and c.bias], ids=str)
def test_eval_equals_train(case: Case, fake_cupy: Backend) -> None:
    problem = draw(case)
    expected = run(build(case), case, problem)
    layer = build(case, fake_cupy.name).eval()
    hx = move(fake_cupy, *problem.initial) if case.states else None
    output, final = layer(move(fake_cupy, problem.x), hx, lengths=problem.lengths)
    ends = final if isinstance(final, tuple) else (final,)
    actual = {"output": fake_cupy.to_host(output)}
    actual |= {
        f"{n}_n": fake_cupy.to_host(end) for n, end in zip(case.state_names, ends, strict=True)
    }
    assert_same_bits(actual, {name: expected[name] for name in actual})


@pytest.mark.parametrize("lengths", ["full", "zero"])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_second_call_in_used_memory_gives_the_same_bits(
    cell: str, lengths: str, fake_cupy: Backend
) -> None:
    case = Case(cell, layers=2, directions=2, lengths=lengths)
    layer, problem = build(case, fake_cupy.name), draw(case)
    first = run(layer, case, problem)
    for _ in range(2):
        layer.zero_grad()
        assert_same_bits(run(layer, case, problem), first)


@pytest.mark.parametrize("case", [c for c in MATRIX if c.layers == c.directions == 1], ids=str)
def test_functional(case: Case, fake_cupy: Backend) -> None:
    problem = draw(case)
    expected = run_functional(case, build(case), problem)
    assert_same_bits(run_functional(case, build(case, fake_cupy.name), problem), expected)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, dtype: str, fake_cupy: Backend) -> None:
    kind, options = CELLS[name]
    rng = np.random.default_rng(5)
    count = 2 if name == "lstm" else 1
    x = rng.standard_normal((3, 4, 3)).astype(dtype)
    initial = tuple(rng.standard_normal((4, 5)).astype(dtype) for _ in range(count))
    upstream = tuple(rng.standard_normal((3, 4, 5)).astype(dtype) for _ in range(count))

    def unrolled(backend: str) -> Any:
        cell = kind(3, 5, **options, backend=backend, dtype=dtype, seed=6).train()
        return unroll(cell, x, initial, upstream)

    assert_same_bits(unrolled(fake_cupy.name), unrolled("numpy"))
