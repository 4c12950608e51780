"""Functions shared by layer runners: allocation, products over all steps, and results."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..backend import Array
from ..cells import Cell, Weights
from ..core.packing import PackedBatch
from ..core.passes import Activations, BackwardPass, ForwardPass
from ..core.sums import sum_rows
from .interface import CallContext


def allocate(
    cell: Cell,
    dtype: Any,
    direction: ForwardPass,
    call: CallContext,
    with_gates: bool = True,
) -> Activations:
    """The activations of a direction, uninitialised except x; without gates, those are empty."""
    batch, memory, x = call.batch, call.saved, direction.x
    width = direction.weights.weight_ih.shape[0]
    shapes, others = activation_shapes(cell, width, batch.running, batch.total, call.record)
    gates = saved = x[:0]
    if with_gates:
        h, gates, saved = memory.arrays(*shapes, dtype=dtype)
    else:
        (h,) = memory.arrays(shapes[0], dtype=dtype)
    states = (h, *memory.arrays(*others)) if others else (h,)
    return Activations(x, gates, saved, states)


Shapes = tuple[tuple[int, int], ...]


@lru_cache(256)
def activation_shapes(
    cell: Cell, width: int, running: int, total: int, record: bool
) -> tuple[Shapes, Shapes]:
    """The shapes of h, gates (of this width) and saved, and of the other states."""
    H = width // cell.gates
    saved = total if record else running, cell.saved_size(H)
    h, *others = [(running + total, size) for size in cell.state_sizes(H)]
    return (h, (total, width), saved), tuple(others)


def input_projection(products: Any, cell: Cell, direction: ForwardPass, gates: Array) -> None:
    """Write gx of all steps to `gates` (S, G*H), by one product of `products.matmul`."""
    bias = cell.input_bias(direction.weights, gates.dtype)
    project(products, direction.weights, bias, direction.x, gates)


def project(xp: Any, weights: Weights, bias: Array | None, x: Array, gates: Array) -> None:
    """Write gx to `gates`; in: x (S, I), `bias` (G*H,); out: `gates` (S, G*H)."""
    xp.matmul(x, weights.weight_ih.T, out=gates)
    if bias is not None:
        gates += bias


def write_results(direction: ForwardPass, activations: Activations, batch: PackedBatch) -> None:
    """Write the final states and the output of a direction."""
    for k, end in enumerate(direction.ends):  # `zip` takes longer
        end[: batch.running] = batch.final(activations.states[k], direction.reverse)
    if direction.output is not None:
        direction.output[...] = batch.outputs(activations.states[0], direction.reverse)


def weight_gradients(
    xp: Any, products: Any, cell: Cell, direction: BackwardPass, batch: PackedBatch
) -> None:
    """Compute dweights, each by one product over all steps, and dx; inout: gates, dgh -> dgx."""
    activations, dweights = direction.activations, direction.dweights
    dgates, states, reverse = activations.gates, activations.states, direction.reverse

    def read(k: int) -> Array:
        return batch.previous(states[k], reverse)

    def written(k: int) -> Array:
        return batch.outputs(states[k], reverse)

    cell.step_gradients(xp, products, (read, written), dgates, activations.saved, dweights)
    cell.to_input_side(dgates, activations.saved)
    if dweights.weight_ih is not None:
        products.matmul(dgates.T, activations.x, out=dweights.weight_ih)
    if dweights.bias_ih is not None:
        sum_rows(xp, dgates, dweights.bias_ih)
    if direction.dx is not None:
        products.matmul(dgates, direction.weights.weight_ih, out=direction.dx)
