"""Sequence kernels: compiled functions for all steps of a direction of a layer, and its gradients.

The contents of the arrays are those of the step loop of `xprnn/engine/loop.py`. Where several
threads are faster, each runs a direction or some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numba import types

from ...backend import Array, Backend
from ...cells import CELLS, Weights
from ...core.packing import PackedBatch
from ...core.passes import Activations, BackwardPass, ForwardPass
from ...core.precision import PrecisionPolicy
from ...core.workspace import Workspace
from ..interface import CallContext, Pass, RunnerCosts, Sizes, Unsupported
from ..shared import allocate, write_results
from . import gates as by_element
from . import gradients, product, threads
from .jit import compile_for, number_of, read, written
from .loops import backward_loop, forward_loop
from .product import panels_of, width_of
from .table import SEQUENCE

INPUT_ROWS = 64  # rows whose gx is computed at a time: enough to reuse each weight often
MIN_ROW_STEPS = 8  # rows times steps of a call
# Multiply-adds of a call per thread, about 0.4 ms: with 13 million two threads took as long as one
PER_THREAD = 20_000_000
SLICE_MULTIPLE = 4  # of a slice's first row and size, so that the bits do not depend on slices
# Minimum rows of a slice where threads get two each, of which a late thread leaves one to others
MIN_SLICE_ROWS = 8
CALLER_ONLY = threads.pool(1)
_WITH_DIRECT_TERM = ("gru",)  # cells with a term of dh that bypasses the product


class NumbaRunner:
    """The compiled loops of a cell, in float32 or float64."""

    unit = "call"

    def __init__(self, backend: Backend, cell: str, precision: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell
        self._dtype = precision.dtype
        scratch = gradients.BLOCK * width_of(self._dtype)
        self.costs: RunnerCosts = RunnerCosts(
            packs_weights=True, scratch=scratch, input_rows=INPUT_ROWS
        )

    def unsupported(self, kind: Pass, sizes: Sizes, directions: int) -> Unsupported | None:
        """Why a pass cannot be run, which depends on the cell only."""
        if self._cell not in SEQUENCE:
            return Unsupported(f"no sequence kernel for cell '{self._cell}'")
        return None

    def not_profitable(self, sizes: Sizes) -> Unsupported | None:
        """Why "auto" uses the step loop, with NumPy's products, for a call."""
        N, T = sizes.N, sizes.T
        if T == 1 or N * T < MIN_ROW_STEPS:
            return Unsupported(f"N={N} T={T}: packing the weights takes longer than so few steps")
        return None

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """All directions of a layer together."""
        return [range(directions)]

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""
        batch, scratch, record = call.batch, call.scratch, call.record
        cell, dtype = CELLS[self._cell], self._dtype
        # an unrecorded call has no gates
        results = [allocate(cell, dtype, each, call, with_gates=record) for each in passes]
        width, H = passes[0].weights.weight_hh.shape
        counts = _counts(batch)
        function = _forward(self._cell, dtype, record)

        def make_calls(parts: Sequence[tuple[int, int]]) -> list[threads.Call]:
            calls: list[threads.Call] = []
            for direction, (x, gates, saved, states) in zip(passes, results, strict=True):
                arrays = direction.packed.get("forward", partial(self._packed, direction.weights))
                ends = direction.ends
                if batch.running < batch.batch:
                    ends = _running_rows(ends, batch)
                for part in parts:
                    workspace = self._scratch(scratch, part, x.shape[1], arrays[1])
                    outputs = gates, saved if record else None, states
                    inputs = ends, counts, direction.reverse, *part
                    calls.append(partial(function, *arrays, *workspace, x, *outputs, *inputs))
            return calls

        weight_count = len(passes) * width * (passes[0].x.shape[1] + H)
        _run(make_calls, batch, weight_count, len(passes))
        for direction, activations in zip(passes, results, strict=True):
            write_results(direction, activations, batch)
        return results

    def _packed(self, weights: Weights, old: tuple[Array, ...] | None) -> tuple[Array, ...]:
        """The weights and biases of a direction in the layout of the forward loops."""
        ih, hh, filled, _ = old or (None,) * 4
        ih = self._panels("pack_transposed", weights.weight_ih, ih)
        hh = self._panels("pack_transposed", weights.weight_hh, hh)
        if filled is None:
            filled = self._backend.zeros_aligned(hh.shape[0] * hh.shape[2], self._dtype)
            filled = filled.reshape(len(hh), -1)
        bias = CELLS[self._cell].input_bias(weights, self._dtype)
        if bias is not None:
            filled.reshape(-1)[: bias.size] = bias
        return ih, hh, filled, filled.reshape(-1) if weights.bias_hh is None else weights.bias_hh

    def _scratch(
        self, scratch: Workspace, part: tuple[int, int], width: int, panels: Array
    ) -> list[Array]:
        """Workspace for x and gx of a block of steps, and for a step's product."""
        rows, columns = part[1] - part[0], panels.shape[0] * panels.shape[2]
        input_rows = max(INPUT_ROWS, -(-rows // 4) * 4)
        return scratch.arrays((input_rows, width), (input_rows, columns), (rows, columns))

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer; overwrites the gates with dgx."""
        batch, scratch = call.batch, call.scratch
        width, H = passes[0].weights.weight_hh.shape
        counts = _counts(batch)
        function = _backward(self._cell, self._dtype)

        def make_calls(parts: Sequence[tuple[int, int]]) -> list[threads.Call]:
            calls: list[threads.Call] = []
            for direction in passes:
                pack = partial(self._panels, "pack", direction.weights.weight_hh)
                panels = direction.packed.get("backward", pack)
                _, gates, saved, states = direction.activations
                doutput = direction.doutput
                if doutput is None:
                    doutput = np.empty((0, H), self._dtype)
                dstates = direction.dstates
                if batch.running < batch.batch:
                    dstates = _running_rows(dstates, batch)
                for part in parts:
                    dh = scratch.empty(part[1] - part[0], panels.shape[0] * panels.shape[2])
                    arrays = gates, saved, states, doutput, dstates, counts
                    calls.append(partial(function, panels, dh, *arrays, direction.reverse, *part))
            return calls

        _run(make_calls, batch, len(passes) * width * H, len(passes))
        self._gradients(passes, batch, scratch)

    def _gradients(
        self, passes: Sequence[BackwardPass], batch: PackedBatch, scratch: Workspace
    ) -> None:
        """Compute the gradients of weights, biases and input, after the loops."""
        packed, weight_count = [], 0
        for each in passes:
            matrix, panels = each.weights.weight_ih, None
            weight_count += matrix.size + each.weights.weight_hh.size
            if each.dx is not None:
                weight_count += matrix.size
                panels = each.packed.get("input", partial(self._panels, "pack", matrix))
            packed.append(panels)
        cell = CELLS[self._cell]
        if batch.total * weight_count < PER_THREAD:
            gradients.compute(cell, passes, packed, batch, scratch, CALLER_ONLY)
            return
        with threads.pool(_profitable_threads(batch, weight_count)) as pool:
            gradients.compute(cell, passes, packed, batch, scratch, pool)

    def _panels(self, how: str, matrix: Array, panels: Array | None) -> Array:
        """Panels of a matrix (K, columns), by `pack`, or (columns, K), by `pack_transposed`.

        They are written to `panels`, or to a new array if that is None.
        """
        if panels is None:
            K, columns = matrix.shape if how == "pack" else matrix.shape[::-1]
            shape = panels_of(columns, self._dtype), K, width_of(self._dtype)
            panels = self._backend.zeros_aligned(prod(shape), self._dtype).reshape(shape)
        _packing(how, self._dtype)(matrix, panels)
        return panels


def _run(
    make_calls: Callable[[Sequence[tuple[int, int]]], list[threads.Call]],
    batch: PackedBatch,
    weight_count: int,
    directions: int,
) -> None:
    """Run the calls for slices of rows, in as many threads as is profitable."""
    if batch.total * weight_count < PER_THREAD:  # without acquiring threads
        for call in make_calls([(0, batch.running)] if batch.running else []):
            call()
        return
    with threads.pool(_profitable_threads(batch, weight_count)) as pool:
        pool.run(make_calls(_slices(batch, pool.size, directions)))


def _profitable_threads(batch: PackedBatch, weight_count: int) -> int:
    """The number of threads worth using for products of all rows and steps with the weights."""
    return batch.total * weight_count // PER_THREAD + 1


def _slices(batch: PackedBatch, threads: int, directions: int) -> list[tuple[int, int]]:
    """The rows of each direction in slices with about equal numbers of steps."""
    rows = batch.running
    parts = max(threads, min(2 * threads, directions * (rows // MIN_SLICE_ROWS))) // directions
    parts = max(1, min(parts, rows // SLICE_MULTIPLE)) if threads > 1 else 1
    ends = [rows * part / parts for part in range(1, parts)]
    if batch.ragged is not None and ends:
        steps = np.searchsorted(-_counts(batch), -np.arange(rows))  # of each row
        shares = np.arange(1, parts) * batch.total / parts
        ends = (np.searchsorted(np.cumsum(steps), shares) + 1).tolist()
    bounds = [0, *[round(end / SLICE_MULTIPLE) * SLICE_MULTIPLE for end in ends], rows]
    return [part for part in pairwise(bounds) if part[0] < part[1]]


def _running_rows(states: tuple[Array, ...], batch: PackedBatch) -> tuple[Array, ...]:
    """The rows that run at least one step, as views."""
    return tuple([state[: batch.running] for state in states])


def _counts(batch: PackedBatch) -> np.ndarray:
    """The number of rows of each step."""
    if batch.ragged is None:
        full = np.empty(batch.steps, np.intp)
        full.fill(batch.batch)
        return full
    counts: Any = batch.ragged.counts
    return counts


@cache
def _packing(name: str, dtype: np.dtype[Any]) -> Any:
    """The compiled `pack` or `pack_transposed`."""
    pack = getattr(product, name)

    def packing(matrix: Any, panels: Any) -> None:
        pack(matrix, panels)

    packing.__name__ = name
    number = number_of(dtype)
    return compile_for(packing, (read(number, 2), written(number, 3)))


@cache
def _forward(cell: str, dtype: np.dtype[Any], record: bool) -> Any:
    """The compiled forward loop of a cell."""
    number = number_of(dtype)
    matrix, panels, states = written(number, 2), written(number, 3), _states(cell, number)
    function = forward_loop(cell, getattr(by_element, f"{cell}_forward"))
    saved = matrix if record else types.none
    inputs = panels, panels, matrix, read(number, 1), matrix, matrix, matrix, matrix, matrix
    return compile_for(function, (*inputs, saved, states, states, *_SLICE_TYPES))


@cache
def _backward(cell: str, dtype: np.dtype[Any]) -> Any:
    """The compiled backward loop of a cell."""
    number = number_of(dtype)
    matrix, states = written(number, 2), _states(cell, number)
    gates_of = getattr(by_element, f"{cell}_backward")
    function = backward_loop(cell, gates_of, cell in _WITH_DIRECT_TERM)
    doutput = types.Array(number, 2, "A", readonly=True)
    arrays = written(number, 3), matrix, matrix, matrix, states, doutput, states
    return compile_for(function, (*arrays, *_SLICE_TYPES))


# the last arguments of the loops: counts, reverse, and the first and last row of a slice
_SLICE_TYPES = types.Array(types.intp, 1, "C"), types.boolean, types.intp, types.intp


def _states(cell: str, number: Any) -> types.UniTuple:
    return types.UniTuple(written(number, 2), len(CELLS[cell].state_names))


def needed(cell: str, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """Functions that compile the loops of a cell; with `record` the backward loops too."""
    functions: list[Callable[[], Any]] = [
        partial(_packing, "pack_transposed", dtype),
        partial(_forward, cell, dtype, record),
    ]
    if record:
        functions += [partial(_packing, "pack", dtype), partial(_backward, cell, dtype)]
        functions += gradients.needed(dtype)
    return functions


def compilations() -> list[Callable[[], Any]]:
    """Functions that each compile a loop for one dtype."""
    dtypes = [np.dtype(dtype) for dtype in ("float32", "float64")]
    kinds = [(cell, dtype) for cell in SEQUENCE for dtype in dtypes]
    packing = [partial(_packing, name, t) for name in ("pack", "pack_transposed") for t in dtypes]
    forward = [partial(_forward, *kind, record) for kind in kinds for record in (False, True)]
    backward = [partial(_backward, *kind) for kind in kinds]
    return [*packing, *forward, *backward, *gradients.compilations()]
