"""One direction of one layer: input product -> time loop -> products for the weights.

Works on packed arrays, rows longest first; `layout.py` says how they stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .backend import Array
from .cells import Buffers, Cell, Weights
from .kernels import Engine
from .layout import Layout
from .numerics import sum_rows
from .scratch import Workspace


@dataclass(frozen=True, slots=True)
class Trace:
    """What the steps of one direction of one layer leave behind for `backward`.

    All are of the compute dtype but the states after the first, which no product reads.
    """

    x: Array  # (S, I) the layer's input
    gates: Array  # (S, G*H)
    saved: Array  # (S, saved*H)
    states: tuple[Array, ...]  # (n_0 + S, H) each


def forward(
    engine: Engine,
    weights: Weights,
    x: Array,
    ends: tuple[Array, ...],
    layout: Layout,
    reverse: bool,
    kept: Workspace,
    scratch: Workspace,
    record: bool,
) -> Trace:
    """Run all steps of one direction of one layer.

    `x` (S, I) and `weights` are read. `ends` (N, H) each: the initial states, read, then
    overwritten with the final ones. The trace is written, in memory of `kept`; its
    `saved` is complete only with `record`. `scratch` is free again afterwards.
    """
    xp, cell, T = engine.xp, engine.cell, engine.compute_dtype
    H = ends[0].shape[1]
    total = layout.total
    gates = kept.empty(total, cell.gates * H, dtype=T)
    saved = kept.empty(total if record else layout.running, cell.saved * H, dtype=T)
    others = [kept.empty(layout.running + total, H) for _ in ends[1:]]
    states = (kept.empty(layout.running + total, H, dtype=T), *others)

    trace = Trace(x, gates, saved, states)
    whole = engine.whole("training" if record else "forward", layout.running, H, layout.steps)
    bias = input_bias(cell, weights, T)
    if whole is None or not whole[0].from_input:
        input_side(xp, weights, bias, x, gates)
    if whole is None:
        _take_steps(engine, weights, trace, ends, layout, reverse, scratch, record)
    else:
        kernels, chosen = whole
        given = weights, bias, x, gates, saved if record else None
        first = _block(ends, 0, layout.running)
        kernels.forward(chosen, *given, states, first, layout, reverse, scratch)
    for state, end in zip(states, ends, strict=True):
        end[: layout.running] = layout.final(state, reverse)
    return trace


def step(
    xp: Any, cell: Cell, weights: Weights, bias: Array | None, x: Array, here: Buffers
) -> None:
    """One step of one direction of one layer alone, from x (N, I).

    `bias` is what `input_bias` gives, for all rows or for each; the buffers are those of `Cell`.
    """
    input_side(xp, weights, bias, x, here.gates)
    cell.forward(xp, weights, here)


def input_side(xp: Any, weights: Weights, bias: Array | None, x: Array, gates: Array) -> None:
    """Write gx to `gates` (S, G*H), as `Cell` wants it; x (S, I) and `bias` (G*H,) are read."""
    xp.matmul(x, weights.weight_ih.T, out=gates)
    if bias is not None:
        gates += bias


def _take_steps(
    engine: Engine,
    weights: Weights,
    trace: Trace,
    ends: tuple[Array, ...],
    layout: Layout,
    reverse: bool,
    scratch: Workspace,
    record: bool,
) -> None:
    """The time loop of `forward`: gates, saved and states of `trace` are written."""
    xp, cell, H = engine.xp, engine.cell, ends[0].shape[1]
    carved = Carved(scratch, layout.running, cell.forward_scratch, H)
    gates, saved, states = trace.gates, trace.saved, trace.states
    ahead: tuple[Array, ...] = ()
    for _, rows, joined, at, before, after in layout.walk(reverse):
        if rows > joined:
            for state, end in zip(states, ends, strict=True):
                state[before + joined : before + rows] = end[joined:rows]
        # what one step writes the next one reads; CuPy takes microseconds for each view
        here = ahead if rows == joined and ahead else _block(states, before, rows)
        ahead = _block(states, after, rows)
        place = at if record else 0
        mine = gates[at : at + rows], saved[place : place + rows]
        cell.forward(xp, weights, Buffers(*mine, here, ahead, (), carved.rows(rows)))


def backward(
    engine: Engine,
    weights: Weights,
    trace: Trace,
    layout: Layout,
    reverse: bool,
    doutput: Array | None,
    dstates: tuple[Array, ...],
    dweights: Weights,
    dx: Array | None,
    scratch: Workspace,
    flow: Array | None = None,
) -> None:
    """Undo all steps of one direction of one layer, then multiply for the weights and the input.

    `doutput` (S, H) is read, None stands for zeros. `dstates` (N, H) each: the gradient of the
    final states, read, then overwritten with that of the initial ones. `dweights`: every
    entry that is not None is written. `dx` (S, I), if given, is written. `flow` (T,), if
    given, is written: the norm of the gradient that reaches the state after each step.
    `trace` is used up: its gates and saved are overwritten.
    """
    xp, cell = engine.xp, engine.cell
    H = dstates[0].shape[1]
    # the norms of `flow` are taken between steps
    whole = engine.whole("backward", layout.running, H, layout.steps) if flow is None else None
    if whole is None:
        _undo_steps(engine, weights, trace, layout, reverse, doutput, dstates, scratch, flow)
    else:
        kernels, chosen = whole
        first = _block(dstates, 0, layout.running)
        mine = trace.gates, trace.saved, trace.states, doutput, first
        kernels.backward(chosen, weights, *mine, layout, reverse, scratch)
    _weight_gradients(xp, cell, trace, layout.previous(trace.states[0], reverse), dweights)
    if dx is not None:
        xp.matmul(trace.gates, weights.weight_ih, out=dx)


def _undo_steps(
    engine: Engine,
    weights: Weights,
    trace: Trace,
    layout: Layout,
    reverse: bool,
    doutput: Array | None,
    dstates: tuple[Array, ...],
    scratch: Workspace,
    flow: Array | None,
) -> None:
    """The time loop of `backward`: in `trace` gates become dgh; `dstates` are overwritten."""
    xp, cell = engine.xp, engine.cell
    carved = Carved(scratch, layout.running, cell.backward_scratch, dstates[0].shape[1])
    dnext: tuple[Array, ...] = ()
    here: tuple[Array, ...] = ()
    for t, rows, joined, at, before, after in layout.walk(reverse, undo=True):
        ahead = here if rows == joined and here else _block(trace.states, after, rows)
        here = _block(trace.states, before, rows)
        if rows != joined or not dnext:
            dnext = _block(dstates, 0, rows)
        if doutput is not None:
            dh = dnext[0]
            dh += doutput[at : at + rows]
        if flow is not None:
            flow[t] = sum((dstate * dstate).sum() for dstate in dnext) ** 0.5
        mine = trace.gates[at : at + rows], trace.saved[at : at + rows]
        cell.backward(xp, weights, Buffers(*mine, here, ahead, dnext, carved.rows(rows)))


def _block(arrays: tuple[Array, ...], start: int, rows: int) -> tuple[Array, ...]:
    """The same rows of each array, as views."""
    # a list first, here and in the callers: tuple(generator) leaves an entry in CPython's free
    # list at each call, and a long run would seem to grow
    return tuple([array[start : start + rows] for array in arrays])


def input_bias(cell: Cell, weights: Weights, dtype: Any) -> Array | None:
    """b_ih, and b_hh of the gates in which the two only occur as a sum; a new array (G*H,)."""
    if weights.bias_ih is None or weights.bias_hh is None:
        return None
    bias = weights.bias_ih.copy()
    folded = cell.folded * weights.weight_hh.shape[1]
    bias[:folded] += weights.bias_hh[:folded]
    return bias.astype(dtype, copy=False)


def _weight_gradients(
    xp: Any, cell: Cell, trace: Trace, previous: Array, dweights: Weights
) -> None:
    """One product over all steps per weight; turns the trace's gates from dgh into dgx."""
    dgates = trace.gates
    if dweights.weight_hh is not None:
        cell.recurrent_gradient(xp, dgates, previous, trace.saved, dweights.weight_hh)
    if dweights.bias_hh is not None:
        sum_rows(xp, dgates, dweights.bias_hh)
    cell.to_input_side(dgates, trace.saved)
    if dweights.weight_ih is not None:
        xp.matmul(dgates.T, trace.x, out=dweights.weight_ih)
    if dweights.bias_ih is not None:
        sum_rows(xp, dgates, dweights.bias_ih)


class Carved:
    """Contiguous scratch arrays (rows, width*H), carved anew only when `rows` changes."""

    def __init__(
        self, workspace: Workspace, most_rows: int, widths: tuple[int, ...], H: int
    ) -> None:
        self._flat = [workspace.empty(most_rows * width * H) for width in widths]
        self._widths = [width * H for width in widths]
        self._rows = -1
        self._arrays: tuple[Array, ...] = ()

    def rows(self, rows: int) -> tuple[Array, ...]:
        """The arrays for a step with `rows` active rows, uninitialised."""
        if rows != self._rows:
            self._rows = rows
            self._arrays = tuple(
                [
                    flat[: rows * width].reshape(rows, width)
                    for flat, width in zip(self._flat, self._widths, strict=True)
                ]
            )
        return self._arrays
