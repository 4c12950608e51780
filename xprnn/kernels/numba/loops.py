"""The time loops of `xprnn/sequence.py`, one function for all steps of a direction.

Each is made for a cell from what it does by element, and leaves in the arrays what the loops
there leave. `counts` (T,) are the rows of each step, longest rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload

from .jit import INLINED, inlined
from .product import pack, pack_transposed, product


def forward_loop(name: str, gates_of: Any) -> Callable[..., None]:
    """The function that takes all steps; `gates_of` is the cell's in `gates.py`."""

    def forward(
        weight_ih: Any,  # (G*H, I), read
        weight_hh: Any,  # (G*H, H), read
        bias: Any,  # (G*H filled up) by panel, of the input side, read
        bias_hh: Any,  # (G*H,), read
        panels_ih: Any,  # scratch for the weights
        panels_hh: Any,
        gx: Any,  # (rows of some steps, G*H filled up), scratch
        gh: Any,  # (n_0, G*H filled up), scratch
        x: Any,  # (S, I), read
        gates: Any,  # (S, G*H), written where the call is recorded
        saved: Any,  # (S, saved*H), written; None: the call is not recorded
        states: Any,  # (n_0 + S, H) each, written
        initial: Any,  # (n_0, H) each, read
        counts: Any,
        reverse: Any,
    ) -> None:
        pack_transposed(weight_ih, panels_ih)
        pack_transposed(weight_hh, panels_hh)
        T, first = counts.size, initial[0].shape[0]
        joined = ready = stop = 0  # gx holds the packed rows from `ready` to `stop`
        at = x.shape[0] if reverse else 0
        for i in range(T):
            t = T - 1 - i if reverse else i
            rows = counts[t]
            at -= rows if reverse else 0
            low, high = (first + at - counts[t - 1] if t else 0), first + at
            before, after = (high, low) if reverse else (low, high)
            _copy(initial, states, joined, rows, before)
            here, ahead = _block(states, before, rows), _block(states, after, rows)
            if not ready <= at < stop:
                ready, stop = _some_steps(counts, t, at, gx.shape[0], reverse)
                product(x[ready:stop], panels_ih, bias, gx)
            product(here[0], panels_hh, None, gh)
            mine = gx[at - ready : at - ready + rows]
            if saved is None:
                gates_of(mine, gh, bias_hh, here, ahead, None)
            else:
                kept = gates[at : at + rows]
                _take(mine, kept)
                gates_of(kept, gh, bias_hh, here, ahead, saved[at : at + rows])
            joined = rows
            at += 0 if reverse else rows

    forward.__name__ = f"{name}_forward"
    return forward


def backward_loop(name: str, gates_of: Any, beside: bool) -> Callable[..., None]:
    """The function that undoes all steps; with `beside` part of dh goes past the product."""

    def backward(
        weight_hh: Any,  # (G*H, H), read
        panels: Any,  # scratch for the weight
        through: Any,  # (n_0, H filled up), scratch
        gates: Any,  # (S, G*H), read, then = dgh
        saved: Any,  # (S, saved*H), read; see the cell
        states: Any,  # (n_0 + S, H) each, read
        doutput: Any,  # (S, H), rows apart, read; (0, H) for zeros
        dstates: Any,  # (n_0, H) each, read, then overwritten
        counts: Any,
        reverse: Any,
    ) -> None:
        pack(weight_hh, panels)
        T, first, total = counts.size, dstates[0].shape[0], gates.shape[0]
        at = 0 if reverse else total
        for i in range(T):
            t = i if reverse else T - 1 - i
            rows = counts[t]
            at -= 0 if reverse else rows
            low, high = (first + at - counts[t - 1] if t else 0), first + at
            before, after = (high, low) if reverse else (low, high)
            here, ahead = _block(states, before, rows), _block(states, after, rows)
            dnext, dgates = _block(dstates, 0, rows), gates[at : at + rows]
            if doutput.shape[0]:
                _add(doutput[at : at + rows], dnext[0])
            gates_of(dgates, saved[at : at + rows], here, ahead, dnext)
            product(dgates, panels, None, through)
            if beside:
                _add(through, dnext[0])
            else:
                _take(through, dnext[0])
            at += rows if reverse else 0

    backward.__name__ = f"{name}_backward"
    return backward


@inlined
def _some_steps(counts: Any, t: Any, at: Any, most: Any, reverse: Any) -> Any:
    """The packed rows of step t and of as many steps that follow it as have `most` rows in all."""
    ready, stop = at, at + counts[t]
    following = t - 1 if reverse else t + 1
    while 0 <= following < counts.size and stop - ready + counts[following] <= most:
        if reverse:
            ready -= counts[following]
            following -= 1
        else:
            stop += counts[following]
            following += 1
    return ready, stop


@inlined
def _add(more: Any, out: Any) -> None:
    """Add the leading part of `more` to `out` (N, H)."""
    for n in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[n, j] += more[n, j]


@inlined
def _take(whole: Any, out: Any) -> None:
    """Copy the leading part of `whole` to `out` (N, H)."""
    for n in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[n, j] = whole[n, j]


def _block(arrays: Any, start: Any, rows: Any) -> Any:
    """The same rows of one array or of two."""


@overload(_block, jit_options=INLINED)
def _block_by_count(arrays, start, rows):  # type: ignore[no-untyped-def]
    if arrays.count == 1:
        return lambda arrays, start, rows: (arrays[0][start : start + rows],)
    return lambda arrays, start, rows: (
        arrays[0][start : start + rows],
        arrays[1][start : start + rows],
    )


@inlined
def _copy(initial: Any, states: Any, joined: Any, rows: Any, before: Any) -> None:
    """The initial states of the rows that join at a step, to where the step reads them."""
    for k in range(len(initial)):
        for n in range(joined, rows):
            states[k][before + n] = initial[k][n]
