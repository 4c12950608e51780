"""The directions of one layer: input product -> time loop -> products for the weights.

Works on packed arrays, rows longest first; `layout.py` says how they stand. A direction is run by
itself, or two of them together where one launch takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import blas, columns
from .backend import Array
from .cells import Buffers, Cell, Weights
from .directions import Activations, BackwardPass, ForwardPass
from .kernels import ExecutionPlan
from .layout import PackedBatch, Run
from .numerics import sum_rows
from .scratch import Workspace


def forward(
    engine: ExecutionPlan,
    directions: Sequence[ForwardPass],
    x: Array,
    layout: PackedBatch,
    kept: Workspace,
    scratch: Workspace,
    record: bool,
) -> list[Activations]:
    """Run all steps of directions of one layer.

    `x` (S, I) is read. The traces are written, in memory of `kept`; their `saved` is complete
    only with `record`. `scratch` is free again afterwards.
    """
    n_0, H = layout.running, directions[0].ends[0].shape[1]
    work = "training" if record else "forward"
    whole = engine.whole(work, n_0, H, layout.steps, len(directions))
    bare = whole is not None and whole[0].from_input and not record
    traces = [begin(engine, each, x, layout, kept, record, bare) for each in directions]
    if whole is None:
        for direction, trace in zip(directions, traces, strict=True):
            _take_steps(engine, direction, trace, layout, scratch, record)
    else:
        kernels, chosen = whole
        if not kernels.from_input:
            for direction, trace in zip(directions, traces, strict=True):
                _input_sides(engine, direction, trace)
        kernels.forward(chosen, directions, traces, layout, scratch, record)
    for direction, trace in zip(directions, traces, strict=True):
        for state, end in zip(trace.states, direction.ends, strict=True):
            end[:n_0] = layout.final(state, direction.reverse)
    return traces


def begin(
    engine: ExecutionPlan,
    direction: ForwardPass,
    x: Array,
    layout: PackedBatch,
    kept: Workspace,
    record: bool,
    bare: bool = False,
) -> Activations:
    """The trace of a direction, none of which but x is written yet; `bare`: no gates, no saved."""
    T, H = engine.compute_dtype, direction.ends[0].shape[1]
    narrow, wide = trace_shapes(engine.cell, H, layout.running, layout.total, record)
    h = kept.empty(*narrow.pop(), dtype=T)
    gates, saved = [x[:0]] * 2 if bare else [kept.empty(*shape, dtype=T) for shape in narrow]
    return Activations(x, gates, saved, (h, *[kept.empty(*shape) for shape in wide]))


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


def _input_sides(engine: ExecutionPlan, direction: ForwardPass, trace: Activations) -> None:
    """gx of all steps, in one product, to the trace's gates."""
    bias = engine.cell.input_bias(direction.weights, engine.compute_dtype)
    input_side(_products(engine), direction.weights, bias, trace.x, trace.gates)


def _products(engine: ExecutionPlan) -> Any:
    """What has the `matmul` of products over all steps."""
    return blas if engine.repeats else engine.xp


def _take_steps(
    engine: ExecutionPlan,
    direction: ForwardPass,
    trace: Activations,
    layout: PackedBatch,
    scratch: Workspace,
    record: bool,
) -> None:
    """The time loop of `forward`: gates, saved and states of `trace` are written."""
    in_steps = columns.takes_input(engine, layout)
    if not in_steps:
        _input_sides(engine, direction, trace)
    for run in layout.walk(direction.reverse):
        if run.rows > run.joined:
            joining = slice(run.joined, run.rows)
            for state, end in zip(trace.states, direction.ends, strict=True):
                state[run.before[0] :][joining] = end[joining]
        mark = scratch.mark()
        if columns.serves(engine, run):
            columns.take(engine.cell, direction.weights, trace, run, scratch, record, in_steps)
        else:
            _take_by_row(engine, direction.weights, trace, run, scratch, record)
        scratch.rewind(mark)


def _take_by_row(
    engine: ExecutionPlan,
    weights: Weights,
    trace: Activations,
    run: Run,
    scratch: Workspace,
    record: bool,
) -> None:
    """Steps as they stand, on the packed rows themselves."""
    xp, cell, rows = engine.xp, engine.cell, run.rows
    gates, saved = trace.gates, trace.saved
    work = _scratch(scratch, rows, cell.forward_scratch, trace.states[0].shape[1])
    # what one step writes the next one reads; CuPy takes microseconds for each view
    ahead = _block(trace.states, run.before[0], rows)
    for at, after in zip(run.gates, run.after, strict=True):
        here, ahead = ahead, _block(trace.states, after, rows)
        place = at if record else 0
        mine = gates[at : at + rows], saved[place : place + rows]
        cell.forward(xp, weights, Buffers(*mine, here, ahead, (), work))


def backward(
    engine: ExecutionPlan,
    directions: Sequence[BackwardPass],
    layout: PackedBatch,
    scratch: Workspace,
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
    if whole is None or not whole[0].to_weights:
        for undoing in directions:
            _gradients(engine, undoing, layout)


def _undo_steps(
    engine: ExecutionPlan, undoing: BackwardPass, layout: PackedBatch, scratch: Workspace
) -> None:
    """The time loop of `backward`: in the trace gates become dgh; `dstates` are overwritten."""
    for run in layout.walk(undoing.reverse, undo=True):
        mark = scratch.mark()
        if undoing.flow is None and columns.serves(engine, run):
            columns.undo(engine.cell, undoing, run, scratch)
        else:
            _undo_by_row(engine, undoing, run, scratch)
        scratch.rewind(mark)


def _undo_by_row(
    engine: ExecutionPlan, undoing: BackwardPass, run: Run, scratch: Workspace
) -> None:
    """Steps as they stand, on the packed rows themselves."""
    xp, cell, trace, rows = engine.xp, engine.cell, undoing.trace, run.rows
    weights, doutput, flow = undoing.weights, undoing.doutput, undoing.flow
    dnext = _block(undoing.dstates, 0, rows)
    work = _scratch(scratch, rows, cell.backward_scratch, dnext[0].shape[1])
    here = _block(trace.states, run.after[0], rows)
    for t, at, before in zip(run.times, run.gates, run.before, strict=True):
        ahead, here = here, _block(trace.states, before, rows)
        if doutput is not None:
            dh = dnext[0]
            dh += doutput[at : at + rows]
        if flow is not None:
            flow[t] = sum((dstate * dstate).sum() for dstate in dnext) ** 0.5
        mine = trace.gates[at : at + rows], trace.saved[at : at + rows]
        cell.backward(xp, weights, Buffers(*mine, here, ahead, dnext, work))


def _block(arrays: tuple[Array, ...], start: int, rows: int) -> tuple[Array, ...]:
    """The same rows of each array, as views."""
    # a list first, here and in the callers: tuple(generator) leaves an entry in CPython's free
    # list at each call, and a long run would seem to grow
    return tuple([array[start : start + rows] for array in arrays])


def _scratch(workspace: Workspace, rows: int, widths: tuple[int, ...], H: int) -> tuple[Array, ...]:
    """A step's scratch arrays, contiguous and uninitialised."""
    return tuple([workspace.empty(rows, width * H) for width in widths])


def _gradients(engine: ExecutionPlan, undoing: BackwardPass, layout: PackedBatch) -> None:
    """One product over all steps per weight, and dx; turns the trace's gates from dgh into dgx."""
    products, xp, cell = _products(engine), engine.xp, engine.cell
    trace, dweights = undoing.trace, undoing.dweights
    dgates = trace.gates
    if dweights.weight_hh is not None:
        previous = layout.previous(trace.states[0], undoing.reverse)
        cell.recurrent_gradient(products, dgates, previous, trace.saved, dweights.weight_hh)
    if dweights.bias_hh is not None:
        sum_rows(xp, dgates, dweights.bias_hh)
    cell.to_input_side(dgates, trace.saved)
    if dweights.weight_ih is not None:
        products.matmul(dgates.T, trace.x, out=dweights.weight_ih)
    if dweights.bias_ih is not None:
        sum_rows(xp, dgates, dweights.bias_ih)
    if undoing.dx is not None:
        products.matmul(dgates, undoing.weights.weight_ih, out=undoing.dx)
