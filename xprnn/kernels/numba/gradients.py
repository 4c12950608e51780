"""What follows when all steps are undone: gradients of the weights, the biases and the input.

In place of `_gradients` of `xprnn/sequence.py`. A BLAS's threads would go on spinning for a while
after each of its products, beside compiled loops that need the processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numba import types

from ...backend import Array
from ...cells import Cell
from ...directions import Undoing
from ...layout import Layout
from ...scratch import Workspace
from . import product
from .jit import compile_for, number_of, read, row, written
from .loops import take
from .threads import Crew

BLOCK = 256  # rows that are summed in registers: a panel of them fills the nearest cache
ROWS = 64  # rows of dx that are computed at a time: enough for the weights to pay off


def compute(
    cell: Cell,
    directions: Sequence[Undoing],
    packed: Sequence[Array | None],
    layout: Layout,
    scratch: Workspace,
    crew: Crew,
) -> None:
    """Write what is wanted of each direction's dweights and dx; dgh becomes dgx in the traces.

    `packed` are the W_ih of directions with a dx, in panels. Each thread takes rows of the weights
    and of dx: whoever sums up a number does it in the same order.
    """
    mark, dtype = scratch.mark(), scratch.dtype
    shares: list[list[Callable[[], Any]]] = [[] for _ in range(crew.size)]
    for each in directions:
        previous = layout.previous(each.trace.states[0], each.reverse)
        wanted = each.dweights.weight_hh, each.dweights.bias_hh
        _of_weights(each.trace.gates, previous, wanted, scratch, shares)
    crew.run([partial(_make, share) for share in shares])
    for each in directions:
        cell.to_input_side(each.trace.gates, each.trace.saved)
    scratch.rewind(mark)
    shares = [[] for _ in range(crew.size)]
    for each, panels in zip(directions, packed, strict=True):
        wanted = each.dweights.weight_ih, each.dweights.bias_ih
        _of_weights(each.trace.gates, each.trace.x, wanted, scratch, shares)
        if each.dx is not None and panels is not None:
            for share, part in zip(shares, _parts(len(each.dx), len(shares), ROWS), strict=True):
                room = scratch.empty(ROWS, panels.shape[0] * panels.shape[2])
                arrays = each.trace.gates, panels, each.dx, room
                share.append(partial(_input(dtype), *arrays, *part))
    crew.run([partial(_make, share) for share in shares])
    scratch.rewind(mark)


def _of_weights(
    dgates: Array,
    inputs: Array,
    wanted: tuple[Array | None, Array | None],
    scratch: Workspace,
    shares: Sequence[list[Callable[[], Any]]],
) -> None:
    """Add to each thread's share its rows of a matrix and a bias; None: nobody wants it."""
    dtype = scratch.dtype
    dweight, dbias = wanted
    if dweight is None:
        dweight = np.empty((0, 0), dtype)
    if dbias is None:
        dbias = np.empty(0, dtype)
    width = product.width_of(dtype)
    for share, (low, high) in zip(
        shares, _parts(dgates.shape[1], len(shares), product.MOST), strict=True
    ):
        broken = high - low if dweight.shape[1] % width else 0
        sizes = (BLOCK, width), (broken, width), (2, high - low)
        arrays = dgates, inputs, dweight, dbias, *[scratch.empty(*size) for size in sizes]
        share.append(partial(_weights(dtype), *arrays, low, high))


def _parts(size: int, parts: int, by: int) -> list[tuple[int, int]]:
    """From where to where each of so many parts goes, the first of each divisible by `by`."""
    bounds = [size * part // parts // by * by for part in range(parts)]
    return list(pairwise([*bounds, size]))


def _make(calls: Sequence[Callable[[], Any]]) -> None:
    """Make calls one after the other."""
    for call in calls:
        call()


def weight_gradient(
    dgates: Any,  # (S, G*H), read
    inputs: Any,  # (S, K), what the weights were multiplied with, read
    dweight: Any,  # (G*H, K), rows from low to high = dgates' inputs; (0, 0): nobody wants it
    dbias: Any,  # (G*H,), likewise = the sums of dgates; (0,): nobody wants it
    panel: Any,  # (BLOCK, width), scratch
    broken: Any,  # (high - low, width), scratch: the columns of a panel that is not full, if any
    sums: Any,  # (2, high - low), scratch
    low: Any,
    high: Any,
) -> None:
    """Blocks of rows, each summed by itself: a sum of all would be less exact."""
    mine, bias, width = dweight[low:high], dbias[low:high], panel.shape[1]
    S, K = len(dgates), mine.shape[1]
    for each in (mine, broken):
        each[...] = 0.0
    bias[...] = 0.0
    sums[...] = 0.0
    for s in range(0, S, BLOCK):
        block = dgates[s : s + BLOCK, low:high]
        if bias.size:
            last = s + BLOCK >= S or s // BLOCK % BLOCK == BLOCK - 1
            _add_sums(block, sums, bias, last)
        for first in range(0, K, width):
            filled = panel[: len(block)]
            product.pack_panel(inputs[s : s + BLOCK, first:], filled)
            whole = first + width <= K
            product.add_transposed(block, filled, mine[:, first:] if whole else broken[:, :])
    if K % width:
        take(broken, mine[:, K // width * width :])


@row
def _add_sums(block: Any, sums: Any, bias: Any, last: Any) -> None:
    """Sum rows, and the sums of blocks; these are added to `bias` and begin anew with the last."""
    own, several = sums[0], sums[1]
    for j in range(bias.size):
        own[j] = 0.0
    for n in range(block.shape[0]):
        for j in range(bias.size):
            own[j] += block[n, j]
    for j in range(bias.size):
        several[j] += own[j]
    if last:
        for j in range(bias.size):
            bias[j] += several[j]
            several[j] = 0.0


def input_gradient(
    dgates: Any,  # (S, G*H), dgx, read
    panels: Any,  # W_ih packed, read
    dx: Any,  # (S, I), rows from low to high = dgx W_ih
    room: Any,  # (ROWS, I filled up), scratch
    low: Any,
    high: Any,
) -> None:
    """Some rows at a time, which stay in a cache."""
    for n in range(low, high, ROWS):
        some = slice(n, min(n + ROWS, high))
        product.product(dgates[some], panels, None, room)
        take(room, dx[some])


@cache
def _weights(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    matrix, vector = written(number, 2), written(number, 1)
    arrays = read(number, 2), read(number, 2), matrix, vector, matrix, matrix, matrix
    return compile_for(weight_gradient, (*arrays, types.intp, types.intp))


@cache
def _input(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    matrix = written(number, 2)
    arrays = read(number, 2), written(number, 3), matrix, matrix
    return compile_for(input_gradient, (*arrays, types.intp, types.intp))


def compilations() -> list[Callable[[], Any]]:
    """What compiles each of them, in every type, if it is called."""
    dtypes = [np.dtype(dtype) for dtype in ("float32", "float64")]
    return [partial(function, dtype) for function in (_weights, _input) for dtype in dtypes]
