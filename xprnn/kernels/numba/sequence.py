"""Whole sequences: one compiled function for all steps of a direction of a layer.

They replace the time loops of `xprnn/sequence.py`, work on the same arrays and leave in them
what the loops leave. Where several threads pay, each takes a direction or some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numba import types

from ...arithmetic import PrecisionPolicy
from ...backend import Array, Backend
from ...cells import CELLS, Weights
from ...directions import Activations, BackwardPass, ForwardPass
from ...layout import PackedBatch
from ...scratch import Workspace
from . import SEQUENCE, gradients, product, threads
from . import gates as by_element
from .jit import compile_for, number_of, read, written
from .loops import backward_loop, forward_loop
from .product import panels_of, width_of

CHUNK = 64  # rows whose input side is computed at a time: enough for the weights to pay off
FEW = 8  # rows of all steps
# Multiply-adds of a call for which another thread pays, some 0.4 ms of one: with 13 million two
# took as long as one
SHARED = 20_000_000
FEWEST = 4  # rows of a slice, whose first row is divisible by it: so the bits do not depend on it
FINE = 8  # rows of which two slices a thread are made, so that one that comes late takes fewer
_BESIDE = ("gru",)  # cells of which a part of dh does not go through the product


class SequenceKernels:
    """The functions that take all steps of a direction of a layer, in float32 or float64."""

    unit = "call"
    from_input = True
    to_weights = True
    packs = True
    ahead = CHUNK

    def __init__(self, backend: Backend, cell: str, arithmetic: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell
        self._dtype = arithmetic.dtype
        self.room: int = gradients.BLOCK * width_of(self._dtype)

    def plan(self, work: str, N: int, H: int, T: int, directions: int) -> str | tuple[()]:
        """Nothing to be planned for "forward", "training" or "backward", or why none fits."""
        if self._cell not in SEQUENCE:
            return f"no sequence kernel for cell '{self._cell}'"
        return ()

    def outdone(self, N: int, width: int, H: int, T: int) -> str:
        """Why "auto" leaves a call to the parts, between which NumPy's BLAS multiplies."""
        if T == 1 or N * T < FEW:
            return f"N={N} T={T}: to pack the weights takes longer than so few steps"
        return ""

    def forward(
        self,
        chosen: Any,
        directions: Sequence[ForwardPass],
        traces: Sequence[Activations],
        layout: PackedBatch,
        scratch: Workspace,
        record: bool,
    ) -> None:
        """All steps, from x: of the traces every state is written, with `record` all else too."""
        mark, (width, H) = scratch.mark(), directions[0].weights.weight_hh.shape
        weights = len(directions) * width * (traces[0].x.shape[1] + H)
        with threads.pool(_worth(layout, weights)) as pool:
            slices, calls = _slices(layout, pool.size, len(directions)), []
            for direction, trace in zip(directions, traces, strict=True):
                made = partial(self._packed, direction.weights)
                arrays = direction.packs.get("forward", made)
                for part in slices:
                    rooms = self._rooms(scratch, part, trace.x.shape[1], arrays[1])
                    calls.append(
                        partial(
                            _forward(self._cell, self._dtype, record),
                            *(*arrays, *rooms, trace.x, trace.gates),
                            *(trace.saved if record else None, trace.states),
                            *(_first(direction.ends, layout), _counts(layout), direction.reverse),
                            *part,
                        )
                    )
            pool.run(calls)
        scratch.rewind(mark)

    def _packed(self, weights: Weights, old: tuple[Array, ...] | None) -> tuple[Array, ...]:
        """The weights and biases of a direction as the loops forward read them."""
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

    def _rooms(
        self, scratch: Workspace, part: tuple[int, int], width: int, panels: Array
    ) -> tuple[Array, ...]:
        """Uninitialised arrays for x and the input side of some steps, and a step's product."""
        rows, columns = part[1] - part[0], panels.shape[0] * panels.shape[2]
        ahead = max(CHUNK, -(-rows // 4) * 4)
        sizes = (ahead, width), (ahead, columns), (rows, columns)
        return tuple([scratch.empty(*size) for size in sizes])

    def backward(
        self,
        chosen: Any,
        directions: Sequence[BackwardPass],
        layout: PackedBatch,
        scratch: Workspace,
    ) -> None:
        """Undo all steps, then multiply for the weights and x: of the traces gates become dgx.

        `dstates` become those of the initial states. Rows of `doutput` may stand apart.
        """
        mark, (width, H) = scratch.mark(), directions[0].weights.weight_hh.shape
        with threads.pool(_worth(layout, len(directions) * width * H)) as pool:
            slices, calls = _slices(layout, pool.size, len(directions)), []
            for undoing in directions:
                made = partial(self._panels, "pack", undoing.weights.weight_hh)
                panels = undoing.packs.get("backward", made)
                trace, doutput = undoing.trace, undoing.doutput
                if doutput is None:
                    doutput = np.empty((0, H), self._dtype)
                for part in slices:
                    through = scratch.empty(part[1] - part[0], panels.shape[0] * panels.shape[2])
                    calls.append(
                        partial(
                            _backward(self._cell, self._dtype),
                            *(panels, through, trace.gates, trace.saved, trace.states, doutput),
                            *(_first(undoing.dstates, layout), _counts(layout), undoing.reverse),
                            *part,
                        )
                    )
            pool.run(calls)
        scratch.rewind(mark)
        self._gradients(directions, layout, scratch)

    def _gradients(
        self, directions: Sequence[BackwardPass], layout: PackedBatch, scratch: Workspace
    ) -> None:
        """What `backward` does when all steps are undone."""
        packed, weights = [], 0
        for each in directions:
            matrix, panels = each.weights.weight_ih, None
            weights += matrix.size + each.weights.weight_hh.size
            if each.dx is not None:
                weights += matrix.size
                panels = each.packs.get("input", partial(self._panels, "pack", matrix))
            packed.append(panels)
        with threads.pool(_worth(layout, weights)) as pool:
            gradients.compute(CELLS[self._cell], directions, packed, layout, scratch, pool)

    def _panels(self, how: str, matrix: Array, panels: Array | None) -> Array:
        """A matrix (K, columns) by `pack`, or (columns, K) by `pack_transposed`.

        It is written to `panels`, or to a new array where None is given.
        """
        if panels is None:
            K, columns = matrix.shape if how == "pack" else matrix.shape[::-1]
            shape = panels_of(columns, self._dtype), K, width_of(self._dtype)
            panels = self._backend.zeros_aligned(prod(shape), self._dtype).reshape(shape)
        _packing(how, self._dtype)(matrix, panels)
        return panels


def _worth(layout: PackedBatch, weights: int) -> int:
    """How many threads may pay for the products of all rows and steps with these many weights."""
    return layout.total * weights // SHARED + 1


def _slices(layout: PackedBatch, threads: int, directions: int) -> list[tuple[int, int]]:
    """The rows of each direction in slices of about as many steps, for so many threads."""
    rows = layout.running
    parts = max(threads, min(2 * threads, directions * (rows // FINE))) // directions
    parts = max(1, min(parts, rows // FEWEST)) if threads > 1 else 1
    ends = [rows * part / parts for part in range(1, parts)]
    if layout.ragged is not None and ends:
        steps = np.searchsorted(-_counts(layout), -np.arange(rows))  # of each row
        shares = np.arange(1, parts) * layout.total / parts
        ends = (np.searchsorted(np.cumsum(steps), shares) + 1).tolist()
    bounds = [0, *[round(end / FEWEST) * FEWEST for end in ends], rows]
    return [part for part in pairwise(bounds) if part[0] < part[1]]


def _first(states: tuple[Array, ...], layout: PackedBatch) -> tuple[Array, ...]:
    """The rows that take any step at all, as views; a list first, as in `xprnn/sequence.py`."""
    if layout.running == layout.batch:
        return states
    return tuple([state[: layout.running] for state in states])


def _counts(layout: PackedBatch) -> np.ndarray:
    if layout.ragged is None:
        full = np.empty(layout.steps, np.intp)
        full.fill(layout.batch)
        return full
    counts: Any = layout.ragged.counts
    return counts


@cache
def _packing(name: str, dtype: np.dtype[Any]) -> Any:
    """`pack` or `pack_transposed` compiled."""
    pack = getattr(product, name)

    def packing(matrix: Any, panels: Any) -> None:
        pack(matrix, panels)

    packing.__name__ = name
    number = number_of(dtype)
    return compile_for(packing, (read(number, 2), written(number, 3)))


@cache
def _forward(cell: str, dtype: np.dtype[Any], record: bool) -> Any:
    """The compiled loop of a cell."""
    number = number_of(dtype)
    matrix, panels, states = written(number, 2), written(number, 3), _states(cell, number)
    function = forward_loop(cell, getattr(by_element, f"{cell}_forward"))
    saved = matrix if record else types.none
    before = panels, panels, matrix, read(number, 1), matrix, matrix, matrix, matrix, matrix
    return compile_for(function, (*before, saved, states, states, *_WHICH))


@cache
def _backward(cell: str, dtype: np.dtype[Any]) -> Any:
    """The compiled loop of a cell."""
    number = number_of(dtype)
    matrix, states = written(number, 2), _states(cell, number)
    gates_of = getattr(by_element, f"{cell}_backward")
    function = backward_loop(cell, gates_of, cell in _BESIDE)
    doutput = types.Array(number, 2, "A", readonly=True)
    before = written(number, 3), matrix, matrix, matrix, states, doutput, states
    return compile_for(function, (*before, *_WHICH))


# counts, reverse, low, high
_WHICH = types.Array(types.intp, 1, "C"), types.boolean, types.intp, types.intp


def _states(cell: str, number: Any) -> types.UniTuple:
    return types.UniTuple(written(number, 2), len(CELLS[cell].state_names))


def needed(cell: str, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """What compiles the loops of a cell, those of the backward pass too if it is recorded."""
    found: list[Callable[[], Any]] = [
        partial(_packing, "pack_transposed", dtype),
        partial(_forward, cell, dtype, record),
    ]
    if record:
        found += [partial(_packing, "pack", dtype), partial(_backward, cell, dtype)]
        found += gradients.needed(dtype)
    return found


def compilations() -> list[Callable[[], Any]]:
    """What compiles each loop, in every type, if it is called."""
    dtypes = [np.dtype(dtype) for dtype in ("float32", "float64")]
    kinds = [(cell, dtype) for cell in SEQUENCE for dtype in dtypes]
    packing = [partial(_packing, name, t) for name in ("pack", "pack_transposed") for t in dtypes]
    forward = [partial(_forward, *kind, record) for kind in kinds for record in (False, True)]
    backward = [partial(_backward, *kind) for kind in kinds]
    return [*packing, *forward, *backward, *gradients.compilations()]
