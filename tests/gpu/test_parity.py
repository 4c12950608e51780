"""CuPy against the NumPy backend in float64, in every dtype, with every implementation.

`layers/test_parity.py` and related tests compare with torch. Here NumPy in float64 is the reference
for what torch lacks: GRU with reset before the product, rows of length zero, dropout, low
precision, and sizes at which the last block of threads is not full.
"""

from __future__ import annotations

from dataclasses import replace
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
    numpy_run,
    product,
    rounded,
    run,
)
from tests.support.cases import unroll as unrolled
from tests.support.implementations import use
from tests.support.tolerances import assert_close
from xprnn.backend import Backend

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]

LOW_PRECISION = ("float16", "bfloat16")
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
LOW_PRECISION_MATRIX = tuple(
    product(
        cell=LAYERS,
        layers=(1, 3),
        directions=(1, 2),
        bias=(True, False),
        dtype=("float32",),
        compute_dtype=LOW_PRECISION,
        lengths=("full", "ragged", "zero"),
    )
)
DROPOUT = tuple(
    product(
        cell=LAYERS,
        layers=(3,),
        directions=(1, 2),
        dtype=("float64", "float32"),
        lengths=("full", "zero"),
        dropout=(0.25,),
    )
)
TYPES = (("float64", None), ("float32", None), *(("float32", low) for low in LOW_PRECISION))
SIZES = (  # N, H: N * H around a block of 128 threads, and many blocks
    *((1, 1), (1, 127), (1, 128), (1, 129), (3, 43), (2, 64), (5, 77)),
    *((33, 65), (64, 256), (7, 1023)),
)


def is_comparable(case: Case) -> bool:
    """Whether results are comparable after rounding to low precision.

    A relu without bias is at its kink, and a single number may cancel to zero.
    """
    kink = case.cell == "rnn_relu" and not case.bias
    return case.compute_dtype is None or not (kink or case.N * case.H == 1)


def assert_all_close(case: Case, actual: Results, expected: Results, **sizes: int) -> None:
    assert actual.keys() == expected.keys()
    for name, reference in expected.items():
        alive = reference.any() or case.cell == "rnn_relu"  # whose units may all be off
        assert alive, f"{case}: {name} is all zero and tests nothing"
        what = f"{case}: {name}"
        assert_close(actual[name], reference, case.dtype, what, case.compute_dtype, **sizes)


def check(case: Case, backend: Backend, **sizes: int) -> None:
    """Compare a case with NumPy."""
    if case.compute_dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    layer, problem = build(case, backend.name), draw(case)
    expected = numpy_run(case, layer, problem)
    layer = build(case, backend.name)
    assert_all_close(case, run(layer, case, problem), expected, **sizes)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_layer_equals_numpy(case: Case, backend: Backend, implementation: str) -> None:
    check(case, backend)


@pytest.mark.parametrize("case", [c for c in LOW_PRECISION_MATRIX if is_comparable(c)], ids=str)
def test_low_precision_layer_equals_numpy(
    case: Case, backend: Backend, implementation: str
) -> None:
    check(case, backend, steps=case.T, layers=case.layers)


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_equals_numpy(case: Case, backend: Backend, implementation: str) -> None:
    check(case, backend)


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
@pytest.mark.parametrize(("N", "H"), SIZES)
@pytest.mark.parametrize("cell", LAYERS)
def test_sizes_around_a_block(
    cell: str,
    N: int,
    H: int,
    dtype: str,
    compute_dtype: str | None,
    backend: Backend,
    implementation: str,
) -> None:
    case = Case(cell, dtype=dtype, T=3, N=N, I=5, H=H, compute_dtype=compute_dtype)
    if not is_comparable(case):
        pytest.skip("a single number may cancel to zero in low precision")
    check(case, backend, steps=3, width=max(N, 5 + H), layers=1)


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELLS)
def test_cell_equals_numpy(
    name: str,
    bias: bool,
    dtype: str,
    compute_dtype: str | None,
    backend: Backend,
    implementation: str,
) -> None:
    case = Case(name, bias=bias, dtype=dtype, compute_dtype=compute_dtype, T=3)
    if not is_comparable(case):
        pytest.skip("a relu without bias is at its kink, where rounding decides")
    if compute_dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    problem, (kind, options) = draw(case), CELLS[name]
    starts = tuple(state[0] for state in problem.initial)
    upstream = tuple(np.flip(problem.doutput, k) for k, _ in enumerate(starts))
    state = build(replace(case, directions=1)).state_dict()
    weights = {n.removesuffix("_l0"): rounded(array, case) for n, array in state.items()}

    def run_cell(backend_name: str, dtype: str, **types: Any) -> Results:
        cell = kind(
            case.I, case.H, bias, **options, backend=backend_name, dtype=dtype, **types
        ).train()
        cell.load_state_dict(weights)
        cast = (tuple(a.astype(dtype) for a in arrays) for arrays in (starts, upstream))
        return unrolled(cell, problem.x.astype(dtype), *cast)

    with use("reference"):
        expected = run_cell("numpy", "float64")
    actual = run_cell(backend.name, dtype, compute_dtype=compute_dtype)
    assert_all_close(case, actual, expected, steps=3, layers=1)


@pytest.mark.parametrize("cell", LAYERS)
def test_strided_arguments(cell: str, backend: Backend, implementation: str) -> None:
    """Any strides of x, states and upstream gradients give the bits of contiguous ones."""
    case = Case(cell, layers=2, directions=2)
    problem = draw(case)
    xp = backend.xp

    def strided(array: np.ndarray) -> Any:
        """The same values on the device, every second element of a transposed array."""
        buffer = xp.full((2 * array.shape[-1], *array.shape[:-1]), xp.nan, array.dtype)
        view = xp.moveaxis(buffer[::2], 0, -1)
        view[...] = backend.from_host(array)
        return view

    def results(move: Any) -> list[bytes]:
        layer = build(case, backend.name)
        hx, dhx = tuple(map(move, problem.initial)), tuple(map(move, problem.dfinal))
        one = len(hx) == 1
        output, final = layer(move(problem.x), hx[0] if one else hx)
        dx, dinitial = layer.backward(move(problem.doutput), dhx[0] if one else dhx)
        arrays = [output, dx, layer.grads.flat]
        for states in (final, dinitial):
            arrays += states if isinstance(states, tuple) else [states]
        return [backend.to_host(array).tobytes() for array in arrays]

    assert results(strided) == results(backend.from_host)
