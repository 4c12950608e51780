"""Directions of a layer over all steps of a call: at once, or in segments to be recomputed.

Taken at once, a recorded direction keeps what every step computed. In segments of k steps it keeps
the states in which each segment begins; `backward` takes the segments again, last one first, each
recorded this time, and undoes it. That is one forward pass more for the memory of k steps
instead of T.

T. Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from . import sequence
from .backend import Array, Backend
from .cells import Weights
from .directions import Activations, BackwardPass, ForwardPass
from .kernels import ExecutionPlan
from .layout import PackedBatch, make_packed_batch
from .scratch import Workspace


class Segment(NamedTuple):
    """Consecutive steps of a call, with a layout of their own."""

    layout: PackedBatch
    times: slice  # of the call's T steps
    rows: slice  # of its S packed rows
    begin: slice  # where a trace keeps the states in which the layout's running rows begin


def cut(
    backend: Backend, layout: PackedBatch, lengths: np.ndarray | None, k: int | None
) -> tuple[Segment, ...]:
    """Segments of k steps, the last of what is left; none if k is None.

    `lengths` (N,) intp are those that `layout` was made of.
    """
    if k is None:
        return ()
    ordered = None if lengths is None else np.sort(lengths)[::-1]
    segments: list[Segment] = []
    begin = 0
    for start in range(0, max(layout.steps, 1), k):
        stop = min(start + k, layout.steps)
        left = None if ordered is None else np.clip(ordered - start, 0, stop - start)
        part = make_packed_batch(backend, stop - start, layout.batch, left)
        rows = slice(layout.starts[start], layout.starts[stop])
        kept = slice(begin, begin + part.running)
        segments.append(Segment(part, slice(start, stop), rows, kept))
        begin = kept.stop
    return tuple(segments)


def forward(
    engine: ExecutionPlan,
    directions: Sequence[ForwardPass],
    x: Array,
    layout: PackedBatch,
    segments: Sequence[Segment],
    kept: Workspace,
    scratch: Workspace,
    record: bool,
    outputs: Sequence[Array],
) -> list[Activations]:
    """Run directions of one layer; see `sequence.forward`, which without `segments` it is.

    `outputs` (S, H), whose rows may stand apart, are written. Where there are segments the traces
    are what `backward` needs to take them again: x, and states (Σ n_0 over segments, H).
    """
    if segments:
        pairs = zip(directions, outputs, strict=True)
        return [_forward(engine, each, x, segments, kept, scratch, out) for each, out in pairs]
    traces = sequence.forward(engine, directions, x, layout, kept, scratch, record)
    for direction, trace, output in zip(directions, traces, outputs, strict=True):
        output[...] = layout.outputs(trace.states[0], direction.reverse)
    return traces


def _forward(
    engine: ExecutionPlan,
    direction: ForwardPass,
    x: Array,
    segments: Sequence[Segment],
    kept: Workspace,
    scratch: Workspace,
    output: Array,
) -> Activations:
    """A direction's segments one after the other; what their steps compute is not kept."""
    H, none = output.shape[1], kept.empty(0, 0)
    states = tuple([kept.empty(segments[-1].begin.stop, H) for _ in direction.ends])
    for layout, _, rows, begin in _walk(segments, direction.reverse):
        mark = scratch.mark()
        for state, end in zip(states, direction.ends, strict=True):
            state[begin] = end[: layout.running]
        (run,) = sequence.forward(engine, [direction], x[rows], layout, scratch, scratch, False)
        output[rows] = layout.outputs(run.states[0], direction.reverse)
        scratch.rewind(mark)
    return Activations(x, none, none, states)


def backward(
    engine: ExecutionPlan,
    directions: Sequence[BackwardPass],
    layout: PackedBatch,
    segments: Sequence[Segment],
    scratch: Workspace,
) -> None:
    """Undo directions of one layer; see `sequence.backward`, which without `segments` it is."""
    if not segments:
        sequence.backward(engine, directions, layout, scratch)
    for undoing in directions if segments else ():
        _backward(engine, undoing, segments, scratch)


def _backward(
    engine: ExecutionPlan, undoing: BackwardPass, segments: Sequence[Segment], scratch: Workspace
) -> None:
    """Take each segment of a direction again and undo it; the first to be undone comes last."""
    trace, dweights = undoing.trace, undoing.dweights
    share = Weights(*[None if w is None else scratch.empty(*w.shape) for w in dweights])
    written = dweights  # by the first; those of the others are added
    for layout, times, rows, begin in _walk(segments, not undoing.reverse):
        mark = scratch.mark()
        ends = tuple([state[begin] for state in trace.states])  # overwritten: used for once
        again = ForwardPass(undoing.weights, undoing.reverse, ends, undoing.packs)
        (run,) = sequence.forward(engine, [again], trace.x[rows], layout, scratch, scratch, True)
        part = undoing._replace(
            trace=run,
            doutput=None if undoing.doutput is None else undoing.doutput[rows],
            dweights=written,
            dx=None if undoing.dx is None else undoing.dx[rows],
            flow=None if undoing.flow is None else undoing.flow[times],
        )
        sequence.backward(engine, [part], layout, scratch)
        if written is share:
            for total, each in zip(dweights, share, strict=True):
                if total is not None:
                    total += each
        written = share
        scratch.rewind(mark)


def _walk(segments: Sequence[Segment], reverse: bool) -> Iterator[Segment]:
    """The segments in the order of time, or against it."""
    return reversed(segments) if reverse else iter(segments)
