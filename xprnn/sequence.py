"""The directions of one layer: input product -> time loop -> products for the weights.

Works on packed arrays, rows longest first; `layout.py` says how they stand. A direction is run by
itself, or two of them together where one launch takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .backend import Array
from .cells import Buffers, Cell, Weights
from .directions import Direction, Trace, Undoing
from .kernels import Engine
from .layout import Layout
from .numerics import sum_rows
from .scratch import Workspace


def forward(
    engine: Engine,
    directions: Sequence[Direction],
    x: Array,
    layout: Layout,
    kept: Workspace,
    scratch: Workspace,
    record: bool,
) -> list[Trace]:
    """Run all steps of directions of one layer.

    `x` (S, I) is read. The traces are written, in memory of `kept`; their `saved` is complete
    only with `record`. `scratch` is free again afterwards.
    """
    n_0, H = layout.running, directions[0].ends[0].shape[1]
    traces = [begin(engine, direction, x, layout, kept, record) for direction in directions]
    work = "training" if record else "forward"
    whole = engine.whole(work, n_0, H, layout.steps, len(directions))
    if whole is None or not whole[0].from_input:
        for direction, trace in zip(directions, traces, strict=True):
            bias = engine.cell.input_bias(direction.weights, engine.compute_dtype)
            input_side(engine.xp, direction.weights, bias, x, trace.gates)
    if whole is None:
        for direction, trace in zip(directions, traces, strict=True):
            _take_steps(engine, direction, trace, layout, scratch, record)
    else:
        kernels, chosen = whole
        kernels.forward(chosen, directions, traces, layout, scratch, record)
    for direction, trace in zip(directions, traces, strict=True):
        for state, end in zip(trace.states, direction.ends, strict=True):
            end[:n_0] = layout.final(state, direction.reverse)
    return traces


def begin(
    engine: Engine, direction: Direction, x: Array, layout: Layout, kept: Workspace, record: bool
) -> Trace:
    """The trace of a direction, none of which but x is written yet."""
    T, H = engine.compute_dtype, direction.ends[0].shape[1]
    narrow, wide = trace_shapes(engine.cell, H, layout.running, layout.total, record)
    gates, saved, h = [kept.empty(*shape, dtype=T) for shape in narrow]
    return Trace(x, gates, saved, (h, *[kept.empty(*shape) for shape in wide]))


def trace_shapes(
    cell: Cell, H: int, running: int, total: int, record: bool
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The shapes of a trace's own arrays: of gates, saved and h, and of the other states."""
    saved, states = total if record else running, (running + total, H)
    narrow = [(total, cell.gates * H), (saved, cell.saved * H), states]
    return narrow, [states for _ in cell.state_names[1:]]


def step(
    xp: Any, cell: Cell, weights: Weights, bias: Array | None, x: Array, here: Buffers
) -> None:
    """One step of one direction of one layer alone, from x (N, I).

    `bias` is what the cell's `input_bias` gives, for all rows or for each; the buffers are those
    of `Cell`.
    """
    input_side(xp, weights, bias, x, here.gates)
    cell.forward(xp, weights, here)


def input_side(xp: Any, weights: Weights, bias: Array | None, x: Array, gates: Array) -> None:
    """Write gx to `gates` (S, G*H), as `Cell` wants it; x (S, I) and `bias` (G*H,) are read."""
    xp.matmul(x, weights.weight_ih.T, out=gates)
    if bias is not None:
        gates += bias


def _take_steps(
    engine: Engine,
    direction: Direction,
    trace: Trace,
    layout: Layout,
    scratch: Workspace,
    record: bool,
) -> None:
    """The time loop of `forward`: gates, saved and states of `trace` are written."""
    weights, ends, reverse = direction.weights, direction.ends, direction.reverse
    xp, cell, H = engine.xp, engine.cell, ends[0].shape[1]
    carved = Carved(scratch, layout.running, cell.forward_scratch, H)
    gates, saved, states = trace.gates, trace.saved, trace.states
    ahead: tuple[Array, ...] = ()
    for _, rows, joined, at, before, after in layout.walk(reverse):
        if rows > joined:
            for state, end in zip(states, ends, strict=True):
                state[before + joined : before + rows] = end[joined:rows]
        # what one step writes the next one reads; CuPy takes microseconds for each view
        here = ahead if rows == joined and ahead else _block(states, before, rows)
        ahead = _block(states, after, rows)
        place = at if record else 0
        mine = gates[at : at + rows], saved[place : place + rows]
        cell.forward(xp, weights, Buffers(*mine, here, ahead, (), carved.rows(rows)))


def backward(
    engine: Engine, directions: Sequence[Undoing], layout: Layout, scratch: Workspace
) -> None:
    """Undo all steps of directions of one layer, then multiply for the weights and the input."""
    H = directions[0].dstates[0].shape[1]
    # the norms of `flow` are taken between steps
    between = directions[0].flow is not None
    sizes = layout.running, H, layout.steps, len(directions)
    whole = None if between else engine.whole("backward", *sizes)
    if whole is None:
        for undoing in directions:
            _undo_steps(engine, undoing, layout, scratch)
    else:
        kernels, chosen = whole
        kernels.backward(chosen, directions, layout, scratch)
    for undoing in directions:
        trace = undoing.trace
        previous = layout.previous(trace.states[0], undoing.reverse)
        _weight_gradients(engine.xp, engine.cell, trace, previous, undoing.dweights)
        if undoing.dx is not None:
            engine.xp.matmul(trace.gates, undoing.weights.weight_ih, out=undoing.dx)


def _undo_steps(engine: Engine, undoing: Undoing, layout: Layout, scratch: Workspace) -> None:
    """The time loop of `backward`: in the trace gates become dgh; `dstates` are overwritten."""
    xp, cell, trace, flow = engine.xp, engine.cell, undoing.trace, undoing.flow
    weights, doutput, dstates = undoing.weights, undoing.doutput, undoing.dstates
    carved = Carved(scratch, layout.running, cell.backward_scratch, dstates[0].shape[1])
    dnext: tuple[Array, ...] = ()
    here: tuple[Array, ...] = ()
    for t, rows, joined, at, before, after in layout.walk(undoing.reverse, undo=True):
        ahead = here if rows == joined and here else _block(trace.states, after, rows)
        here = _block(trace.states, before, rows)
        if rows != joined or not dnext:
            dnext = _block(dstates, 0, rows)
        if doutput is not None:
            dh = dnext[0]
            dh += doutput[at : at + rows]
        if flow is not None:
            flow[t] = sum((dstate * dstate).sum() for dstate in dnext) ** 0.5
        mine = trace.gates[at : at + rows], trace.saved[at : at + rows]
        cell.backward(xp, weights, Buffers(*mine, here, ahead, dnext, carved.rows(rows)))


def _block(arrays: tuple[Array, ...], start: int, rows: int) -> tuple[Array, ...]:
    """The same rows of each array, as views."""
    # a list first, here and in the callers: tuple(generator) leaves an entry in CPython's free
    # list at each call, and a long run would seem to grow
    return tuple([array[start : start + rows] for array in arrays])


def _weight_gradients(
    xp: Any, cell: Cell, trace: Trace, previous: Array, dweights: Weights
) -> None:
    """One product over all steps per weight; turns the trace's gates from dgh into dgx."""
    dgates = trace.gates
    if dweights.weight_hh is not None:
        cell.recurrent_gradient(xp, dgates, previous, trace.saved, dweights.weight_hh)
    if dweights.bias_hh is not None:
        sum_rows(xp, dgates, dweights.bias_hh)
    cell.to_input_side(dgates, trace.saved)
    if dweights.weight_ih is not None:
        xp.matmul(dgates.T, trace.x, out=dweights.weight_ih)
    if dweights.bias_ih is not None:
        sum_rows(xp, dgates, dweights.bias_ih)


class Carved:
    """Contiguous scratch arrays (rows, width*H), carved anew only when `rows` changes."""

    def __init__(
        self, workspace: Workspace, most_rows: int, widths: tuple[int, ...], H: int
    ) -> None:
        self._flat = [workspace.empty(most_rows * width * H) for width in widths]
        self._widths = [width * H for width in widths]
        self._rows = -1
        self._arrays: tuple[Array, ...] = ()

    def rows(self, rows: int) -> tuple[Array, ...]:
        """The arrays for a step with `rows` active rows, uninitialised."""
        if rows != self._rows:
            self._rows = rows
            self._arrays = tuple(
                [
                    flat[: rows * width].reshape(rows, width)
                    for flat, width in zip(self._flat, self._widths, strict=True)
                ]
            )
        return self._arrays
