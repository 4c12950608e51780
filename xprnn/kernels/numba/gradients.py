"""Gradients of the weights, the biases and the input, computed after all backward steps.

They replace `weight_gradients` of `xprnn/kernels/shared.py`. The threads of a BLAS would keep
spinning for a while after each of its products and take processors from the compiled loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
from numba import types

from ...backend import Array
from ...core.cell import GradientTerm
from ...core.passes import BackwardPass
from ...core.workspace import Workspace
from . import product
from .jit import compile_for, number_of, read, row, written
from .loops import copy_leading
from .threads import Call, ThreadPool

BLOCK = 256  # rows that are summed in registers: a panel of them fills the L1 cache
ROWS = 64  # rows of dx that are computed at a time: enough to amortize reading the weights


def compute(
    terms: Sequence[Sequence[GradientTerm]],
    directions: Sequence[BackwardPass],
    packed: Sequence[Array | None],
    scratch: Workspace,
    pool: ThreadPool,
) -> None:
    """Write the requested dweights and dx of each direction.

    Rows of the weights and of dx are distributed among threads; the order of each sum does not
    depend on how.

    :param terms: those of the parameters that steps read.
    :param packed: in, W_ih in panels, for each direction with a dx.
    """
    mark = scratch.mark()
    all_terms = [term for each in terms for term in each]
    for direction in directions:
        (x, gates, *_), dweights = direction.activations, direction.dweights
        all_terms.append(GradientTerm(gates, x, dweights.weight_ih, dweights.bias_ih))
    calls = _weight_calls(all_terms, scratch, pool.size)
    for direction, panels in zip(directions, packed, strict=True):
        if panels is not None:
            gates = direction.activations.gates
            calls += _input_calls(gates, panels, direction.dx, scratch, pool.size)
    pool.run(calls)
    scratch.rewind(mark)


def _weight_calls(terms: Sequence[GradientTerm], scratch: Workspace, threads: int) -> list[Call]:
    """Calls that write the gradients of matrices and biases, one for each thread, or of one thread.

    A thread computes a range of rows of each term: more ranges would cost time, as each packs all
    inputs. Its calls share their memory.
    """
    dtype = scratch.dtype
    width, function = product.width_of(dtype), _weights(dtype)
    rows = max([0 if d is None else d.shape[1] for d, *_ in terms])
    shapes = (BLOCK, width), (rows, width), (2, rows)
    buffers = [scratch.arrays(*shapes) for _ in range(threads)]
    by_thread: list[list[Call]] = [[] for _ in buffers]
    for d, inputs, dweight, dbias in terms:
        if d is None:
            for each in (dweight, dbias):
                if each is not None:
                    each[...] = 0.0
            continue
        if dweight is None or inputs is None:
            inputs, dweight = np.empty((len(d), 0), dtype), np.empty((0, 0), dtype)
        if dbias is None:
            dbias = np.empty(0, dtype)
        for k, (low, high) in enumerate(_ranges(d.shape[1], threads, product.TILE_ROWS)):
            arguments = d, inputs, dweight, dbias, *buffers[k], low, high
            by_thread[k].append(partial(function, *arguments))
    return by_thread[0] if threads == 1 else [partial(_run_all, calls) for calls in by_thread]


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _input_calls(
    dgates: Array, panels: Array, dx: Array | None, scratch: Workspace, threads: int
) -> list[Call]:
    """Calls that write dx."""
    calls: list[Call] = []
    for low, high in _ranges(len(dgates), threads, ROWS):
        buffer = scratch.empty(ROWS, panels.shape[0] * panels.shape[2])
        calls.append(partial(_input(scratch.dtype), dgates, panels, dx, buffer, low, high))
    return calls


@lru_cache(256)
def _ranges(size: int, count: int, multiple: int) -> list[tuple[int, int]]:
    """Split `size` into up to `count` ranges, each starting at a multiple of `multiple`."""
    bounds = [size * k // count // multiple * multiple for k in range(count)]
    return [(low, high) for low, high in pairwise([*bounds, size]) if low < high]


def weight_gradient(
    dgates: Any,  # in, (S, G*H), any row stride
    inputs: Any,  # in, (S, K), any row stride: what the weights multiplied
    dweight: Any,  # out, (G*H, K), rows from low to high: dgates' inputs; (0, 0): not requested
    dbias: Any,  # out, (G*H,), likewise: the column sums of dgates; (0,): not requested
    panel: Any,  # workspace, (BLOCK, width)
    remainder: Any,  # workspace, (high - low or more, width), if the last panel is partial
    sums: Any,  # workspace, (2, high - low or more)
    low: Any,
    high: Any,
) -> None:
    """Sum blocks of rows separately, which is more accurate than one sum over all rows."""
    matrix, bias, width = dweight[low:high], dbias[low:high], panel.shape[1]
    S, K = len(dgates), matrix.shape[1]
    matrix[...] = 0.0
    if K % width:
        remainder[...] = 0.0
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
            full = first + width <= K
            product.add_transposed(block, filled, matrix[:, first:] if full else remainder[:, :])
    if K % width:
        copy_leading(remainder, matrix[:, K // width * width :])


@row
def _add_sums(block: Any, sums: Any, bias: Any, last: Any) -> None:
    """Sum the rows of a block, and add up block sums; `last` adds these to `bias` and resets them.

    `block` in; `sums` inout, (2, width): workspace for the block's sum, sum of blocks so far.
    """
    block_sum, total = sums[0], sums[1]
    for j in range(bias.size):
        block_sum[j] = 0.0
    for n in range(block.shape[0]):
        for j in range(bias.size):
            block_sum[j] += block[n, j]
    for j in range(bias.size):
        total[j] += block_sum[j]
    if last:
        for j in range(bias.size):
            bias[j] += total[j]
            total[j] = 0.0


def input_gradient(
    dgates: Any,  # in, (S, G*H): dgx
    panels: Any,  # in: W_ih packed
    dx: Any,  # out, (S, I), rows from low to high: dgx W_ih
    buffer: Any,  # workspace, (ROWS, I padded)
    low: Any,
    high: Any,
) -> None:
    """Compute dx in blocks of rows that stay in a cache."""
    for n in range(low, high, ROWS):
        rows = slice(n, min(n + ROWS, high))
        product.product(dgates[rows], panels, None, buffer)
        copy_leading(buffer, dx[rows])


@cache
def _weights(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    matrix, vector = written(number, 2), written(number, 1)
    columns = types.Array(number, 2, "A", readonly=True, aligned=False)
    arrays = columns, columns, matrix, vector, matrix, matrix, matrix
    return compile_for(weight_gradient, (*arrays, types.intp, types.intp))


@cache
def _input(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    matrix = written(number, 2)
    arrays = read(number, 2), written(number, 3), matrix, matrix
    return compile_for(input_gradient, (*arrays, types.intp, types.intp))


def compilations() -> list[Callable[[], Any]]:
    """Return functions that compile each kernel, one for every dtype."""
    return [*needed(np.dtype("float32")), *needed(np.dtype("float64"))]


def needed(dtype: np.dtype[Any]) -> list[Callable[[], Any]]:
    """Return functions that compile the kernels for one dtype."""
    return [partial(function, dtype) for function in (_weights, _input)]
