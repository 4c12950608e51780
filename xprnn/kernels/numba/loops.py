"""The time loops: one function that computes all steps of a slice of rows of a direction.

They replace the step loops of `xprnn/engine/loop.py` and leave the same contents in the arrays.
`forward_loop` and `backward_loop` make them from a cell's step. `counts` (T,) holds
the number of rows of each step, longest rows first; the slice is the rows from `low` to `high`.
Packed arrays, (S, ...), hold the rows of all steps one step after the other; states, (n_0 + S, H),
hold the initial ones too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import overload

from .jit import INLINED, inlined
from .product import product

BLOCK = 64  # steps whose gradients are summed apart: more accurate than one sum over all steps


def forward_loop(name: str, step: Any) -> Callable[..., None]:
    """Return the function that computes all steps; `step` is made by `generated.py`."""

    def forward(
        panels_ih: Any,  # in: W_ih' packed
        bias: Any,  # in, (G*H padded) by panel: the bias of the input side
        x_block: Any,  # workspace, (rows of a block of steps, I)
        gx: Any,  # workspace, (rows of a block of steps, G*H padded)
        weights: Any,  # in: the matrices of a step's products, packed
        vectors: Any,  # in: the vectors that a step reads
        columns: Any,  # in: the columns that a step reads and writes
        scratch: Any,  # workspace, (high - low, width) each
        x: Any,  # in, (S, I)
        gates: Any,  # out, (S, G*H); unused if the call is not recorded
        saved: Any,  # out, (S, width); None: the call is not recorded
        states: Any,  # out, (n_0 + S, width) each
        extra: Any,  # in, (S, width) each
        initial: Any,  # in, (n_0, width) each
        counts: Any,
        reverse: Any,
        low: Any,
        high: Any,
    ) -> None:
        # gx holds the input side of `ready` further steps, that of the next step from row `gx_row`
        active = ready = gx_row = 0
        start = x.shape[0] if reverse else 0  # first packed row of step t
        for i in range(counts.size):
            t = counts.size - 1 - i if reverse else i
            rows = min(counts[t], high) - low
            start -= counts[t] if reverse else 0
            if rows > 0:
                before, after = _state_rows(counts, t, start, reverse)
                _copy_initial(initial, states, low + active, low + rows, before)
                states_t = _row_slices(states, before + low, rows)
                next_states = _row_slices(states, after + low, rows)
                extra_t = _row_slices(extra, start + low, rows)
                if ready == 0:
                    ready, total = _next_block(counts, t, low, high, gx.shape[0], reverse)
                    first = _input_rows(
                        x, x_block, counts, t, start, low, high, ready, total, reverse
                    )
                    padded = (total + 3) // 4 * 4
                    block = x[first : first + total] if first >= 0 else x_block[:padded]
                    product(block, panels_ih, bias, gx)
                    gx_row = total if reverse else 0
                gx_row -= rows if reverse else 0
                gates_t = gx[gx_row : gx_row + rows]
                saved_t = saved
                if saved is not None:
                    gates_t = gates[start + low : start + low + rows]
                    copy_leading(gx[gx_row : gx_row + rows], gates_t)
                    saved_t = saved[start + low : start + low + rows]
                step(
                    weights, vectors, columns, scratch, gates_t, saved_t, states_t, next_states,
                    states_t, extra_t, gates_t,
                )  # fmt: skip
                gx_row += 0 if reverse else rows
                active = rows
                ready -= 1
            start += 0 if reverse else counts[t]

    forward.__name__ = f"{name}_forward"
    return forward


def backward_loop(name: str, step: Any) -> Callable[..., None]:
    """Return the function of the backward pass; `step` is made by `generated.py`."""

    def backward(
        weights: Any,  # in: the matrices of a step's products, packed
        vectors: Any,  # in: the vectors that a step reads
        columns: Any,  # in: the columns that a step reads and writes
        scratch: Any,  # workspace, (high - low, width) each
        gates: Any,  # inout, (S, G*H)
        saved: Any,  # inout, (S, width)
        states: Any,  # in, (n_0 + S, width) each
        extra: Any,  # in, (S, width) each
        doutput: Any,  # in, (S, width), any strides; (0, width): zeros
        dstates: Any,  # inout, (n_0, width) each: of the final states -> of the initial states
        sums: Any,  # inout, (2, n_0, width): zeros -> workspace, and gradients of vectors by row
        counts: Any,
        reverse: Any,
        low: Any,
        high: Any,
    ) -> None:
        start = 0 if reverse else gates.shape[0]  # first packed row of step t
        added = sums[0, low:high]
        for i in range(counts.size):
            t = i if reverse else counts.size - 1 - i
            rows = min(counts[t], high) - low
            start -= 0 if reverse else counts[t]
            if rows > 0:
                first = start + low
                before, after = _state_rows(counts, t, start, reverse)
                states_t = _row_slices(states, before + low, rows)
                next_states = _row_slices(states, after + low, rows)
                extra_t = _row_slices(extra, first, rows)
                dstates_t = _row_slices(dstates, low, rows)
                if doutput.shape[0]:
                    _add_leading(doutput[first : first + rows], dstates_t[0])
                step(
                    weights, vectors, columns, scratch, gates[first : first + rows],
                    saved[first : first + rows], states_t, next_states, dstates_t, extra_t,
                    added,
                )  # fmt: skip
            start += counts[t] if reverse else 0
            if i % BLOCK == BLOCK - 1 or i == counts.size - 1:
                _move_sums(added, sums[1, low:high])

    backward.__name__ = f"{name}_backward"
    return backward


@inlined
def _state_rows(counts: Any, t: Any, start: Any, reverse: Any) -> Any:
    """Return the first row of the states that step t reads, and of those that it writes.

    `start` is the first packed row of step t.
    """
    end = counts[0] + start
    begin = end - counts[t - 1] if t else 0
    return (end, begin) if reverse else (begin, end)


@inlined
def _next_block(counts: Any, t: Any, low: Any, high: Any, most: Any, reverse: Any) -> Any:
    """Return a number of steps from t on with up to `most` rows of the slice, at least one step.

    The second result is their total number of rows.
    """
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
def _input_rows(
    x: Any, x_block: Any, counts: Any, t: Any, start: Any, low: Any, high: Any, steps: Any,
    total: Any, reverse: Any,
) -> Any:  # fmt: skip
    """Return the first of the rows of x of the slice in `steps` steps from t on.

    They are copied to `x_block`, and -1 is returned, if they are not adjacent, or their number is
    not divisible by four: up to three rows of zeros are added, so that the result of a row does not
    depend on the others.
    """
    first = t
    if reverse:
        first = t - steps + 1
        for s in range(first, t):
            start -= counts[s]
    if low == 0 and high == counts[0] and total % 4 == 0:
        return start
    n = 0
    for s in range(first, first + steps):
        rows = min(counts[s], high) - low
        copy_leading(x[start + low :], x_block[n : n + rows])
        n += rows
        start += counts[s]
    padded = (total + 3) // 4 * 4
    for n in range(total, padded):
        for j in range(x_block.shape[1]):
            x_block[n, j] = 0.0
    return -1


@inlined
def _move_sums(sums: Any, totals: Any) -> None:
    """Add `sums` (inout) to `totals` (inout), both (N, width), and set them to zero."""
    for n in range(sums.shape[0]):
        for j in range(sums.shape[1]):
            totals[n, j] += sums[n, j]
            sums[n, j] = 0.0


@inlined
def _add_leading(source: Any, out: Any) -> None:
    """Add the leading rows and columns of `source` (in) to `out` (inout, (N, H))."""
    for n in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[n, j] += source[n, j]


@inlined
def copy_leading(source: Any, out: Any) -> None:
    """Copy the leading rows and columns of `source` (in) to `out` (out, (N, H))."""
    for n in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[n, j] = source[n, j]


def _row_slices(arrays: Any, start: Any, rows: Any) -> Any:
    """Return the same rows of each array."""


@overload(_row_slices, jit_options=INLINED)
def _row_slices_by_count(arrays, start, rows):  # type: ignore[no-untyped-def]
    if len(arrays) == 0:
        return lambda arrays, start, rows: ()
    if len(arrays) == 1:
        return lambda arrays, start, rows: (arrays[0][start : start + rows],)
    return lambda arrays, start, rows: (
        (arrays[0][start : start + rows],) + _row_slices(arrays[1:], start, rows)  # noqa: RUF005
    )


@inlined
def _copy_initial(initial: Any, states: Any, low: Any, high: Any, before: Any) -> None:
    """Copy the initial states of rows that begin at a step to where the step reads them."""
    for k in range(len(initial)):
        for n in range(low, high):
            for j in range(states[k].shape[1]):
                states[k][before + n, j] = initial[k][n, j]
