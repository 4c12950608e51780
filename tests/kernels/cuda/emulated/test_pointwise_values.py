"""Every fused kernel, compiled for the host and compared with the reference."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import HostElementwiseKernel, needs_compiler
from tests.support.pointwise_cases import (
    TYPES,
    Arrays,
    draw,
    excess,
    needs_dtype,
    run_fused,
    run_plain,
    with_specials,
)
from tests.support.tolerances import assert_close
from xprnn.cells import CELLS, Buffers, Weights
from xprnn.kernels.cuda.cells import POINTWISE
from xprnn.kernels.cuda.pointwise import KERNELS, TABLE, PointwiseKernel, source

SIZES = [(0, 5), (1, 1), (1, 7), (5, 1), (3, 33), (8, 16), (2, 257)]  # N, H

pytestmark = needs_compiler
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
each_dtype = pytest.mark.parametrize("dtype", TYPES)


@each_dtype
@each_kernel
def test_a_kernel_matches_the_reference(kernel: PointwiseKernel, dtype: str) -> None:
    needs_dtype(dtype)
    for N, H in SIZES:
        ratio = excess(kernel, draw(kernel, dtype, N, H))
        assert ratio <= 1, f"N={N} H={H}: {ratio:.2f} of what rounding explains"


def scaled(arrays: Arrays, factor: float) -> Arrays:
    """Scaled values; gates and states, which lie in (-1, 1), are unchanged."""
    large = {n: factor * a if np.nanmax(abs(a), initial=0) > 1 else a for n, a in arrays.items()}
    return {name: array.astype(arrays[name].dtype) for name, array in large.items()}


@each_dtype
@each_kernel
def test_large_values_saturate(kernel: PointwiseKernel, dtype: str) -> None:
    """Pre-activations and gradients up to 1e3 and beyond: finite wherever the reference is."""
    needs_dtype(dtype)
    arrays = scaled(draw(kernel, dtype, 9, 33), 200.0)
    if kernel.method.startswith("forward"):
        after = run_fused(kernel, arrays)
        assert all(np.isfinite(after[buffer.name].astype(float)).all() for buffer in kernel.outputs)
    assert excess(kernel, arrays) <= 1


@each_dtype
@each_kernel
def test_nan_and_infinity_match_the_reference(kernel: PointwiseKernel, dtype: str) -> None:
    needs_dtype(dtype)
    arrays = with_specials(kernel, dtype)
    plain = run_plain(kernel, arrays)
    assert any(np.isnan(plain[buffer.name]).any() for buffer in kernel.outputs)
    assert excess(kernel, arrays) <= 1


class ReverseOrder(HostElementwiseKernel):
    """Processes the elements in reverse order."""

    backwards = True


@each_dtype
@each_kernel
def test_the_order_of_elements_does_not_matter(kernel: PointwiseKernel, dtype: str) -> None:
    needs_dtype(dtype)
    arrays = draw(kernel, dtype, 7, 19)
    in_order, in_reverse = run_fused(kernel, arrays), run_fused(kernel, arrays, ReverseOrder)
    assert all(in_order[name].tobytes() == in_reverse[name].tobytes() for name in arrays)


def test_the_table_has_every_pointwise_op_of_every_cell() -> None:
    parts = {(name, part) for name, cell in CELLS.items() for part in cell.pointwise_ops}
    assert {(kernel.cell, kernel.method) for kernel in KERNELS} == parts
    assert POINTWISE.keys() == CELLS.keys()
    assert len(TABLE) == len(KERNELS)


class Products(SimpleNamespace):
    """An array module with NumPy's products and the host's kernels, which counts both."""

    def __init__(self) -> None:
        super().__init__(launches=0, ElementwiseKernel=HostElementwiseKernel)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        self.launches += 1
        out[...] = a.astype(out.dtype) @ b.astype(out.dtype)

    def add_matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        self.launches += 1
        out += a.astype(out.dtype) @ b.astype(out.dtype)


def run_step(cell: Any, xp: Any, dtype: str, bias: bool) -> tuple[Arrays, tuple[int, int]]:
    """The results of a step forward and backward, from equal values for all cells; its launches."""
    rng, N, H, G = np.random.default_rng(2), 6, 11, cell.gates

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float32).astype(dtype)

    def scratch(widths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        return tuple([np.full((N, width * H), np.nan, dtype) for width in widths])

    bias_hh = normal(G * H) if bias else None
    weights = Weights(normal(G * H, 3), normal(G * H, H), None, bias_hh)
    gates, saved = normal(N, G * H), np.full((N, cell.saved * H), np.nan, dtype)
    states = tuple([normal(N, H) for _ in cell.state_names])
    next_states = tuple([np.full((N, H), np.nan, dtype) for _ in states])
    dstates = tuple([normal(N, H) for _ in states])
    counted = SimpleNamespace(launches=0) if xp is np else xp
    rest = (gates, saved, states, next_states)
    cell.forward(xp, weights, Buffers(*rest, (), scratch(cell.forward_scratch)))
    forward = counted.launches
    results = {f"{n}_next": a.copy() for n, a in zip(cell.state_names, next_states, strict=True)}
    cell.backward(xp, weights, Buffers(*rest, dstates, scratch(cell.backward_scratch)))
    results |= {f"d{name}": array for name, array in zip(cell.state_names, dstates, strict=True)}
    return results | {"dgh": gates, "saved": saved}, (forward, counted.launches - forward)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_fused_step_matches_the_reference_step(
    name: str, dtype: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    xp, run = Products(), HostElementwiseKernel.__call__

    def count(self: Any, *args: Any, size: int) -> None:
        xp.launches += 1
        run(self, *args, size=size)

    monkeypatch.setattr(HostElementwiseKernel, "__call__", count)
    fused, launches = run_step(POINTWISE[name], xp, dtype, bias)
    plain, _ = run_step(CELLS[name], np, "float64", bias)
    assert fused.keys() == plain.keys()
    for what, expected in plain.items():
        if expected.size:
            assert_close(fused[what], expected, dtype, what, steps=1, width=11, layers=1)
    assert launches == POINTWISE[name].kernel_launches


def test_buffers_are_those_of_the_signatures() -> None:
    """Of which the compiler checks the types, and that what is const is only read."""
    by_name = {buffer.name: buffer for buffer in TABLE["gru_forward_gates_bias"].buffers}
    assert list(by_name) == ["gh", "h", "bias_hh", "gates", "saved", "h_next"]
    assert by_name["bias_hh"] == ("A", "bias_hh", "in")
    assert by_name["gates"] == ("C", "gates", "inout")
    assert by_name["h_next"] == ("C", "h_next", "out")
    for kernel in KERNELS:
        name = kernel.operation.partition("<")[0]
        (signature,) = re.findall(rf"void {name}\((.*?{{.*?)\n", source(kernel.header), re.DOTALL)
        arrays = re.findall(r"(const )?([CA])\* (\w+)", signature)
        expected = [(kind, array, bool(const)) for const, kind, array in arrays]
        if "nullptr" in kernel.operation:
            expected.remove(("A", "bias_hh", True))
        assert [(b.type, b.name, b.use == "in") for b in kernel.buffers] == expected
