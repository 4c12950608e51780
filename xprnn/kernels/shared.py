"""Functions shared by layer runners: allocation, products over all steps, and results."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..backend import Array
from ..cells import Cell, Weights
from ..core import dropout
from ..core.cell import GradientTerm
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
    """Compute dweights, each by products over all steps, and dx; inout: gates, dgh -> dgx."""
    activations, dweights = direction.activations, direction.dweights
    dgates = activations.gates
    for term in gradient_terms(cell, direction, batch):
        _add_up(xp, products, term)
    cell.to_input_side(dgates, activations.saved)
    _add_up(
        xp,
        products,
        GradientTerm(dgates, activations.x, dweights.weight_ih, dweights.bias_ih),
    )
    if direction.dx is not None:
        products.matmul(dgates, direction.weights.weight_ih, out=direction.dx)


def gradient_terms(cell: Cell, direction: BackwardPass, batch: PackedBatch) -> list[GradientTerm]:
    """The terms of the gradients of the parameters that steps read; see `Cell`."""
    activations, reverse = direction.activations, direction.reverse
    states = activations.states

    def read(k: int) -> Array:
        return batch.previous(states[k], reverse)

    def written(k: int) -> Array:
        return batch.outputs(states[k], reverse)

    buffers = activations.gates, activations.saved
    return cell.gradient_terms((read, written), *buffers, direction.dweights)


def _add_up(xp: Any, products: Any, term: GradientTerm) -> None:
    """Compute the gradients of a term, by a product and a sum over all steps."""
    d, inputs, dweight, dbias = term
    if d is None:
        for target in (dweight, dbias):
            if target is not None:
                target[...] = 0.0
        return
    if dweight is not None:
        if inputs is not None and inputs.dtype != d.dtype:
            inputs = inputs.astype(d.dtype)
        products.matmul(d.T, inputs, out=dweight)
    if dbias is not None:
        sum_rows(xp, d, dbias)


def extra_arrays(
    xp: Any,
    cell: Cell,
    direction: ForwardPass | BackwardPass,
    keep: Callable[..., Array] | None = None,
) -> tuple[Array, ...]:
    """The extra inputs of all steps, (S, 1) each, and in training the masks, (S, H) each.

    :param keep: draws a mask; None: `dropout.keep`.
    """
    extra, weight_ih = direction.extra, direction.weights.weight_ih
    if extra is None:
        return ()
    if not extra.step_key:
        return extra.inputs
    H, low = len(weight_ih) // cell.gates, weight_ih.dtype.itemsize == 2
    dtype = xp.dtype("float32") if low else weight_ih.dtype
    masks, keep = [], keep or dropout.keep
    for k, mask in enumerate(cell.masks):
        key, time = extra.step_key, extra.time
        if mask.per_sequence:
            key, time = extra.sequence_key, time * 0
        masks.append(keep(xp, mask.rate, (*key, k), (time, extra.row), H, dtype))
    return (*extra.inputs, *masks)
