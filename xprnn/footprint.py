"""How much memory a training step of a layer takes, before it takes it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from . import dropout
from .kernels import ExecutionPlan
from .network import StackSpec
from .sequence import trace_shapes


class Footprint(NamedTuple):
    """Bytes at the peak, which is the end of `backward`, of a call whose rows all run T steps."""

    kept: int  # from the call to `backward`
    work: int  # of the module's own beside that
    results: int  # output and final states, dx and the gradients of the initial states

    def __str__(self) -> str:
        """The bytes and what they are."""
        return (
            f"{sum(self):,} bytes: {self.kept:,} kept for backward, {self.work:,} to work in, "
            f"{self.results:,} of results and gradients"
        )


def training_step(
    net: StackSpec, engine: ExecutionPlan, steps: int, batch: int, batch_first: bool, k: int | None
) -> Footprint:
    """The footprint of a layer with `recompute=k`, of one that has made a step like it before."""
    S, D, width = steps * batch, net.num_directions, net.num_directions * net.hidden_size
    A, T = engine.dtype.itemsize, engine.compute_dtype.itemsize
    all_states = net.num_layers * D * batch * net.hidden_size * len(net.cell.state_names) * A

    kept = S * (net.input_size + (net.num_layers - 1) * width) * T
    work = _beside_steps(net, engine, batch, k is not None)
    if k is None:
        kept += net.num_layers * D * _trace(net, engine, steps, batch)
    else:
        kept += -(-steps // k) * all_states
        work += _trace(net, engine, min(k, steps), batch)
    inner = (D - 1) * width if net.num_layers > 1 else 0  # the second direction's dx
    work += S * max(inner, (D - 1 + batch_first) * net.input_size) * A
    work += S * min(net.num_layers, 2) * width * A  # doutput, and that of the layer below
    if net.dropout and net.num_layers > 1:
        work += dropout.workspace_bytes(S, width)
    return Footprint(kept, work, S * (width + net.input_size) * A + 2 * all_states)


def _trace(net: StackSpec, engine: ExecutionPlan, steps: int, batch: int) -> int:
    """What so many recorded steps of a direction leave behind."""
    narrow, wide = trace_shapes(net.cell, net.hidden_size, batch, steps * batch, record=True)
    read = sum(prod(shape) for shape in narrow) * engine.compute_dtype.itemsize
    return read + sum(prod(shape) for shape in wide) * engine.dtype.itemsize


def _beside_steps(net: StackSpec, engine: ExecutionPlan, batch: int, segments: bool) -> int:
    """What does not grow with T, roughly: a step's own arrays, packed weights, their gradients.

    The gradients are summed up apart from those that are there, and a segment's apart from these.
    """
    cell, H = net.cell, net.hidden_size
    weights = sum(prod(shape) for shape in net.shapes().values())
    largest = cell.gates * H * (net.widest_input + H)
    step = 2 * cell.gates + cell.saved + 3 * len(cell.state_names)
    step += max(sum(cell.forward_scratch), sum(cell.backward_scratch))
    packed = ahead = 0
    if engine.sequences is not None and engine.sequences.packs:
        packed = sum(prod(s) * (1 + ("weight" in n)) for n, s in net.shapes().items())
        packed += engine.sequences.room
    if segments and engine.sequences is not None:  # for a segment's forward pass
        ahead = engine.sequences.ahead * (net.widest_input + cell.gates * H)
    elements = weights + packed + segments * largest + batch * H * step + ahead
    return elements * engine.dtype.itemsize
