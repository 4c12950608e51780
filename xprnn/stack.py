"""Layers times directions: which sequences run, in what order, and the dropout between layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dropout, segments, wave
from .backend import Array
from .cells import Weights
from .directions import Activations, BackwardPass, ForwardPass, PackedWeightsCache
from .kernels import ExecutionPlan
from .kernels.wave import Layers
from .layout import PackedBatch, make_packed_batch, steps_and_batch
from .network import StackSpec
from .scratch import Workspace
from .segments import Segment


@dataclass
class Tape:
    """What one recorded call leaves behind; used up by `backward`."""

    engine: ExecutionPlan
    weights: list[list[Weights]]  # by layer and direction, as the products read them
    packs: PackedWeightsCache  # of these
    layout: PackedBatch
    segments: tuple[Segment, ...]  # to be recomputed; none: the traces are whole
    traces: list[list[Activations]]  # by layer and direction
    dropout_key: tuple[int, int]  # (seed, call)
    shape: tuple[int, ...]  # of x, as the caller gave it
    batch_first: bool
    spent: bool = False  # its undoing has begun


def forward(
    engine: ExecutionPlan,
    stack: StackSpec,
    weights: list[list[Weights]],
    packs: PackedWeightsCache,
    x: Array,
    initial: tuple[Array | None, ...] | None,
    lengths: np.ndarray | None,
    batch_first: bool,
    kept: Workspace,
    scratch: Workspace,
    dropout_key: tuple[int, int] | None,
    recompute: int | None = None,
) -> tuple[Array, tuple[Array, ...], Tape]:
    """Run every layer and direction; returns a new output, new final states, and the tape.

    Read: `weights`, `x` (T, N, I) or, batch first, (N, T, I), `initial` (L*D, N, H) each, None
    for zeros, `lengths` intp (N,); `packs`, read and added to: what kernels make of the weights,
    good for as long as these stand. The output is (T, N, D*H), laid out as x, the final states
    (L*D, N, H). With a `dropout_key` the call is recorded: dropout acts, and the tape, which
    stands in memory of `kept`, can be undone; for each layer it keeps what goes in, and of what
    the steps compute all, or the states before every `recompute` steps. `scratch` may be `kept`
    where it is not recorded.
    """
    xp, record, T = engine.xp, dropout_key is not None, engine.compute_dtype
    width, dtype = stack.num_directions * stack.hidden_size, engine.dtype
    if engine.arithmetic.narrow:
        weights = [[_to_read(each, T) for each in pair] for pair in weights]
    steps, batch = steps_and_batch(x, batch_first)
    layout = make_packed_batch(engine.backend, steps, batch, lengths)
    parts = segments.cut(engine.backend, layout, lengths, recompute if record else None)
    key = dropout_key or (0, 0)
    tape = Tape(engine, weights, packs, layout, parts, [], key, x.shape, batch_first)
    output = _caller_array(xp, layout, (*x.shape[:2], width), dtype)
    final = _sorted_states(xp, stack, layout, initial, dtype)
    x = _packed_input(engine, layout, x, batch_first, kept, record)
    packed = _as_packed(layout, output, batch_first, T)
    found = None
    if stack.num_layers > 1:
        net = Layers(stack.num_layers, stack.num_directions, record * stack.dropout, bool(parts))
        found = wave.forward(engine, net, weights, x, final, layout, kept, scratch, record)
    if found is None:
        last = _run_layers(stack, tape, x, final, kept, scratch, record, packed)
    else:
        (tape.traces, last), packed = found, None
    if packed is None:
        layout.unpack(last, _time_major(output, batch_first))
    layout.unsort_in_place(final)
    return output, final, tape


def _run_layers(
    stack: StackSpec,
    tape: Tape,
    x: Array,
    ends: tuple[Array, ...],
    kept: Workspace,
    scratch: Workspace,
    record: bool,
    packed: Array | None,
) -> Array:
    """Run one layer after the other: the rows (S, D*H) of the last, in `packed` if it is given."""
    layout, T = tape.layout, tape.engine.compute_dtype
    width = stack.num_directions * stack.hidden_size
    for layer in range(stack.num_layers):
        last = layer + 1 == stack.num_layers
        joined = packed if last else kept.empty(layout.total, width, dtype=T)
        if joined is None:
            joined = scratch.empty(layout.total, width, dtype=T)
        _run_layer(stack, tape, layer, x, ends, kept, scratch, record, joined)
        if record and not last:
            _drop(tape.engine.xp, stack, layout, joined, tape.dropout_key, layer)
        x = joined
    return x


def _run_layer(
    stack: StackSpec,
    tape: Tape,
    layer: int,
    x: Array,
    ends: tuple[Array, ...],
    kept: Workspace,
    scratch: Workspace,
    record: bool,
    joined: Array,
) -> None:
    """Run a layer's directions: `joined` (S, D*H) is written, the layer's of `ends` become final.

    With `record` its traces are put on the tape.
    """
    H, D, engine, layout = stack.hidden_size, stack.num_directions, tape.engine, tape.layout
    work = "training" if record else "forward"
    traces = []
    for group in engine.groups(work, layout.running, H, layout.steps, D):
        mark = scratch.mark()
        directions = [
            ForwardPass(
                tape.weights[layer][d],
                d == 1,
                tuple([end[layer * D + d] for end in ends]),
                tape.packs[layer, d],
            )
            for d in group
        ]
        outputs = [joined[:, d * H : (d + 1) * H] for d in group]
        traces += segments.forward(
            engine, directions, x, layout, tape.segments, kept, scratch, record, outputs
        )
        scratch.rewind(mark)
    if record:
        tape.traces.append(traces)


def backward(
    stack: StackSpec,
    tape: Tape,
    doutput: Array | None,
    dfinal: tuple[Array | None, ...],
    dweights: list[list[Weights]],
    need_dx: bool,
    scratch: Workspace,
    flow: Array | None = None,
) -> tuple[Array | None, tuple[Array, ...]]:
    """Undo `forward`; returns a new dx (None unless `need_dx`) and the gradients of `initial`.

    Read: `doutput` of the output's shape, `dfinal` (L*D, N, H) each; None stands for
    zeros. Written: `dweights`, every entry that is not None; `flow` (L*D, T), if given. The
    tape is used up.
    """
    xp, layout, total = tape.engine.xp, tape.layout, tape.layout.total
    width, dtype = stack.num_directions * stack.hidden_size, tape.engine.dtype
    dx = _caller_array(xp, layout, tape.shape, dtype) if need_dx else None
    dstates = _sorted_states(xp, stack, layout, dfinal, dtype)
    dlayer: Array | None = None
    if doutput is not None:
        dlayer = scratch.empty(total, width)
        layout.pack(_time_major(doutput, tape.batch_first), dlayer)
    spare: list[Array] = []
    for layer in range(stack.num_layers - 1, 0, -1):
        below = spare.pop() if spare else scratch.empty(total, width)
        _undo_layer(stack, tape, layer, dlayer, dstates, dweights, scratch, flow, below)
        _drop(xp, stack, layout, below, tape.dropout_key, layer - 1)
        if dlayer is not None:
            spare.append(dlayer)
        dlayer = below
    packed: Any = None if dx is None else _as_packed(layout, dx, tape.batch_first, dtype)
    below = packed
    if dx is not None and packed is None:
        below = scratch.empty(total, stack.input_size)
    _undo_layer(stack, tape, 0, dlayer, dstates, dweights, scratch, flow, below)
    if dx is not None and packed is None:
        layout.unpack(below, _time_major(dx, tape.batch_first))
    layout.unsort_in_place(dstates)
    return dx, dstates


def _undo_layer(
    stack: StackSpec,
    tape: Tape,
    layer: int,
    doutput: Array | None,
    dstates: tuple[Array, ...],
    dweights: list[list[Weights]],
    scratch: Workspace,
    flow: Array | None,
    dx: Array | None,
) -> None:
    """Undo a layer's directions: the gradient of its input is written to `dx` (S, I), if given.

    `doutput` (S, D*H) is read, the layer's part of `dstates` is read and overwritten.
    """
    H, D, engine, layout = stack.hidden_size, stack.num_directions, tape.engine, tape.layout
    start = scratch.mark()
    shares = [dx, *[None if dx is None else scratch.empty(*dx.shape) for _ in range(1, D)]]
    tape.spent = True  # from here on it is overwritten
    for group in engine.groups("backward", layout.running, H, layout.steps, D):
        mark = scratch.mark()
        directions = [
            BackwardPass(
                tape.weights[layer][d],
                d == 1,
                tape.traces[layer][d],
                None if doutput is None else doutput[:, d * H : (d + 1) * H],
                tuple([dstate[layer * D + d] for dstate in dstates]),
                dweights[layer][d],
                shares[d],
                tape.packs[layer, d],
                None if flow is None else flow[layer * D + d],
            )
            for d in group
        ]
        segments.backward(engine, directions, layout, tape.segments, scratch)
        scratch.rewind(mark)
    if dx is not None and D == 2:
        dx += shares[1]
    scratch.rewind(start)


def _sorted_states(
    xp: Any,
    stack: StackSpec,
    layout: PackedBatch,
    given: tuple[Array | None, ...] | None,
    dtype: Any,
) -> tuple[Array, ...]:
    """New arrays (L*D, N, H), one a state, with the values given, longest rows first, or zeros."""
    shape = (stack.num_layers * stack.num_directions, layout.batch, stack.hidden_size)
    values = given or (None,) * len(stack.cell.state_names)
    states = tuple([(xp.zeros if v is None else xp.empty)(shape, dtype) for v in values])
    for state, value in zip(states, values, strict=True):
        if value is not None:
            state[...] = layout.sort(value)
    return states


def _to_read(weights: Weights, dtype: np.dtype[Any]) -> Weights:
    """The weights as products read them: the matrices in the compute dtype."""
    return Weights(
        weights.weight_ih.astype(dtype),
        weights.weight_hh.astype(dtype),
        weights.bias_ih,
        weights.bias_hh,
    )


def _drop(
    xp: Any, stack: StackSpec, layout: PackedBatch, x: Array, key: tuple[int, int], layer: int
) -> None:
    """Dropout in place on what `layer` hands up, x (S, D*H); its own gradient."""
    if stack.dropout:
        time, row = layout.time_and_row(xp)
        dropout.apply(xp, x, stack.dropout, (*key, layer), time, row)


def _time_major(x: Array, batch_first: bool) -> Array:
    return x.transpose(1, 0, 2) if batch_first else x


def _packed_input(
    engine: ExecutionPlan,
    layout: PackedBatch,
    x: Array,
    batch_first: bool,
    kept: Workspace,
    record: bool,
) -> Array:
    """x as packed rows (S, I): a copy, where the caller's own memory does not serve.

    Compiled code takes none that is read-only, and a record outlives what stands there now.
    """
    if not (record or engine.backend.on_gpu) and x.flags.carray:
        own = _as_packed(layout, x, batch_first, engine.compute_dtype)
        if own is not None:
            return own
    packed = kept.empty(layout.total, x.shape[2], dtype=engine.compute_dtype)
    layout.pack(_time_major(x, batch_first), packed)
    return packed


def _as_packed(layout: PackedBatch, x: Array, batch_first: bool, dtype: Any) -> Array | None:
    """A new array x (T, N, F) as the packed rows (S, F) that it is, or None."""
    if batch_first or layout.ragged is not None or x.dtype != dtype:
        return None
    return x.reshape(layout.total, x.shape[2])


def _caller_array(xp: Any, layout: PackedBatch, shape: tuple[int, ...], dtype: Any) -> Array:
    """A new array for the caller; where rows end early it is zero past their ends."""
    return xp.empty(shape, dtype) if layout.ragged is None else xp.zeros(shape, dtype)
