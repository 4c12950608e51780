"""What follows when all steps are undone: gradients of the weights, the biases and the input.

In place of `weight_gradients` of `xprnn/kernels/shared.py`. A BLAS's threads would go on spinning
for a while after each of its products, beside compiled loops that need the processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numba import types

from ...backend import Array
from ...cells import Cell
from ...packing import PackedBatch
from ...passes import BackwardPass
from ...workspace import Workspace
from . import product
from .jit import compile_for, number_of, read, row, written
from .loops import take
from .threads import Call, Crew

BLOCK = 256  # rows that are summed in registers: a panel of them fills the nearest cache
ROWS = 64  # rows of dx that are computed at a time: enough for the weights to pay off


def compute(
    cell: Cell,
    directions: Sequence[BackwardPass],
    packed: Sequence[Array | None],
    layout: PackedBatch,
    scratch: Workspace,
    crew: Crew,
) -> None:
    """Write what is wanted of each direction's dweights and dx; dgh becomes dgx in the traces.

    `packed` are the W_ih of directions with a dx, in panels. Threads take rows of the weights and
    of dx: whoever sums up a number does it in the same order.
    """
    parts = crew.size  # no more: each packs all inputs for itself
    mark = scratch.mark()
    calls: list[Call] = []
    for each in directions:
        previous = layout.previous(each.activations.states[0], each.reverse)
        wanted = each.dweights.weight_hh, each.dweights.bias_hh
        calls += _of_weights(each.activations.gates, previous, wanted, scratch, parts)
    crew.run(calls)
    for each in directions:
        cell.to_input_side(each.activations.gates, each.activations.saved)
    scratch.rewind(mark)
    calls = []
    for each, panels in zip(directions, packed, strict=True):
        wanted = each.dweights.weight_ih, each.dweights.bias_ih
        calls += _of_weights(each.activations.gates, each.activations.x, wanted, scratch, parts)
        if panels is not None:
            calls += _of_input(each.activations.gates, panels, each.dx, scratch, parts)
    crew.run(calls)
    scratch.rewind(mark)


def _of_weights(
    dgates: Array,
    inputs: Array,
    wanted: tuple[Array | None, Array | None],
    scratch: Workspace,
    parts: int,
) -> Iterator[Call]:
    """What writes a matrix and a bias, in so many parts; None: nobody wants it."""
    dtype = scratch.dtype
    dweight, dbias = wanted
    if dweight is None:
        dweight = np.empty((0, 0), dtype)
    if dbias is None:
        dbias = np.empty(0, dtype)
    width, function = product.width_of(dtype), _weights(dtype)
    for low, high in _cut(dgates.shape[1], parts, product.MOST):
        broken = high - low if dweight.shape[1] % width else 0
        rooms = scratch.arrays((BLOCK, width), (broken, width), (2, high - low))
        yield partial(function, dgates, inputs, dweight, dbias, *rooms, low, high)


def _of_input(
    dgates: Array, panels: Array, dx: Array | None, scratch: Workspace, parts: int
) -> Iterator[Call]:
    """What writes dx, in so many parts."""
    function = _input(scratch.dtype)
    for part in _cut(len(dgates), parts, ROWS):
        room = scratch.empty(ROWS, panels.shape[0] * panels.shape[2])
        yield partial(function, dgates, panels, dx, room, *part)


@lru_cache(256)
def _cut(size: int, parts: int, by: int) -> list[tuple[int, int]]:
    """From where to where up to so many parts go, the first of each divisible by `by`."""
    bounds = [size * part // parts // by * by for part in range(parts)]
    return [part for part in pairwise([*bounds, size]) if part[0] < part[1]]


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
    return [*needed(np.dtype("float32")), *needed(np.dtype("float64"))]


def needed(dtype: np.dtype[Any]) -> list[Callable[[], Any]]:
    """What compiles them in one type."""
    return [partial(function, dtype) for function in (_weights, _input)]
