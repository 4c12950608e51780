"""The time loops of `xprnn/loop.py`, one function for all steps of a slice of a direction.

Each is made for a cell from what it does by element, and leaves in the arrays what the loops
there leave. `counts` (T,) are the rows of each step, longest rows first; the slice are the rows
from `low` to `high`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload

from .jit import INLINED, inlined
from .product import product


def forward_loop(name: str, gates_of: Any) -> Callable[..., None]:
    """The function that takes all steps; `gates_of` is the cell's in `gates.py`."""

    def forward(
        panels_ih: Any,  # W_ih' packed, read
        panels_hh: Any,  # W_hh' packed, read
        bias: Any,  # (G*H filled up) by panel, of the input side, read
        bias_hh: Any,  # (G*H,), read
        taken: Any,  # (rows of some steps, I), scratch
        gx: Any,  # (rows of some steps, G*H filled up), scratch
        gh: Any,  # (high - low, G*H filled up), scratch
        x: Any,  # (S, I), read
        gates: Any,  # (S, G*H), written where the call is recorded
        saved: Any,  # (S, saved*H), written; None: the call is not recorded
        states: Any,  # (n_0 + S, H) each, written
        initial: Any,  # (n_0, H) each, read
        counts: Any,
        reverse: Any,
        low: Any,
        high: Any,
    ) -> None:
        joined = steps = place = 0  # gx holds `steps` steps more; rows from `place` are the next's
        at = x.shape[0] if reverse else 0
        for i in range(counts.size):
            t = counts.size - 1 - i if reverse else i
            rows = min(counts[t], high) - low
            at -= counts[t] if reverse else 0
            if rows > 0:
                before, after = _places(counts, t, at, reverse)
                _copy(initial, states, low + joined, low + rows, before)
                here, ahead = _block(states, before + low, rows), _block(states, after + low, rows)
                if steps == 0:
                    steps, total = _some_steps(counts, t, low, high, gx.shape[0], reverse)
                    source = _rows_of(x, taken, counts, t, at, low, high, steps, total, reverse)
                    product(source, panels_ih, bias, gx)
                    place = total if reverse else 0
                product(here[0], panels_hh, None, gh)
                place -= rows if reverse else 0
                mine = gx[place : place + rows]
                if saved is None:
                    gates_of(mine, gh, bias_hh, here, ahead, None)
                else:
                    kept = gates[at + low : at + low + rows]
                    take(mine, kept)
                    behind = saved[at + low : at + low + rows]
                    gates_of(kept, gh, bias_hh, here, ahead, behind)
                place += 0 if reverse else rows
                joined = rows
                steps -= 1
            at += 0 if reverse else counts[t]

    forward.__name__ = f"{name}_forward"
    return forward


def backward_loop(name: str, gates_of: Any, beside: bool) -> Callable[..., None]:
    """The function that undoes all steps; with `beside` part of dh goes past the product."""

    def backward(
        panels: Any,  # W_hh packed, read
        through: Any,  # (high - low, H filled up), scratch
        gates: Any,  # (S, G*H), read, then = dgh
        saved: Any,  # (S, saved*H), read; see the cell
        states: Any,  # (n_0 + S, H) each, read
        doutput: Any,  # (S, H), rows apart, read; (0, H) for zeros
        dstates: Any,  # (n_0, H) each, read, then overwritten
        counts: Any,
        reverse: Any,
        low: Any,
        high: Any,
    ) -> None:
        at = 0 if reverse else gates.shape[0]
        for i in range(counts.size):
            t = i if reverse else counts.size - 1 - i
            rows = min(counts[t], high) - low
            at -= 0 if reverse else counts[t]
            if rows > 0:
                first = at + low
                before, after = _places(counts, t, at, reverse)
                here, ahead = _block(states, before + low, rows), _block(states, after + low, rows)
                dnext, dgates = _block(dstates, low, rows), gates[first : first + rows]
                if doutput.shape[0]:
                    _add(doutput[first : first + rows], dnext[0])
                gates_of(dgates, saved[first : first + rows], here, ahead, dnext)
                product(dgates, panels, None, through)
                if beside:
                    _add(through, dnext[0])
                else:
                    take(through, dnext[0])
            at += counts[t] if reverse else 0

    backward.__name__ = f"{name}_backward"
    return backward


@inlined
def _places(counts: Any, t: Any, at: Any, reverse: Any) -> Any:
    """Where the states that step t reads begin, and those that it writes; its gates are at `at`."""
    end = counts[0] + at
    start = end - counts[t - 1] if t else 0
    return (end, start) if reverse else (start, end)


@inlined
def _some_steps(counts: Any, t: Any, low: Any, high: Any, most: Any, reverse: Any) -> Any:
    """How many steps from t on have `most` rows of the slice in all, one at least; their rows."""
    steps = total = 0
    while 0 <= t < counts.size:
        rows = min(counts[t], high) - low
        if rows <= 0 or (steps and total + rows > most):
            break
        total += rows
        steps += 1
        t += -1 if reverse else 1
    return steps, total


@inlined
def _rows_of(
    x: Any, taken: Any, counts: Any, t: Any, at: Any, low: Any, high: Any, steps: Any, total: Any,
    reverse: Any,
) -> Any:  # fmt: skip
    """The rows of x that belong to the slice in `steps` steps from t on, and up to three more.

    Their number is divisible by four: what a row gives does not depend on who is beside it.
    """
    first = t
    if reverse:
        first = t - steps + 1
        for s in range(first, t):
            at -= counts[s]
    if low == 0 and high == counts[0] and total % 4 == 0:
        return x[at : at + total]
    n = 0
    for s in range(first, first + steps):
        rows = min(counts[s], high) - low
        take(x[at + low :], taken[n : n + rows])
        n += rows
        at += counts[s]
    whole = (total + 3) // 4 * 4
    for n in range(total, whole):
        for j in range(taken.shape[1]):
            taken[n, j] = 0.0
    return taken[:whole]


@inlined
def _add(more: Any, out: Any) -> None:
    """Add the leading part of `more` to `out` (N, H)."""
    for n in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[n, j] += more[n, j]


@inlined
def take(whole: Any, out: Any) -> None:
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
def _copy(initial: Any, states: Any, low: Any, high: Any, before: Any) -> None:
    """The initial states of the rows that join at a step, to where the step reads them."""
    for k in range(len(initial)):
        for n in range(low, high):
            states[k][before + n] = initial[k][n]
