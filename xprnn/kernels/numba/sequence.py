"""Whole sequences: one compiled function for all steps of one direction of a layer.

They replace the time loops of `xprnn/sequence.py`, work on the same arrays and leave in them
what the loops leave.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
from numba import types

from ...arithmetic import Arithmetic
from ...backend import Array
from ...cells import CELLS
from ...directions import Direction, Trace, Undoing
from ...layout import Layout
from ...scratch import Workspace
from . import SEQUENCE
from . import gates as by_element
from .jit import compile_for, number_of, read, written
from .loops import backward_loop, forward_loop
from .product import panels_of, width_of

CHUNK = 64  # rows whose input side is computed at a time: enough for the weights to pay off
FEW = 8  # rows of all steps
# Multiply-adds of a step from which the BLAS's threads outdo these kernels, which have one: about
# 80 microseconds of it.
ALONE = 4_000_000
_BESIDE = ("gru",)  # cells of which a part of dh does not go through the product


class SequenceKernels:
    """The functions that take all steps of a direction of a layer, in float32 or float64.

    Two directions have their turns one after the other.
    """

    unit = "call"
    from_input = True

    def __init__(self, cell: str, arithmetic: Arithmetic) -> None:
        self._cell = cell
        self._dtype = arithmetic.dtype

    def plan(self, work: str, N: int, H: int, T: int, directions: int) -> str | tuple[()]:
        """Nothing to be planned for "forward", "training" or "backward", or why none fits."""
        if self._cell not in SEQUENCE:
            return f"no sequence kernel for cell '{self._cell}'"
        return ()

    def outdone(self, N: int, width: int, H: int, T: int) -> str:
        """Why "auto" leaves a call to the parts, between which NumPy's BLAS multiplies."""
        if T == 1 or N * T < FEW:
            return f"N={N} T={T}: to pack the weights takes longer than so few steps"
        threads, work = _threads(), N * (width + H) * H * CELLS[self._cell].gates
        if threads > 1 and work > ALONE:
            return f"N={N} I={width} H={H}: the products are worth the BLAS's {threads} threads"
        return ""

    def forward(
        self,
        chosen: Any,
        directions: Sequence[Direction],
        traces: Sequence[Trace],
        layout: Layout,
        scratch: Workspace,
        record: bool,
    ) -> None:
        """All steps, from x: of the traces every state is written, with `record` all else too."""
        for direction, trace in zip(directions, traces, strict=True):
            mark = scratch.mark()
            self._take(direction, trace, layout, scratch, record)
            scratch.rewind(mark)

    def _take(
        self, direction: Direction, trace: Trace, layout: Layout, scratch: Workspace, record: bool
    ) -> None:
        """`forward` of one direction."""
        weights, dtype, x = direction.weights, self._dtype, trace.x
        width, H = weights.weight_hh.shape
        panels_ih, gx = self._room(scratch, x.shape[1], width, max(CHUNK, layout.running))
        panels_hh, gh = self._room(scratch, H, width, layout.running)
        filled = scratch.empty(gx.shape[1])
        filled[...] = 0.0
        bias = CELLS[self._cell].input_bias(weights, dtype)
        if bias is not None:
            filled[:width] = bias
        bias_hh = filled if weights.bias_hh is None else weights.bias_hh
        read = weights.weight_ih, weights.weight_hh, filled.reshape(len(panels_ih), -1), bias_hh
        saved = trace.saved if record else None
        initial = _first(direction.ends, layout)
        _forward(self._cell, dtype, record)(
            *(*read, panels_ih, panels_hh, gx, gh, x, trace.gates, saved, trace.states, initial),
            *(_counts(layout), direction.reverse),
        )

    def backward(
        self, chosen: Any, directions: Sequence[Undoing], layout: Layout, scratch: Workspace
    ) -> None:
        """Undo all steps: of the traces gates become dgh; saved, what the cell's `backward` makes.

        `dstates` become those of the initial states. Rows of `doutput` may stand apart.
        """
        for undoing in directions:
            mark, trace, doutput = scratch.mark(), undoing.trace, undoing.doutput
            H, width = trace.states[0].shape[1], trace.gates.shape[1]
            panels, through = self._room(scratch, width, H, layout.running)
            if doutput is None:
                doutput = np.empty((0, H), self._dtype)
            arrays = trace.gates, trace.saved, trace.states, doutput
            _backward(self._cell, self._dtype)(
                *(undoing.weights.weight_hh, panels, through, *arrays),
                *(_first(undoing.dstates, layout), _counts(layout), undoing.reverse),
            )
            scratch.rewind(mark)

    def _room(self, scratch: Workspace, K: int, columns: int, rows: int) -> tuple[Array, Array]:
        """Uninitialised arrays for the weights of a product over K, and for its result."""
        count, width = panels_of(columns, self._dtype), width_of(self._dtype)
        return scratch.empty(count, K, width), scratch.empty(rows, count * width)


def _threads() -> int:
    """The threads that NumPy's BLAS takes, by the usual variables or the processors there are."""
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        if (text := os.environ.get(name, "")).isdecimal():
            return int(text)
    return os.cpu_count() or 1


def _first(states: tuple[Array, ...], layout: Layout) -> tuple[Array, ...]:
    """The rows that take any step at all, as views; a list first, as in `xprnn/sequence.py`."""
    return tuple([state[: layout.running] for state in states])


def _counts(layout: Layout) -> np.ndarray:
    if layout.ragged is None:
        return np.full(layout.steps, layout.batch)
    counts: np.ndarray = layout.ragged.counts
    return counts


@cache
def _forward(cell: str, dtype: np.dtype[Any], record: bool) -> Any:
    """The compiled loop of a cell."""
    number = number_of(dtype)
    matrix, states = written(number, 2), _states(cell, number)
    function = forward_loop(cell, getattr(by_element, f"{cell}_forward"))
    saved = matrix if record else types.none
    weight, panels = read(number, 2), written(number, 3)
    before = weight, weight, matrix, read(number, 1), panels, panels, matrix, matrix, matrix
    after = matrix, saved, states, states, types.Array(types.intp, 1, "C"), types.boolean
    return compile_for(function, (*before, *after))


@cache
def _backward(cell: str, dtype: np.dtype[Any]) -> Any:
    """The compiled loop of a cell."""
    number = number_of(dtype)
    matrix, states = written(number, 2), _states(cell, number)
    gates_of = getattr(by_element, f"{cell}_backward")
    function = backward_loop(cell, gates_of, cell in _BESIDE)
    doutput = types.Array(number, 2, "A", readonly=True)
    before = read(number, 2), written(number, 3), matrix, matrix, matrix
    after = states, doutput, states, types.Array(types.intp, 1, "C"), types.boolean
    return compile_for(function, (*before, *after))


def _states(cell: str, number: Any) -> types.UniTuple:
    return types.UniTuple(written(number, 2), len(CELLS[cell].state_names))


def compilations() -> list[Callable[[], Any]]:
    """What compiles each loop, in every type, if it is called."""
    kinds = [(cell, np.dtype(dtype)) for cell in SEQUENCE for dtype in ("float32", "float64")]
    forward = [partial(_forward, *kind, record) for kind in kinds for record in (False, True)]
    return [*forward, *(partial(_backward, *kind) for kind in kinds)]
