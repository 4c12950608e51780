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

from ...backend import Array, Backend
from ...cells import CELLS, Cell, Weights
from ...core.cell import GradientTerm
from ...core.packing import PackedBatch
from ...core.passes import Activations, BackwardPass, ForwardPass
from ...core.precision import PrecisionPolicy
from ...core.workspace import Workspace
from ..interface import CallContext, Pass, RunnerCosts, Sizes, Unsupported
from ..shared import allocate, extra_arrays, gradient_terms, write_results
from . import generated, gradients, masks, product, threads
from .jit import compile_for, number_of, read, written
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


class NumbaRunner:
    """The compiled loops of a cell, in float32 or float64."""

    unit = "call"

    def __init__(self, backend: Backend, cell: Cell, precision: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell
        self._dtype = precision.dtype
        self._by_size: dict[int, generated.Loops] = {}
        self._no_sums: Array = np.empty((2, 0, 0), self._dtype)
        scratch = gradients.BLOCK * width_of(self._dtype)
        step_scratch = 0
        if generated.is_generated(cell):
            step_scratch = generated.loops_of(
                cell, generated.size_of(cell), self._dtype
            ).step_scratch
        self.costs: RunnerCosts = RunnerCosts(
            packs_weights=True,
            scratch=scratch,
            input_rows=INPUT_ROWS,
            step_scratch=step_scratch,
            adds_up=True,
        )

    def unsupported(self, kind: Pass, sizes: Sizes, directions: int) -> Unsupported | None:
        """Why a pass cannot be run, which depends on the cell only."""
        if not generated.is_generated(self._cell):
            return Unsupported(f"no sequence kernel for cell '{self._cell.name}'")
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
        loops = self._loops(passes[0])
        # an unrecorded call has no gates
        results = [allocate(loops.cell, self._dtype, each, call, record) for each in passes]
        keep = partial(masks.keep, scratch)
        extra = [extra_arrays(np, loops.cell, each, keep) for each in passes]
        loop = loops.of(call.forward_pass, len(extra[0]) > len(loops.cell.extra_inputs))
        counts = _counts(batch)

        def make_calls(parts: Sequence[tuple[int, int]]) -> list[threads.Call]:
            calls: list[threads.Call] = []
            for direction, (x, gates, saved, states), each in zip(
                passes, results, extra, strict=True
            ):
                pack = partial(self._packed, direction.weights, loops, loop)
                ih, bias, *weights = direction.packed.get("forward", pack)
                ends = direction.ends
                if batch.running < batch.batch:
                    ends = _running_rows(ends, batch)
                for part in parts:
                    rows = part[1] - part[0]
                    input_rows, width = max(INPUT_ROWS, -(-rows // 4) * 4), bias.size
                    shapes = (input_rows, x.shape[1]), (input_rows, width)
                    steps = [(rows, width) for width in loop.scratch]
                    block, gx, *others = scratch.arrays(*shapes, *steps)
                    arrays = *weights, loop.columns, tuple(others)
                    outputs = gates, saved if record else None, states
                    inputs = each, ends, counts, direction.reverse, *part
                    arguments = ih, bias, block, gx, *arrays, x, *outputs, *inputs
                    calls.append(partial(loop.function, *arguments))
            return calls

        weight_count = passes[0].weights.weight_ih.size + loop.multiply_adds
        _run(make_calls, batch, len(passes) * weight_count, len(passes))
        for direction, activations in zip(passes, results, strict=True):
            write_results(direction, activations, batch)
        return results

    def _loops(self, direction: ForwardPass | BackwardPass) -> generated.Loops:
        """The loops of the cell, for the sizes of a pass."""
        hidden_size = len(direction.weights.weight_ih) // self._cell.gates
        loops = self._by_size.get(hidden_size)
        if loops is None:
            loops = generated.loops_of(self._cell, hidden_size, self._dtype)
            self._by_size[hidden_size] = loops
        return loops

    def _packed(
        self,
        weights: Weights,
        loops: generated.Loops,
        loop: generated.Loop,
        old: tuple[Any, ...] | None,
    ) -> tuple[Any, ...]:
        """W_ih and the bias of the input side, and what the steps read, packed."""
        ih, bias, *rest = old or (None, None, None, None)
        ih = self._panels("pack_transposed", weights.weight_ih, ih)
        if bias is None:
            bias = self._backend.zeros_aligned(ih.shape[0] * ih.shape[2], self._dtype)
            bias = bias.reshape(len(ih), -1)
        values = loops.cell.input_bias(weights, self._dtype)
        if values is not None:
            bias.reshape(-1)[: values.size] = values
        return ih, bias, *self._step_weights(weights, loops, loop, rest)

    def _step_weights(
        self,
        weights: Weights,
        loops: generated.Loops,
        loop: generated.Loop,
        old: Sequence[tuple[Array, ...] | None],
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The matrices that a step multiplies with, in panels, and the vectors that it reads."""
        panels: Sequence[Array | None] = old[0] or [None] * len(loop.products)
        matrices = [
            self._panels(
                "pack" if product.transposed else "pack_transposed",
                loops.matrix(weights, product),
                each,
            )
            for product, each in zip(loop.products, panels, strict=True)
        ]
        return tuple(matrices), tuple([loops.vector(weights, name) for name in loops.vectors])

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer; overwrites the gates with dgx."""
        batch, scratch = call.batch, call.scratch
        loops = self._loops(passes[0])
        keep = partial(masks.keep, scratch)
        extra = [extra_arrays(np, loops.cell, each, keep) for each in passes]
        loop = loops.of(Pass.BACKWARD, len(extra[0]) > len(loops.cell.extra_inputs))
        sums = [self._no_sums] * len(passes)
        if loops.cell.sums_size:
            sums = [scratch.empty(2, batch.running, loops.cell.sums_size) for _ in passes]
            for each in sums:
                each[...] = 0.0
        counts = _counts(batch)

        def make_calls(parts: Sequence[tuple[int, int]]) -> list[threads.Call]:
            calls: list[threads.Call] = []
            for direction, each, own in zip(passes, extra, sums, strict=True):

                def pack(old: Any, weights: Weights = direction.weights) -> Any:
                    return self._step_weights(weights, loops, loop, old or (None, None))

                weights = direction.packed.get("backward", pack)
                _, gates, saved, states = direction.activations
                doutput = direction.doutput
                if doutput is None:
                    doutput = np.empty((0, states[0].shape[1]), self._dtype)
                dstates = direction.dstates
                if batch.running < batch.batch:
                    dstates = _running_rows(dstates, batch)
                for part in parts:
                    rows = part[1] - part[0]
                    others = scratch.arrays(*[(rows, width) for width in loop.scratch])
                    arrays = *weights, loop.columns, tuple(others)
                    inputs = doutput, dstates, own, counts, direction.reverse, *part
                    arguments = *arrays, gates, saved, states, each, *inputs
                    calls.append(partial(loop.function, *arguments))
            return calls

        _run(make_calls, batch, len(passes) * loop.multiply_adds, len(passes))
        terms = [gradient_terms(loops.cell, each, batch) for each in passes]
        if loops.cell.sums_size:
            terms += [
                loops.cell.terms_of_sums(own[1], each.dweights)
                for each, own in zip(passes, sums, strict=True)
            ]
        self._gradients(terms, passes, batch, scratch, loop.multiply_adds)

    def _gradients(
        self,
        terms: Sequence[Sequence[GradientTerm]],
        passes: Sequence[BackwardPass],
        batch: PackedBatch,
        scratch: Workspace,
        multiply_adds: int,
    ) -> None:
        """Compute the gradients of weights, biases and input, after the loops.

        :param multiply_adds: of a step's products, for each row.
        """
        packed, weight_count = [], len(passes) * multiply_adds
        for each in passes:
            matrix, panels = each.weights.weight_ih, None
            weight_count += matrix.size * (1 if each.dx is None else 2)
            if each.dx is not None:
                panels = each.packed.get("input", partial(self._panels, "pack", matrix))
            packed.append(panels)
        if batch.total * weight_count < PER_THREAD:
            gradients.compute(terms, passes, packed, scratch, CALLER_ONLY)
            return
        with threads.pool(_profitable_threads(batch, weight_count)) as pool:
            gradients.compute(terms, passes, packed, scratch, pool)

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


def needed(cell: Cell, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """Functions that compile the loops of a cell; with `record` the backward loops too."""
    kinds = (Pass.TRAINING, Pass.BACKWARD) if record else (Pass.FORWARD,)
    functions: list[Callable[[], Any]] = [partial(_packing, "pack_transposed", dtype)]
    if record:
        functions += [partial(_packing, "pack", dtype), *gradients.needed(dtype)]
    loops = generated.loops_of(cell, generated.size_of(cell), dtype)
    modes = [False]
    if loops.cell.masks:
        modes.append(True)
        functions.append(partial(masks.compiled, dtype))
    return functions + [partial(loops.of, kind, each) for kind in kinds for each in modes]


def compilations() -> list[Callable[[], Any]]:
    """Functions that each compile a loop for one dtype."""
    dtypes = [np.dtype(dtype) for dtype in ("float32", "float64")]
    packing = [partial(_packing, name, t) for name in ("pack", "pack_transposed") for t in dtypes]
    loops = [
        generated.loops_of(CELLS[cell], generated.ANY_SIZE, t) for cell in SEQUENCE for t in dtypes
    ]
    kinds = (Pass.FORWARD, Pass.TRAINING, Pass.BACKWARD)
    made = [partial(each.of, kind, False) for each in loops for kind in kinds]
    return [*packing, *made, *gradients.compilations()]
