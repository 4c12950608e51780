"""Layers, cells and functions with the fused kernels on the fake CuPy: NumPy's results to rounding.

The package's own CUDA code runs, its kernels compiled for the host and its products computed by the
fake gemmEx; only the hardware is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest

import xprnn
from tests.support.cases import (
    CELLS,
    LAYERS,
    TORCH_CELLS,
    Case,
    Results,
    as_float64,
    build,
    draw,
    numpy_run,
    product,
    run,
    run_functional,
    unroll,
)
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.tolerances import assert_close, tolerance
from xprnn.backend import Backend
from xprnn.kernels.cuda import pointwise

pytestmark = needs_compiler

MATRIX = tuple(
    product(
        cell=LAYERS,
        layers=(1, 2, 3),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=("full", "ragged", "zero"),
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
        dropout=(0.25,),
    )
)
LOW_PRECISION = tuple(
    case
    for case in product(
        cell=LAYERS,
        layers=(1, 2),
        directions=(1, 2),
        bias=(True, False),
        dtype=("float32",),
        compute_dtype=("float16", "bfloat16"),
        lengths=("full", "zero"),
        states=(True, False),
    )
    if case.bias or case.cell != "rnn_relu"  # without a bias, rounding decides at its kink
)
TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))


Made = TypeVar("Made")


def fused(function: Callable[..., Made], *arguments: Any) -> Made:
    """Call a function with the pointwise kernels forced for every layer."""
    with xprnn.use_kernels("pointwise"):
        return function(*arguments)


def check_type(compute_dtype: str | None) -> None:
    if compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")


def assert_all_close(case: Case, actual: Results, expected: Results, **sizes: int) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        nonzero = reference.any() or case.cell == "rnn_relu"  # its units may all be zero
        assert nonzero, f"{case}: {name} is all zero, which tests nothing"
        reference, what = reference.astype(np.float64), f"{case}: {name}"
        assert_close(actual[name], reference, case.dtype, what, case.compute_dtype, **sizes)


def compare(case: Case, backend: Backend, **sizes: int) -> Results:
    """Run a case on a backend, and compare it with NumPy in float64."""
    layer, problem = build(case, backend.name), draw(case)
    expected = numpy_run(case, layer, problem)
    actual = fused(run, layer, case, problem)
    assert_all_close(case, actual, expected, **sizes)
    return actual


@pytest.mark.parametrize("case", MATRIX + DROPOUT, ids=str)
def test_layer(case: Case, fake_cupy: Backend) -> None:
    compare(case, fake_cupy)
    assert LOG.kernels > 0


@pytest.mark.parametrize("case", LOW_PRECISION, ids=str)
def test_low_precision_layer(case: Case, fake_cupy: Backend) -> None:
    check_type(case.compute_dtype)
    sizes = {"steps": case.T, "layers": case.layers}
    actual = compare(case, fake_cupy, **sizes)
    plain = run(build(case), case, draw(case))
    assert_all_close(case, actual, plain, **sizes)


@pytest.mark.parametrize(
    "case",
    [c for c in MATRIX if c.layers == 2 and c.lengths != "zero" and c.cell in TORCH_CELLS],
    ids=str,
)
def test_layer_equals_torch(case: Case, fake_cupy: Backend) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from tests.support.torch_cases import torch_run

    layer, problem = build(case, fake_cupy.name), draw(case)
    expected = torch_run(case, layer, problem)
    assert_all_close(case, fused(run, layer, case, problem), expected)


@pytest.mark.parametrize("case", [c for c in MATRIX if c.layers == c.directions == 1], ids=str)
def test_functional(case: Case, fake_cupy: Backend) -> None:
    problem, reference_case = draw(case), replace(case, dtype="float64")
    layer, reference_layer = build(case, fake_cupy.name), build(reference_case)
    reference_layer.load_state_dict(layer.state_dict())
    expected = run_functional(reference_case, reference_layer, as_float64(problem))
    assert_all_close(case, fused(run_functional, case, layer, problem), expected)


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, dtype: str, compute_dtype: str | None, fake_cupy: Backend) -> None:
    check_type(compute_dtype)
    kind, options = CELLS[name]
    case = Case(name, dtype=dtype, compute_dtype=compute_dtype, T=3)
    problem = draw(case)
    weights = {n.removesuffix("_l0"): p for n, p in build(case).state_dict().items()}
    starts = tuple(state[0] for state in problem.initial)
    upstream = tuple(np.flip(problem.doutput, axis) for axis, _ in enumerate(starts))

    def run_cell(backend: str, dtype: str, compute_dtype: str | None) -> Results:
        cell = kind(
            *(case.I, case.H),
            **options,
            backend=backend,
            dtype=dtype,
            compute_dtype=compute_dtype,
        ).train()
        cell.load_state_dict(weights)
        states = [tuple(a.astype(dtype) for a in arrays) for arrays in (starts, upstream)]
        return unroll(cell, problem.x.astype(dtype), *states)

    expected = run_cell("numpy", "float64", None)
    actual = fused(run_cell, fake_cupy.name, dtype, compute_dtype)
    assert_all_close(case, actual, expected, steps=3, layers=1)


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("H", [1, 2, 33])
@pytest.mark.parametrize("I", [1, 7])
@pytest.mark.parametrize("cell", LAYERS)
def test_other_sizes(cell: str, I: int, H: int, N: int, fake_cupy: Backend) -> None:  # noqa: E741
    compare(Case(cell, T=3, N=N, I=I, H=H), fake_cupy)


@pytest.mark.parametrize("sizes", [{"T": 0}, {"N": 0}, {"T": 1, "N": 1}], ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_no_steps_or_no_rows(cell: str, sizes: dict[str, int], fake_cupy: Backend) -> None:
    case = Case(cell, layers=2, directions=2, **sizes)
    problem = draw(case)
    expected = run(build(case), case, problem)
    actual = fused(run, build(case, fake_cupy.name), case, problem)
    for name, array in expected.items():
        assert actual[name].shape == array.shape
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_two_runs_give_the_same_bits(
    cell: str, dtype: str, compute_dtype: str | None, fake_cupy: Backend
) -> None:
    check_type(compute_dtype)
    case = Case(cell, 2, 2, lengths="zero", dtype=dtype, compute_dtype=compute_dtype, dropout=0.25)
    problem = draw(case)
    first, second = (fused(run, build(case, fake_cupy.name), case, problem) for _ in range(2))
    assert all(second[name].tobytes() == array.tobytes() for name, array in first.items())
    again = build(case, fake_cupy.name)
    fused(run, again, case, problem)
    again.zero_grad()
    again._calls = 0  # the counter of the dropout masks
    third = fused(run, again, case, problem)  # in memory used before
    assert all(third[name].tobytes() == array.tobytes() for name, array in first.items())


@pytest.mark.parametrize("cell", LAYERS)
def test_tf32_is_used_only_where_it_is_allowed(cell: str, fake_cupy: Backend) -> None:
    kind, options = LAYERS[cell]
    case = Case(cell, dtype="float32")
    problem = draw(case)
    full = build(case, fake_cupy.name)
    layer = kind(case.I, case.H, **options, backend=fake_cupy.name, precision="tf32").train()
    layer.load_state_dict(full.state_dict())
    expected = numpy_run(case, full, problem)
    actual, exact = (fused(run, each, case, problem) for each in (layer, full))
    for name, reference in expected.items():
        assert_close(actual[name], reference, "float32", name, "tf32", steps=case.T, layers=1)
        assert_close(exact[name], reference, "float32", name)
    error = np.abs(actual["output"] - expected["output"]).max() / np.abs(expected["output"]).max()
    assert error > tolerance("float32")


# -- a fault in a header


@pytest.fixture
def rebuilt_kernels() -> Iterator[None]:
    """Rebuild the kernels from their sources, before and after the test."""
    pointwise.build.cache_clear()
    yield
    pointwise.build.cache_clear()


FLIPPED = [  # (cell, in its header, one sign flipped)
    ("rnn_tanh", "A a = gx + gh;", "A a = gx - gh;"),
    ("rnn_tanh", "return dh_next * (1 - h_next", "return dh_next * (1 + h_next"),
    ("rnn_relu", "return a < 0", "return a > 0"),
    ("gru", "return n + z * (h - n);", "return n - z * (h - n);"),
    ("gru", "dgx_z = dn * (h - n)", "dgx_z = dn * (h + n)"),
    ("gru", "dr = dgx_n * gh_n", "dr = -dgx_n * gh_n"),
    ("gru_reset_before", "n = tanh_of(gx_n + gh_n);", "n = tanh_of(gx_n - gh_n);"),
    ("gru_reset_before", "return dq * r;", "return -dq * r;"),
    ("lstm", "c_next = f * c + i * g;", "c_next = f * c - i * g;"),
    ("lstm", "dc_next += dh_next * o", "dc_next -= dh_next * o"),
    ("lstm", "return dc_next * f;", "return -dc_next * f;"),
]


@pytest.mark.parametrize(("cell", "correct", "flipped"), FLIPPED)
@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
def test_a_flipped_sign_in_a_header_is_detected(
    cell: str,
    correct: str,
    flipped: str,
    dtype: str,
    compute_dtype: str | None,
    fake_cupy: Backend,
    rebuilt_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_type(compute_dtype)
    case = Case(cell, dtype=dtype, compute_dtype=compute_dtype)
    original = pointwise.source

    def source(header: str) -> str:
        text = original(header)
        assert text.count(correct) == 1
        return text.replace(correct, flipped)

    monkeypatch.setattr(pointwise, "source", source)
    with pytest.raises(AssertionError, match="relative error"):
        compare(case, fake_cupy, steps=case.T, layers=1)
