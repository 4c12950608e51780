"""The layers and directions of a stack: the order in which they run, and dropout between layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Backend
from ..cells import Cell, Weights
from ..core import dropout
from ..core.packing import PackedBatch
from ..core.passes import (
    Activations,
    BackwardPass,
    Call,
    Extra,
    ForwardPass,
    PackedWeights,
    StackWeights,
)
from ..core.precision import PrecisionPolicy
from ..core.spec import StackSpec
from ..core.workspace import Workspace
from ..kernels import (
    CallContext,
    CallShape,
    ExecutionPlan,
    LayerRunner,
    Unsupported,
    WavefrontRunner,
)
from ..kernels import plan as dispatch
from ..kernels.request import Request
from .by_direction import ByDirection
from .checkpointing import Checkpointed
from .loop import StepLoop
from .replay import ReplayLoop


def plan_call(
    spec: StackSpec,
    backend: Backend,
    precision: PrecisionPolicy,
    shape: CallShape,
    request: Request,
) -> ExecutionPlan:
    """The plan of a call, with gradient checkpointing if `shape` has `recompute`."""
    if spec.reverse_cell is None:
        plan = dispatch(spec, backend, precision, shape, request, _plain_runner)
    else:
        alike = [replace(spec, cell=cell, reverse_cell=None) for cell in spec.cells]
        plan = _of_directions(
            [dispatch(each, backend, precision, shape, request, _plain_runner) for each in alike]
        )
    if not shape.record or shape.recompute is None:
        return plan
    return _checkpointed(plan, plan.backward, shape.recompute)


def _of_directions(plans: Sequence[ExecutionPlan]) -> ExecutionPlan:
    """The plan of a layer whose directions are run as these plans say."""
    plan, groups = plans[0], _one_by_one(plans[0])
    return replace(
        plan,
        forward=ByDirection([each.forward for each in plans]),
        backward=ByDirection([each.backward for each in plans]),
        forward_groups=groups,
        backward_groups=groups,
    )


def with_step_loop(plan: ExecutionPlan, spec: StackSpec) -> ExecutionPlan:
    """A plan whose backward pass is the step loop, which can measure between steps."""
    cells = (plan.cell,) if spec.reverse_cell is None else spec.cells
    loops = [StepLoop(plan.xp, cell, plan.precision.compute_dtype) for cell in cells]
    loop = loops[0] if len(loops) == 1 else ByDirection(loops)
    if isinstance(plan.backward, Checkpointed):
        return _checkpointed(replace(plan, forward=plan.backward.runner), loop, plan.backward.k)
    return replace(plan, backward=loop, backward_groups=_one_by_one(plan))


def _checkpointed(plan: ExecutionPlan, backward: LayerRunner, k: int) -> ExecutionPlan:
    runner, groups = Checkpointed(plan.forward, backward, k), _one_by_one(plan)
    return replace(
        plan, forward=runner, backward=runner, forward_groups=groups, backward_groups=groups
    )


def _one_by_one(plan: ExecutionPlan) -> tuple[range, ...]:
    return tuple([range(d, d + 1) for group in plan.forward_groups for d in group])


def _plain_runner(xp: Any, cell: Cell, dtype: np.dtype[Any], replays: bool) -> LayerRunner:
    return ReplayLoop(cell, dtype) if replays else StepLoop(xp, cell, dtype)


@dataclass
class Tape:
    """What a recorded call saves; `backward` can use it once."""

    plan: ExecutionPlan
    weights: StackWeights  # matrices in the compute dtype
    batch: PackedBatch
    activations: list[list[Activations]]  # by layer and direction
    dropout_key: tuple[int, int]  # (seed, call)
    shape: tuple[int, ...]  # of the caller's x, with a batch dimension
    batch_first: bool
    extra: Extra | None = None  # what all layers share, if the cell reads any
    spent: bool = False  # its backward pass has begun


class _Gradients(NamedTuple):
    """The gradients of all layers that a backward pass writes."""

    dstates: tuple[Array, ...]  # inout: (L*D, N, H) each
    dweights: list[list[Weights]]  # out, where an entry is not None
    norms: Array | None  # out, if given: (L*D, T)


def forward(
    spec: StackSpec,
    weights: StackWeights,
    call: Call,
    context: CallContext,
    dropout_key: tuple[int, int] = (0, 0),
) -> tuple[Array, tuple[Array, ...], Tape]:
    """Run every layer and direction; returns a new output, new final states, and the tape.

    A recorded call applies dropout, and `backward` can use the tape, whose activations are in
    `context.saved`. In other calls `context.saved` may be `context.scratch`.

    :param weights: in; kernels add entries to the packed weights.
    :param call: in: x (T, N, I) or, batch first, (N, T, I), states (L*D, N, H) each, None for
        the cell's initial values.
    :return: (T, N, D*H), laid out as x, and (L*D, N, H) each.
    """
    plan, batch, x = context.plan, context.batch, call.x
    xp, precision = plan.xp, plan.precision
    if plan.is_mixed:
        cast = [[_to_compute(each, precision.compute_dtype) for each in p] for p in weights.arrays]
        weights = StackWeights(cast, weights.packed)
    width = spec.num_directions * spec.output_size
    # past the end of a row the output is zero
    new = xp.empty if batch.ragged is None else xp.zeros
    output = new((*x.shape[:2], width), precision.dtype)
    ends = _sorted_states(xp, spec, batch, call.initial, spec.cell.initial_values, precision.dtype)
    tape = Tape(plan, weights, batch, [], dropout_key, x.shape, call.batch_first)
    rows = _packed_input(context, x, call.batch_first)
    if spec.reads_extra:
        tape.extra = _extra(spec, call, context, dropout_key)
    packed = _as_packed(batch, output, call.batch_first, precision.compute_dtype)
    if not isinstance(plan.wavefront, Unsupported):
        rows, packed = _run_wavefront(plan.wavefront, tape, rows, ends, context), None
    else:
        scratch = context.scratch
        for layer in range(spec.num_layers):
            last, activations = layer + 1 == spec.num_layers, []
            joined = packed
            if joined is None or not last:
                memory = scratch if last else context.saved
                joined = memory.empty(batch.total, width, dtype=precision.compute_dtype)
            for group in plan.forward_groups:
                mark = scratch.mark()
                passes = _forward_passes(spec, tape, (layer, group), rows, ends, joined)
                activations += plan.forward.forward(passes, context)
                scratch.rewind(mark)
            if context.record:
                tape.activations.append(activations)
                if not last:
                    _drop(spec, tape, joined, layer)
            rows = joined
    if packed is None:
        batch.unpack(rows, output.transpose(1, 0, 2) if call.batch_first else output)
    if batch.ragged is not None:
        batch.unsort_in_place(ends)
    return output, ends, tape


def _forward_passes(
    spec: StackSpec,
    tape: Tape,
    which: tuple[int, range],
    x: Array,
    ends: tuple[Array, ...],
    joined: Array,
) -> list[ForwardPass]:
    """The passes over a layer and some of its directions; out: their part of `joined` (S, D*H)."""
    (layer, group), H, D = which, spec.output_size, spec.num_directions
    return [
        ForwardPass(
            tape.weights.arrays[layer][d],
            d == 1,
            x,
            tuple([end[layer * D + d] for end in ends]),
            tape.weights.packed[layer, d],
            joined[:, d * H : (d + 1) * H],
            None if tape.extra is None else _extra_of(tape.extra, layer, d),
        )
        for d in group
    ]


def _run_wavefront(
    wavefront: WavefrontRunner,
    tape: Tape,
    x: Array,
    ends: tuple[Array, ...],
    context: CallContext,
) -> Array:
    """Run all layers in one launch; returns the packed output (S, H) of the last one."""
    passes = [
        ForwardPass(weights, False, x, tuple([end[layer] for end in ends]), PackedWeights())
        for layer, (weights,) in enumerate(tape.weights.arrays)
    ]
    by_layer = wavefront.forward(passes, context)
    tape.activations = [[activations] for activations in by_layer]
    return context.batch.outputs(by_layer[-1].states[0], False)


def backward(
    spec: StackSpec,
    tape: Tape,
    upstream: tuple[Array | None, tuple[Array | None, ...]],
    dweights: list[list[Weights]],
    need_dx: bool,
    scratch: Workspace,
    norms: Array | None = None,
) -> tuple[Array | None, tuple[Array, ...]]:
    """The backward pass of `forward`; returns a new dx, None unless `need_dx`, and new dstates.

    The tape cannot be used again.

    :param upstream: in: doutput, of the output's shape, and the gradients of the final states,
        (L*D, N, H) each; None stands for zeros.
    :param dweights: out: every entry that is not None.
    :param norms: out, if given: (L*D, T).
    """
    (doutput, dfinal), plan = upstream, tape.plan
    if norms is not None:
        plan = with_step_loop(plan, spec)
    batch, xp, dtype = tape.batch, plan.xp, plan.precision.dtype
    context = CallContext(plan, batch, scratch, scratch, True)
    width = spec.num_directions * spec.output_size
    new = xp.empty if batch.ragged is None else xp.zeros
    dx = new(tape.shape, dtype) if need_dx else None
    dstates = _sorted_states(xp, spec, batch, dfinal, (0.0,) * len(dfinal), dtype)
    gradients = _Gradients(dstates, dweights, norms)
    above: Any = None  # the gradient of a layer's output
    if doutput is not None:
        above = scratch.empty(batch.total, width)
        batch.pack(doutput.transpose(1, 0, 2) if tape.batch_first else doutput, above)
    packed: Any = None if dx is None else _as_packed(batch, dx, tape.batch_first, dtype)
    reusable: list[Array] = []
    for layer in range(spec.num_layers - 1, -1, -1):
        below: Any = packed  # the gradient of its input
        if layer:
            below = reusable.pop() if reusable else scratch.empty(batch.total, width)
        elif dx is not None and packed is None:
            below = scratch.empty(batch.total, spec.input_size)
        start = mark = scratch.mark()
        shares = [below]  # of the directions
        if spec.num_directions == 2:
            shares.append(None if below is None else scratch.empty(*below.shape))
            mark = scratch.mark()
        tape.spent = True  # its activations are overwritten from here on
        for group in plan.backward_groups:
            passes = _backward_passes(spec, tape, (layer, group), above, shares, gradients)
            plan.backward.backward(passes, context)
            scratch.rewind(mark)
        if below is not None and spec.num_directions == 2:
            below += shares[1]
            scratch.rewind(start)
        if layer:
            _drop(spec, tape, below, layer - 1)
        if above is not None:
            reusable.append(above)
        above = below
    if dx is not None and packed is None:
        batch.unpack(above, dx.transpose(1, 0, 2) if tape.batch_first else dx)
    if batch.ragged is not None:
        batch.unsort_in_place(gradients.dstates)
    return dx, gradients.dstates


def _backward_passes(
    spec: StackSpec,
    tape: Tape,
    which: tuple[int, range],
    doutput: Array | None,
    shares: list[Array | None],
    gradients: _Gradients,
) -> list[BackwardPass]:
    """The passes over a layer and some of its directions.

    :param doutput: in: (S, D*H), of the layer's output.
    :param shares: out, if given: (S, I), each direction's gradient of the layer's input.
    """
    (layer, group), H, D = which, spec.output_size, spec.num_directions
    norms = gradients.norms
    return [
        BackwardPass(
            tape.weights.arrays[layer][d],
            d == 1,
            tape.activations[layer][d],
            None if doutput is None else doutput[:, d * H : (d + 1) * H],
            tuple([dstate[layer * D + d] for dstate in gradients.dstates]),
            gradients.dweights[layer][d],
            shares[d],
            tape.weights.packed[layer, d],
            None if norms is None else norms[layer * D + d],
            None if tape.extra is None else _extra_of(tape.extra, layer, d),
        )
        for d in group
    ]


def _sorted_states(
    xp: Any,
    spec: StackSpec,
    batch: PackedBatch,
    values: tuple[Array | None, ...] | None,
    begin: tuple[float, ...],
    dtype: np.dtype[Any],
) -> tuple[Array, ...]:
    """New arrays (L*D, N, H), one per state: `values`, longest rows first, or `begin`."""
    layers, rows, states = spec.num_layers * spec.num_directions, batch.batch, []
    for k, size in enumerate(spec.state_sizes):
        shape, value = (layers, rows, size), values[k] if values else None
        if value is not None:
            state = xp.empty(shape, dtype)
            state[...] = batch.sort(value)
        elif begin[k]:
            state = xp.full(shape, begin[k], dtype)
        else:
            state = xp.zeros(shape, dtype)
        states.append(state)
    return tuple(states)


def _to_compute(weights: Weights, dtype: np.dtype[Any]) -> Weights:
    """The weights with their matrices in the compute dtype."""
    return type(weights)(
        *[w.astype(dtype) if w is not None and w.ndim == 2 else w for w in weights]
    )


def _extra(spec: StackSpec, call: Call, context: CallContext, key: tuple[int, int]) -> Extra:
    """The extra inputs of a call as packed rows, and the keys of its masks."""
    cell, batch = spec.cell, context.batch
    inputs = tuple([context.saved.empty(batch.total, 1) for _ in call.inputs])
    for packed, each in zip(inputs, call.inputs, strict=True):
        batch.pack(each.transpose(1, 0, 2) if call.batch_first else each, packed)
    if not (cell.masks and context.record):
        return Extra(inputs)
    seed, number = key
    sequence = number if call.sequence is None else call.sequence
    time, row = batch.time_and_row(context.plan.xp)
    return Extra(inputs, key, (seed, sequence), time, row)


def _extra_of(extra: Extra, layer: int, direction: int) -> Extra:
    """That of one direction, which has masks of its own."""
    if not extra.step_key:
        return extra
    which = layer, direction
    return extra._replace(
        step_key=(*extra.step_key, *which), sequence_key=(*extra.sequence_key, *which)
    )


def _drop(spec: StackSpec, tape: Tape, x: Array, layer: int) -> None:
    """Apply dropout in place to the output of `layer`, x (S, D*H), or to its gradient."""
    if spec.dropout:
        xp = tape.plan.xp
        time, row = tape.batch.time_and_row(xp)
        dropout.apply(xp, x, spec.dropout, (*tape.dropout_key, layer), time, row)


def _packed_input(context: CallContext, x: Array, batch_first: bool) -> Array:
    """x as packed rows (S, I); a copy unless the caller's memory can be used.

    Compiled code does not accept read-only arrays, and a recorded call must not change with the
    caller's array.
    """
    batch, plan = context.batch, context.plan
    if not (context.record or plan.backend.on_gpu) and x.flags.carray:
        view = _as_packed(batch, x, batch_first, plan.precision.compute_dtype)
        if view is not None:
            return view
    packed = context.saved.empty(batch.total, x.shape[2], dtype=plan.precision.compute_dtype)
    batch.pack(x.transpose(1, 0, 2) if batch_first else x, packed)
    return packed


def _as_packed(batch: PackedBatch, x: Array, batch_first: bool, dtype: Any) -> Array | None:
    """A view of x (T, N, F) as packed rows (S, F); None if its layout or dtype differs."""
    if batch_first or batch.ragged is not None or x.dtype != dtype:
        return None
    return x.reshape(batch.total, x.shape[2])
