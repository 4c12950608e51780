"""Layers times directions: which sequences run, in what order, and the dropout between layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dropout, segments
from .backend import Array
from .cells import Cell, Weights
from .directions import Direction, Trace, Undoing
from .kernels import Engine
from .layout import Layout, make_layout
from .scratch import Workspace
from .segments import Segment


@dataclass(frozen=True)
class Stack:
    """What a recurrent network is, apart from its numbers."""

    cell: Cell
    input_size: int  # I
    hidden_size: int  # H
    num_layers: int = 1  # L
    num_directions: int = 1  # D
    bias: bool = True
    dropout: float = 0.0
    layer_suffixes: bool = True  # names end in _l0, _l0_reverse, _l1, ...; a cell's do not

    @property
    def widest_input(self) -> int:
        """I of the layer in which it is largest."""
        above = self.num_directions * self.hidden_size if self.num_layers > 1 else 0
        return max(self.input_size, above)

    def weights(self, arrays: Mapping[str, Array]) -> list[list[Weights]]:
        """Named arrays as `Weights` by layer and direction; an absent name gives None."""
        return [
            [
                Weights(
                    *[arrays.get(f"{kind}{self._suffix(layer, d)}") for kind in Weights._fields]
                )
                for d in range(self.num_directions)
            ]
            for layer in range(self.num_layers)
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, torch's, in torch's order."""
        gates, H = self.cell.gates * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            width = self.num_directions * H if layer else self.input_size
            for d in range(self.num_directions):
                suffix = self._suffix(layer, d)
                shapes[f"weight_ih{suffix}"] = (gates, width)
                shapes[f"weight_hh{suffix}"] = (gates, H)
                if self.bias:
                    shapes[f"bias_ih{suffix}"] = (gates,)
                    shapes[f"bias_hh{suffix}"] = (gates,)
        return shapes

    def _suffix(self, layer: int, direction: int) -> str:
        if not self.layer_suffixes:
            return ""
        return f"_l{layer}" + ("_reverse" if direction else "")


@dataclass
class Tape:
    """What one recorded call leaves behind; used up by `backward`."""

    engine: Engine
    weights: list[list[Weights]]  # by layer and direction, as the products read them
    layout: Layout
    segments: tuple[Segment, ...]  # to be recomputed; none: the traces are whole
    traces: list[list[Trace]]  # by layer and direction
    dropout_key: tuple[int, int]  # (seed, call)
    shape: tuple[int, ...]  # of x, as the caller gave it
    batch_first: bool
    spent: bool = False  # its undoing has begun


def forward(
    engine: Engine,
    stack: Stack,
    weights: list[list[Weights]],
    x: Array,
    initial: tuple[Array, ...] | None,
    lengths: np.ndarray | None,
    batch_first: bool,
    kept: Workspace,
    scratch: Workspace,
    dropout_key: tuple[int, int] | None,
    recompute: int | None = None,
) -> tuple[Array, tuple[Array, ...], Tape]:
    """Run every layer and direction; returns a new output, new final states, and the tape.

    Read: `weights`, `x` (T, N, I) or, batch first, (N, T, I), `initial` (L*D, N, H) each, None
    for zeros, `lengths` intp (N,). The output is (T, N, D*H), laid out as x, the final states
    (L*D, N, H). With a `dropout_key` the call is recorded: dropout acts, and the tape, which
    stands in memory of `kept`, can be undone; for each layer it keeps what goes in, and of what
    the steps compute all, or the states before every `recompute` steps. `scratch` may be `kept`
    where it is not recorded.
    """
    xp, record, T = engine.xp, dropout_key is not None, engine.compute_dtype
    width, dtype = stack.num_directions * stack.hidden_size, engine.dtype
    weights = [[_to_read(each, T) for each in pair] for pair in weights]
    steps, batch = steps_and_batch(x, batch_first)
    layout = make_layout(engine.backend, steps, batch, lengths)
    parts = segments.cut(engine.backend, layout, lengths, recompute if record else None)
    key = dropout_key or (0, 0)
    tape = Tape(engine, weights, layout, parts, [], key, x.shape, batch_first)
    output = _caller_array(xp, layout, (*x.shape[:2], width), dtype)
    final = _sorted_states(xp, stack, layout, initial, dtype)
    current = kept.empty(layout.total, stack.input_size, dtype=T)
    layout.pack(_time_major(x, batch_first), current)
    for layer in range(stack.num_layers):
        last = layer + 1 == stack.num_layers
        joined = (scratch if last else kept).empty(layout.total, width, dtype=T)
        _run_layer(stack, tape, layer, current, final, kept, scratch, record, joined)
        if record and not last:
            _drop(xp, stack, layout, joined, key, layer)
        current = joined
    layout.unpack(current, _time_major(output, batch_first))
    layout.unsort_in_place(final)
    return output, final, tape


def _run_layer(
    stack: Stack,
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
            Direction(tape.weights[layer][d], d == 1, tuple([end[layer * D + d] for end in ends]))
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
    stack: Stack,
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
    xp, layout = tape.engine.xp, tape.layout
    width, dtype = stack.num_directions * stack.hidden_size, tape.engine.dtype
    dx = _caller_array(xp, layout, tape.shape, dtype) if need_dx else None
    dstates = _sorted_states(xp, stack, layout, dfinal, dtype)
    dlayer: Array | None = None
    if doutput is not None:
        dlayer = scratch.empty(layout.total, width)
        layout.pack(_time_major(doutput, tape.batch_first), dlayer)
    for layer in range(stack.num_layers - 1, -1, -1):
        dlayer = _undo_layer(
            stack, tape, layer, dlayer, dstates, dweights[layer], need_dx, scratch, flow
        )
        if layer:
            _drop(xp, stack, layout, dlayer, tape.dropout_key, layer - 1)
    if dx is not None:
        layout.unpack(dlayer, _time_major(dx, tape.batch_first))
    layout.unsort_in_place(dstates)
    return dx, dstates


def _undo_layer(
    stack: Stack,
    tape: Tape,
    layer: int,
    doutput: Array | None,
    dstates: tuple[Array, ...],
    dweights: list[Weights],
    need_dx: bool,
    scratch: Workspace,
    flow: Array | None,
) -> Array | None:
    """Undo a layer's directions: returns the gradient of its input, None where nobody needs it.

    `doutput` (S, D*H) is read, the layer's part of `dstates` is read and overwritten.
    """
    H, D, engine, layout = stack.hidden_size, stack.num_directions, tape.engine, tape.layout
    width = D * H if layer else stack.input_size
    wanted = layer > 0 or need_dx
    shares = [scratch.empty(layout.total, width) if wanted else None for _ in range(D)]
    tape.spent = True  # from here on it is overwritten
    for group in engine.groups("backward", layout.running, H, layout.steps, D):
        mark = scratch.mark()
        directions = [
            Undoing(
                tape.weights[layer][d],
                d == 1,
                tape.traces[layer][d],
                None if doutput is None else doutput[:, d * H : (d + 1) * H],
                tuple([dstate[layer * D + d] for dstate in dstates]),
                dweights[d],
                shares[d],
                None if flow is None else flow[layer * D + d],
            )
            for d in group
        ]
        segments.backward(engine, directions, layout, tape.segments, scratch)
        scratch.rewind(mark)
    dx = shares[0]
    if dx is not None and D == 2:
        dx += shares[1]
    return dx


def steps_and_batch(x: Array, batch_first: bool) -> tuple[int, int]:
    """T and N of x (T, N, I) or, batch first, (N, T, I)."""
    first, second = x.shape[:2]
    return (second, first) if batch_first else (first, second)


def _sorted_states(
    xp: Any, stack: Stack, layout: Layout, given: tuple[Array | None, ...] | None, dtype: Any
) -> tuple[Array, ...]:
    """New arrays (L*D, N, H), one a state, with the values given, longest rows first, or zeros."""
    shape = (stack.num_layers * stack.num_directions, layout.batch, stack.hidden_size)
    states = tuple([xp.empty(shape, dtype) for _ in stack.cell.state_names])
    for state, value in zip(states, given or (None,) * len(states), strict=True):
        state[...] = 0.0 if value is None else layout.sort(value)
    return states


def _to_read(weights: Weights, dtype: np.dtype[Any]) -> Weights:
    """The weights as products read them: the matrices in the compute dtype."""
    if weights.weight_ih.dtype == dtype:
        return weights
    return Weights(
        weights.weight_ih.astype(dtype),
        weights.weight_hh.astype(dtype),
        weights.bias_ih,
        weights.bias_hh,
    )


def _drop(
    xp: Any, stack: Stack, layout: Layout, x: Array, key: tuple[int, int], layer: int
) -> None:
    """Dropout in place on what `layer` hands up, x (S, D*H); its own gradient."""
    if stack.dropout:
        time, row = layout.time_and_row(xp)
        dropout.apply(xp, x, stack.dropout, (*key, layer), time, row)


def _time_major(x: Array, batch_first: bool) -> Array:
    return x.transpose(1, 0, 2) if batch_first else x


def _caller_array(xp: Any, layout: Layout, shape: tuple[int, ...], dtype: Any) -> Array:
    """A new array for the caller; where rows end early it is zero past their ends."""
    return xp.empty(shape, dtype) if layout.ragged is None else xp.zeros(shape, dtype)
