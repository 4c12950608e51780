"""Gradient checkpointing: states saved every k steps, everything else recomputed by `backward`.

A checkpointed direction saves the states before every k-th step. Its backward pass processes the
segments between them, the last one first: it runs a segment forward again, saving activations, and
then backward. This costs one more forward pass, and takes the memory of k steps instead of T.

T. Chen et al., "Training deep nets with sublinear memory cost" (2016).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..backend import Backend
from ..core.packing import PackedBatch, make_packed_batch
from ..core.passes import Activations, BackwardPass, Extra, ForwardPass
from ..kernels.interface import CallContext, LayerRunner, Pass, RunnerCosts, Sizes


class Segment(NamedTuple):
    """Consecutive steps of a call, packed as a batch of their own."""

    batch: PackedBatch
    times: slice  # of the call's T steps
    rows: slice  # of its S packed rows
    begin: slice  # where the states before the segment's first step are saved


def cut(backend: Backend, batch: PackedBatch, k: int) -> tuple[Segment, ...]:
    """Segments of k steps, the last one of the remaining steps."""
    lengths = None
    if batch.ragged is not None:  # longest first
        lengths = np.searchsorted(-np.array(batch.counts), -np.arange(batch.batch))
    result: list[Segment] = []
    begin = 0
    for start in range(0, max(batch.steps, 1), k):
        stop = min(start + k, batch.steps)
        remaining = None if lengths is None else np.clip(lengths - start, 0, stop - start)
        part = make_packed_batch(backend, stop - start, batch.batch, remaining)
        rows = slice(batch.starts[start], batch.starts[stop])
        saved = slice(begin, begin + part.running)
        result.append(Segment(part, slice(start, stop), rows, saved))
        begin = saved.stop
    return tuple(result)


class Checkpointed:
    """A runner whose recorded calls save the states every k steps.

    :param runner: runs the forward passes.
    :param backward_runner: runs the backward pass of a segment.
    """

    def __init__(self, runner: LayerRunner, backward_runner: LayerRunner, k: int) -> None:
        self.runner: LayerRunner = runner
        self.backward_runner: LayerRunner = backward_runner
        self.k: int = k
        self.costs: RunnerCosts = runner.costs

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Each direction separately."""
        return [range(d, d + 1) for d in range(directions)]

    def segments(self, call: CallContext) -> tuple[Segment, ...]:
        """The segments of a call; those of a ragged batch are cached until its backward pass."""
        batch, backend = call.batch, call.plan.backend
        if batch.ragged is None:
            return cut(backend, batch, self.k)
        if self.k not in batch.splits:
            batch.splits[self.k] = cut(backend, batch, self.k)
        segments: tuple[Segment, ...] = batch.splits[self.k]
        return segments

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; saves x and the states before each segment."""
        segments = self.segments(call)
        return [self._forward(direction, segments, call) for direction in passes]

    def _forward(
        self, direction: ForwardPass, segments: Sequence[Segment], call: CallContext
    ) -> Activations:
        assert direction.output is not None
        scratch, empty = call.scratch, call.saved.empty(0, 0)
        rows_saved = segments[-1].begin.stop
        states = tuple([call.saved.empty(rows_saved, end.shape[1]) for end in direction.ends])
        for batch, _, rows, begin in _walk(segments, direction.reverse):
            mark = scratch.mark()
            for state, end in zip(states, direction.ends, strict=True):
                state[begin] = end[: batch.running]
            part = direction._replace(
                x=direction.x[rows], output=direction.output[rows], extra=_part(direction, rows)
            )
            self.runner.forward([part], CallContext(call.plan, batch, scratch, scratch, False))
            scratch.rewind(mark)
        return Activations(direction.x, empty, empty, states)

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""
        segments = self.segments(call)
        for direction in passes:
            self._backward(direction, segments, call)

    def _backward(
        self, direction: BackwardPass, segments: Sequence[Segment], call: CallContext
    ) -> None:
        """Run each segment forward again and then backward; the last segment comes first."""
        activations, dweights, scratch = direction.activations, direction.dweights, call.scratch
        new = [None if w is None else scratch.empty(*w.shape) for w in dweights]
        share = type(dweights)(*new)
        written = dweights  # of the first segment; those of the others are added to it
        for batch, times, rows, begin in _walk(segments, not direction.reverse):
            mark = scratch.mark()
            context = CallContext(call.plan, batch, scratch, scratch, True)
            ends = tuple([state[begin] for state in activations.states])  # overwritten
            extra = _part(direction, rows)
            forward_pass = ForwardPass(
                direction.weights,
                direction.reverse,
                activations.x[rows],
                ends,
                direction.packed,
                extra=extra,
            )
            (recomputed,) = self.runner.forward([forward_pass], context)
            part = direction._replace(
                activations=recomputed,
                doutput=None if direction.doutput is None else direction.doutput[rows],
                dweights=written,
                dx=None if direction.dx is None else direction.dx[rows],
                norms=None if direction.norms is None else direction.norms[times],
                extra=extra,
            )
            self.backward_runner.backward([part], context)
            if written is share:
                for total, each in zip(dweights, share, strict=True):
                    if total is not None:
                        total += each
            written = share
            scratch.rewind(mark)


def _part(direction: ForwardPass | BackwardPass, rows: slice) -> Extra | None:
    return None if direction.extra is None else direction.extra.part(rows)


def _walk(segments: Sequence[Segment], reverse: bool) -> Iterator[Segment]:
    """The segments in order of time, or in reverse."""
    return reversed(segments) if reverse else iter(segments)
