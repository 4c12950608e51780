"""From a call's arguments as people write them to what `stack.py` takes, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, Backend
from .cells import CELLS, Cell, Weights
from .checks import (
    check_array,
    check_choice,
    check_flag,
    check_leader,
    check_lengths,
    check_states,
)
from .network import Stack

# of a constructor: where, in what, how
PLACE = ("backend", "dtype", "precision", "compute_dtype", "recompute")


class Call(NamedTuple):
    """Checked arguments of a forward call, with a batch."""

    x: Array  # (T, N, I) or, batch first, (N, T, I)
    initial: tuple[Array | None, ...] | None  # (L*D, N, H) each; None: zeros
    lengths: np.ndarray | None  # (N,)
    batch_first: bool
    batched: bool  # whether the caller's arrays had a batch


def check_call(
    stack: Stack,
    backend: Backend,
    dtype: np.dtype[Any],
    x: Any,
    hx: Any,
    lengths: Any,
    batch_first: bool,
) -> Call:
    """Check the arguments of a layer's call; TypeError or ValueError names the one at fault."""
    batched = getattr(x, "ndim", 3) != 2
    outer = (("N", "T") if batch_first else ("T", "N")) if batched else ("T",)
    x = check_array("x", x, backend, dtype, (*outer, stack.input_size))
    if not batched:
        batch_first, x = False, x[:, None]
    steps, batch = x.shape[1::-1] if batch_first else x.shape[:2]
    names = tuple([f"{name}0" for name in stack.cell.state_names])
    shape = state_shape(stack, batch, batched)
    initial = check_states(names, hx, backend, dtype, shape)
    if initial is not None and not batched:
        initial = tuple([None if state is None else state[:, None] for state in initial])
    return Call(x, initial, check_lengths(lengths, steps, batch), batch_first, batched)


def check_upstream(
    stack: Stack,
    backend: Backend,
    dtype: np.dtype[Any],
    x_shape: tuple[int, ...],
    batch: int,
    batched: bool,
    doutput: Any,
    dhx: Any,
) -> tuple[Array | None, tuple[Array | None, ...]]:
    """Check the gradients given to a layer's `backward`; returns them with a batch."""
    if doutput is not None:
        outer = x_shape[:2] if batched else x_shape[:1]
        width = stack.num_directions * stack.hidden_size
        doutput = check_array("doutput", doutput, backend, dtype, (*outer, width))
    names = tuple([f"d{name}_n" for name in stack.cell.state_names])
    shape = state_shape(stack, batch, batched)
    dfinal = check_states(names, dhx, backend, dtype, shape)
    if dfinal is None:
        dfinal = (None,) * len(names)
    if not batched:
        doutput = None if doutput is None else doutput[:, None]
        dfinal = tuple([None if dstate is None else dstate[:, None] for dstate in dfinal])
    return doutput, dfinal


def state_shape(stack: Stack, batch: int, batched: bool = True) -> tuple[int, ...]:
    """The shape of h0 and h_n: (L*D, N, H), unbatched (L*D, H)."""
    outer = stack.num_layers * stack.num_directions
    return (outer, batch, stack.hidden_size) if batched else (outer, stack.hidden_size)


def unwrap(array: Array | None, states: tuple[Array, ...], batched: bool) -> tuple[Any, Any]:
    """An array (T, N, F) and states (L*D, N, H) as the caller wants them."""
    if not batched:
        array = None if array is None else array[:, 0]
        states = tuple([state[:, 0] for state in states])
    return array, states if len(states) > 1 else states[0]


def split(
    constructor: Callable[..., Any], /, **arguments: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a module's constructor, defaults filled in: its options and its place.

    :raises TypeError: one is missing, or is none of the constructor's.
    """
    bound = inspect.signature(constructor).bind(**arguments)
    bound.apply_defaults()
    options = bound.arguments
    return options, {name: options.pop(name) for name in PLACE if name in options}


def check_weights(cell: Cell, weights: Weights) -> tuple[Backend, Stack, Weights]:
    """The backend that weights stand on, the one-layer stack that they make, and the weights."""
    backend, weight_ih = check_leader("weight_ih", weights.weight_ih, ("G*H", "I"))
    rows, width = weight_ih.shape
    if rows == 0 or rows % cell.gates:
        raise ValueError(f"weight_ih: expected {cell.gates}*H rows, got {rows}")
    net = Stack(cell, width, rows // cell.gates, bias=weights.bias_ih is not None)
    shapes: dict[str, tuple[int, ...]] = {"weight_hh": (rows, net.hidden_size)}
    if weights.bias_ih is not None or weights.bias_hh is not None:
        shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
    found = {
        name: check_array(name, getattr(weights, name), backend, weight_ih.dtype, shape)
        for name, shape in shapes.items()
    }
    return backend, net, weights._replace(weight_ih=weight_ih, **found)


def elman(options: Mapping[str, Any]) -> Cell:
    """The Elman cell that `nonlinearity` names."""
    kind = check_choice("nonlinearity", options["nonlinearity"], ("tanh", "relu"))
    return CELLS[f"rnn_{kind}"]


def gru(options: Mapping[str, Any]) -> Cell:
    """The GRU cell that `reset_after` chooses."""
    return CELLS["gru" if check_flag("reset_after", options["reset_after"]) else "gru_reset_before"]


def lstm(options: Mapping[str, Any]) -> Cell:
    """The LSTM cell."""
    return CELLS["lstm"]
