"""The arguments of a call: from users' forms to those of `engine/stack.py`, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from ..backend import Array, Backend
from ..cells import CELLS, Cell, Weights
from ..core.checks import (
    check_array,
    check_choice,
    check_flag,
    check_lengths,
    check_reference_array,
    check_states,
)
from ..core.packing import PackedBatch
from ..core.passes import Call
from ..core.spec import StackSpec

# Arguments of a constructor that files do not hold
EXECUTION_OPTIONS = ("backend", "dtype", "precision", "compute_dtype", "recompute")


class Taped(Protocol):
    """The attributes of a tape against which upstream gradients are checked."""

    shape: tuple[int, ...]
    batch: PackedBatch


def check_call(
    spec: StackSpec,
    backend: Backend,
    dtype: np.dtype[Any],
    x: Any,
    hx: Any,
    lengths: Any,
    batch_first: bool,
) -> Call:
    """Check the arguments of a layer's call; TypeError or ValueError names the invalid one."""
    batched = getattr(x, "ndim", 3) != 2
    axes = (("N", "T") if batch_first else ("T", "N")) if batched else ("T",)
    x = check_array("x", x, backend, dtype, (*axes, spec.input_size))
    if not batched:
        batch_first, x = False, x[:, None]
    steps, batch = x.shape[1::-1] if batch_first else x.shape[:2]
    initial = None
    if hx is not None:
        names = tuple([f"{name}0" for name in spec.cell.state_names])
        outer = state_outer(spec, batch, batched)
        initial = check_states(names, hx, backend, dtype, outer, spec.state_sizes)
        if initial is not None and not batched:
            initial = tuple([None if state is None else state[:, None] for state in initial])
    if lengths is not None:
        lengths = check_lengths(lengths, steps, batch)
    return Call(x, initial, lengths, batch_first, batched, (steps, batch))


def check_inputs(
    spec: StackSpec,
    backend: Backend,
    dtype: np.dtype[Any],
    outer: tuple[int, ...],
    inputs: Mapping[str, Any],
    batched: bool = True,
) -> tuple[Array, ...]:
    """The cell's extra inputs, (*outer, 1) each; a caller's may have no last dimension.

    :param outer: the dimensions of x but the last, the batch's too where the caller's has none.
    """
    names = spec.cell.extra_inputs
    if unknown := [name for name in inputs if name not in names]:
        raise TypeError(f"{unknown[0]}: the cell has no such input; expected {', '.join(names)}")
    if missing := [name for name in names if name not in inputs]:
        raise TypeError(f"{missing[0]}: expected an array {outer}, an input of the cell; got none")
    shape = outer if batched else outer[:-1]
    checked = []
    for name in names:
        value = inputs[name]
        full = shape if getattr(value, "ndim", 0) == len(shape) else (*shape, 1)
        checked.append(check_array(name, value, backend, dtype, full).reshape(*outer, 1))
    return tuple(checked)


def check_upstream(
    spec: StackSpec,
    backend: Backend,
    dtype: np.dtype[Any],
    tape: Taped,
    batched: bool,
    doutput: Any,
    dhx: Any,
) -> tuple[Array | None, tuple[Array | None, ...]]:
    """Check the arguments of a layer's `backward`; returns them with a batch dimension."""
    gradient: Array | None = None
    if doutput is not None:
        outer = tape.shape[:2] if batched else tape.shape[:1]
        width = spec.num_directions * spec.output_size
        gradient = check_array("doutput", doutput, backend, dtype, (*outer, width))
        if not batched:
            gradient = gradient[:, None]
    if dhx is None:
        return gradient, (None,) * len(spec.cell.state_names)
    names = tuple([f"d{name}_n" for name in spec.cell.state_names])
    outer = state_outer(spec, tape.batch.batch, batched)
    dfinal = check_states(names, dhx, backend, dtype, outer, spec.state_sizes) or ()
    if not batched:
        dfinal = tuple([None if dstate is None else dstate[:, None] for dstate in dfinal])
    return gradient, dfinal


def state_outer(spec: StackSpec, batch: int, batched: bool = True) -> tuple[int, ...]:
    """The shape of h0 and h_n without H: (L*D, N), unbatched (L*D,)."""
    layers = spec.num_layers * spec.num_directions
    return (layers, batch) if batched else (layers,)


def unwrap(array: Array | None, states: tuple[Array, ...], batched: bool) -> tuple[Any, Any]:
    """An array (T, N, F) and states (L*D, N, H) in the form of the caller's arguments."""
    if not batched:
        array = None if array is None else array[:, 0]
        states = tuple([state[:, 0] for state in states])
    return array, states if len(states) > 1 else states[0]


def split(
    constructor: Callable[..., Any], /, **arguments: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a module's constructor with defaults: its options and execution options.

    :raises TypeError: one is missing or unexpected.
    """
    signature = inspect.signature(constructor)
    bound = signature.bind(**arguments)
    bound.apply_defaults()
    options = bound.arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            options |= options.pop(name)
    return options, {name: options.pop(name) for name in EXECUTION_OPTIONS if name in options}


def check_weights(cell: Cell, weights: Weights) -> tuple[Backend, StackSpec, Weights]:
    """The backend of weights, the one-layer stack they define, and the weights to use."""
    backend, weight_ih = check_reference_array("weight_ih", weights.weight_ih, ("G*H", "I"))
    rows, width = weight_ih.shape
    if rows == 0 or rows % cell.gates:
        raise ValueError(f"weight_ih: expected {cell.gates}*H rows, got {rows}")
    spec = StackSpec(cell, width, rows // cell.gates, bias=weights.bias_ih is not None)
    shapes: dict[str, tuple[int, ...]] = {"weight_hh": (rows, spec.hidden_size)}
    if weights.bias_ih is not None or weights.bias_hh is not None:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    checked = {
        name: check_array(name, getattr(weights, name), backend, weight_ih.dtype, shape)
        for name, shape in shapes.items()
    }
    return backend, spec, weights._replace(weight_ih=weight_ih, **checked)


def elman(options: Mapping[str, Any]) -> Cell:
    """The Elman cell with the given `nonlinearity`."""
    kind = check_choice("nonlinearity", options["nonlinearity"], ("tanh", "relu"))
    return CELLS[f"rnn_{kind}"]


def gru(options: Mapping[str, Any]) -> Cell:
    """The GRU cell selected by `reset_after`."""
    return CELLS["gru" if check_flag("reset_after", options["reset_after"]) else "gru_reset_before"]


def lstm(options: Mapping[str, Any]) -> Cell:
    """The LSTM cell."""
    return CELLS["lstm"]
