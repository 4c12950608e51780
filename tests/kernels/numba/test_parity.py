"""The CPU kernels, forced: every output and gradient equals that of the reference code."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import LAYERS, Case, build, draw, product, run, run_functional
from tests.support.implementations import SelectKernels
from tests.support.numba_cases import (
    SEQUENCE,
    compare,
    faulty,
    forced,
    forget_kernels,
    needs_numba,
    sized,
    uncached,
)
from tests.support.tolerances import assert_close

pytestmark = needs_numba

KERNELS = [("pointwise", cell) for cell in LAYERS] + [("sequence", cell) for cell in SEQUENCE]


@pytest.mark.parametrize("lengths", ["full", "ragged", "zero"])
@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_layers(kernels: str, cell: str, lengths: str) -> None:
    for case in product(
        cell=(cell,),
        layers=(1, 2),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=(lengths,),
        states=(True, False),
    ):
        compare(case, kernels)


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_sizes(kernels: str, cell: str) -> None:
    for case in sized(cell=(cell,), directions=(2,), T=(5,)):
        compare(case, kernels)


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_dropout_between_layers(kernels: str, cell: str) -> None:
    for directions in (1, 2):
        compare(Case(cell, layers=3, directions=directions, dropout=0.25), kernels)


@pytest.mark.parametrize("cell", SEQUENCE)
def test_many_rows_and_lengths(cell: str) -> None:
    """More packed rows than are computed at a time, with different lengths, in both directions."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(0, 40, 21)
    lengths[0] = 40
    x = rng.standard_normal((40, 21, 6))
    upstream = rng.standard_normal((40, 21, 24))
    name, options = LAYERS[cell]
    layer = name(6, 12, bidirectional=True, seed=1, dtype="float64", **options).train()

    def gradients() -> list[Any]:
        layer.zero_grad()
        output, _ = layer(x, lengths=lengths)
        dx, _ = layer.backward(upstream)
        return [output, dx, *(grad.copy() for grad in layer.grads.values())]

    expected = forced("reference", gradients)
    for k, (actual, wanted) in enumerate(zip(forced("sequence", gradients), expected, strict=True)):
        assert_close(actual, wanted, "float64", f"{cell}: array {k}", steps=40)


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_functions(kernels: str, cell: str) -> None:
    for case in product(cell=(cell,), bias=(True, False), lengths=("full", "zero")):
        layer, problem = build(case), draw(case)
        expected = forced("reference", run_functional, case, layer, problem)
        actual = forced(kernels, run_functional, case, layer, problem)
        for name, values in expected.items():
            assert_close(actual[name], values, "float64", f"{case}: {name}")


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_gradients_equal_finite_differences(kernels: str, cell: str) -> None:
    name, options = LAYERS[cell]
    layer = name(3, 18, 2, bidirectional=True, seed=0, dtype="float64", **options)
    forced(kernels, xprnn.gradcheck, layer, np.random.default_rng(0).standard_normal((4, 3, 3)))


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_verify_passes(kernels: str, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options = LAYERS[cell]
    report = xprnn.verify(name(3, 9, seed=0, **options), (4, 3, 3), lengths=[4, 2, 0])
    assert report.ok, report
    assert kernels in {row.implementation for row in report.rows}


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_two_runs_give_the_same_bits(kernels: str, cell: str) -> None:
    case = Case(cell, layers=2, directions=2, dtype="float32", N=9, H=37, T=6)
    layer, problem = build(case), draw(case)
    first, second = (forced(kernels, run, layer, case, problem) for _ in range(2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
@pytest.mark.parametrize(("N", "T"), [(0, 3), (2, 0), (0, 0)])
def test_a_call_without_rows_or_steps(N: int, T: int, kernels: str, cell: str) -> None:
    case = Case(cell, N=N, T=T)
    layer, problem = build(case), draw(case)
    expected = forced("reference", run, layer, case, problem)
    actual = forced(kernels, run, layer, case, problem)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kernels", "cell"), KERNELS)
def test_nonfinite_values_propagate_as_in_the_reference(
    kernels: str, cell: str, value: float
) -> None:
    """From one step of one row of x on, in that row alone."""
    name, options = LAYERS[cell]
    layer = name(3, 20, seed=0, **options)
    x = np.random.default_rng(0).standard_normal((5, 11, 3)).astype(np.float32)
    x[2, 4, 1] = value
    with np.errstate(all="ignore"):
        expected, _ = forced("reference", layer, x)
        actual, _ = forced(kernels, layer, x)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(np.delete(actual, 4, axis=1)).all()


def test_unusual_memory_layouts() -> None:
    """Read-only, unaligned or strided x and states give the same results."""
    raw = np.zeros(4 * 3 * 5 * 4 + 1, np.uint8)
    unaligned = raw[1:].view(np.float32).reshape(4, 3, 5)
    unaligned[...] = np.random.default_rng(0).standard_normal((4, 3, 5))
    states = np.ones((1, 3, 14), np.float32)[..., ::2]
    states.flags.writeable = False
    cell_state = states[0]
    for kernels in ("pointwise", "sequence"):
        layer = xprnn.GRU(5, 7, seed=0)
        expected, _ = forced("reference", layer, unaligned, states)
        actual, _ = forced(kernels, layer, unaligned, states)
        assert_close(actual, expected.astype(np.float64), "float32", "layer")
        cell = xprnn.GRUCell(5, 7, seed=0)
        expected = forced("reference", cell, unaligned[0], cell_state)
        actual = forced(kernels, cell, unaligned[0], cell_state)
        assert_close(actual, expected.astype(np.float64), "float32", "cell")


@pytest.mark.parametrize(("size", "rows"), [(32, 6), (16, 6)], ids=["avx2", "128 bits"])
def test_registers_of_other_processors(
    size: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles that fit the registers of other processors run on this one."""
    from xprnn.kernels.numba import generated, gradients, loops, product, sequence, tile

    change = ("REGISTERS = Registers.of_host()", f"REGISTERS = Registers({size}, {rows})")
    monkeypatch.setitem(sys.modules, tile.__name__, faulty(tile, change))
    changed = faulty(product)
    assert changed.width_of(np.dtype("float32")) == size // 2
    monkeypatch.setitem(sys.modules, product.__name__, changed)
    monkeypatch.setattr(loops, "product", changed.product)
    for module in (gradients, sequence):
        monkeypatch.setattr(module, "product", changed)
    for module in (gradients, sequence, generated):
        monkeypatch.setattr(module, "compile_for", uncached)
    for module in (sequence, generated):
        for name in ("panels_of", "width_of"):
            monkeypatch.setattr(module, name, getattr(changed, name))
    forget_kernels()
    try:
        for case in sized(cell=("gru",), directions=(2,), T=(5,)):
            compare(case, "sequence")
    finally:
        forget_kernels()


@pytest.mark.parametrize("kernels", ["pointwise", "sequence"])
def test_low_precision_is_refused_with_the_reason(
    kernels: str, select_kernels: SelectKernels
) -> None:
    layer = xprnn.GRU(3, 4, seed=0, compute_dtype="float16")
    select_kernels(kernels)
    with pytest.raises(xprnn.KernelUnavailableError, match="float32 or float64, not in float16"):
        layer(np.ones((2, 1, 3), np.float32))
