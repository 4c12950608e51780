"""Matrix products by NumPy's BLAS, sliced by size, and shared among threads of this module.

Next to a busy process, a product that OpenBLAS divides among its threads can wait milliseconds for
a thread that is not scheduled: layers took eight times as long as on one thread, and more. Limiting
OpenBLAS's threads would slow everything else in the process. But OpenBLAS computes a small enough
product on one thread. Therefore

- a product of up to `LARGE` multiply-adds is computed in slices below that size, many in one call
  of NumPy; where its sums are split too, the partial sums are added in order;
- from `SHARE_REPEATED` multiply-adds on, or `SHARE_ONCE`, pieces of several slices are distributed
  among the caller's thread and worker threads of this module; each takes the next piece when it is
  free. The caller does not wait for a thread that has not begun;
- a larger product is left to OpenBLAS: a wait of milliseconds costs it little, and computed in
  slices it takes longer.

How a product is sliced depends on its shape, and on whether a call may use several threads. So its
bits depend neither on how many threads there are beyond two nor on other processes, except for
products that are left to OpenBLAS. On one thread a large product takes up to a quarter longer in
slices than in one call, so where a call may use only one thread it is not sliced; a small one takes
a fifth less, because OpenBLAS's kernels for small products are faster.

A thread that sleeps between products starts later than OpenBLAS's threads, which poll for work: on
two idle cores, sharing gained a tenth at five million multiply-adds and lost as much next to busy
processes, hence `SHARE_REPEATED`; at 30 million it gained two fifths, where OpenBLAS's threads
gained half.

Worker threads may run on the caller's processor, unlike those of the Numba kernels
(`xprnn/kernels/numba/threads.py`): kept off it, they had to share the other processors with busy
processes, and calls took half as long again.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from . import Array
from .floating_point import environment
from .processors import usable

Calls = list[partial[Any]]
Piece = Callable[[int], None]
# partial sums, if any, and where slices are written
Destination = tuple[Array | None, list[Any]]
Split = list[tuple[slice, int, int]]
Splits = tuple[Split, Split, Split]  # of rows, terms and columns

# Multiply-adds: of the largest product that OpenBLAS runs on one thread on every processor; of the
# largest whose sums are not split; of the smallest that threads share, where it is repeated in a
# loop, and where it is computed once, so that the threads must first wake up; of the largest that
# is not left to OpenBLAS's threads
SLICE, UNCUT = 262_144, 2_000_000
SHARE_REPEATED, SHARE_ONCE, LARGE = 8_000_000, 32_000_000, 1_000_000_000
MIN_ROWS = 4  # of a slice: with fewer, slices are slower than the unsliced product
MAX_COLUMNS, MAX_TERMS = 64, 128  # of a slice of a large product
MAX_PARTIAL_SUMS = 10  # beyond it, since they take memory, up to twice as many terms per slice
MIN_PIECE, MAX_PIECES = 1_000_000, 16  # multiply-adds of a piece, number of pieces


def calls(left: Array, right: Array, out: Array, shared: int = SHARE_REPEATED) -> Calls:
    """Return the calls that write left right to `out`; from `shared` multiply-adds on by threads.

    left (M, K), right (K, N) and `out` (M, N) are NumPy arrays of one dtype.
    """
    M, size, rows = left.shape[0], left.shape[0] * right.size, _slice_rows(left, right)
    if SLICE < size <= LARGE and (size > UNCUT or rows == M) and usable() > 1:
        if out.shape[1] > M:
            left, right, out = right.T, left.T, out.T  # the same product, with more rows to share
        threads = usable() if size >= shared else 1
        pieces = _pieces(left, right, out, threads)
        workers = min(threads, len(pieces)) - 1
        return [partial(_share, pieces, workers)] if workers else [partial(p, 0) for p in pieces]
    if rows == M:
        # `dot` has less overhead than `matmul`; for these layouts it copies no operand
        plain = out.flags.c_contiguous and left.flags.forc and right.flags.forc
        return [partial(left.dot, right, out) if plain else partial(np.matmul, left, right, out)]
    end = M // rows * rows
    stacks = [a[:end].reshape(-1, rows, a.shape[1]) for a in (left, out)]
    result: Calls = [partial(np.matmul, stacks[0], right, stacks[1])]
    if end < M:
        result.append(partial(np.matmul, left[end:], right, out[end:]))
    return result


def matmul(left: Array, right: Array, out: Array) -> None:
    """Write left right to `out`, by `calls` for a product that is computed once."""
    if left.shape[0] * right.size <= UNCUT and _slice_rows(left, right) < left.shape[0]:
        right = np.ascontiguousarray(right)  # the layout that kernels for small products expect
    for call in calls(left, right, out, SHARE_ONCE):
        call()


def _slice_rows(left: Array, right: Array) -> int:
    """Return the rows of `left` per slice whose sums are not split; M: do not slice."""
    M: int = left.shape[0]
    size = M * right.size
    if size > LARGE or (size > UNCUT and usable() == 1):
        return M
    most: int = SLICE // max(right.size, 1)
    if not MIN_ROWS <= most < M:
        return M
    return -(-M // -(-M // most))  # slices of nearly equal height


# -- large products, in slices whose sums are split too


def _pieces(left: Array, right: Array, out: Array, threads: int) -> list[Piece]:
    """Return functions that each write some rows of left right, all rows together.

    A piece is called with the index of the calling thread, which selects its memory for partial
    sums.
    """
    (M, K), N = left.shape, right.shape[1]
    width = min(N, MAX_COLUMNS)
    terms = max(MAX_TERMS, min(K // MAX_PARTIAL_SUMS, 2 * MAX_TERMS))
    terms = min(K, max(terms, SLICE // (MAX_COLUMNS * width)))
    rows = max(SLICE // (terms * width), 1)
    count = min(MAX_PIECES, -(-M * right.size // MIN_PIECE))
    height = min(-(-M // (count * rows)) * rows, M)
    threads = min(threads, -(-M // height))
    split_k, split_n = _split(K, terms), _split(N, width)
    sums = sum(count for _, count, _ in split_k)
    memory = [np.empty((sums > 1) * sums * height * N, out.dtype) for _ in range(threads)]
    pieces: list[Piece] = []
    destinations: list[Destination] = []
    for first in range(0, M, height):
        block, rows_here = slice(first, first + height), min(height, M - first)
        splits = _split(rows_here, rows), split_k, split_n
        if sums == 1:
            destinations = [(None, _output_stacks(out[None, block], splits))] * threads
        elif not first or rows_here < height:
            size = sums * rows_here * N
            arrays = [flat[:size].reshape(sums, rows_here, N) for flat in memory]
            destinations = [(array, _output_stacks(array, splits)) for array in arrays]
        stacks = _operand_stacks(left[block], right, splits)
        pieces.append(partial(_run_piece, stacks, destinations, out[block]))
    return pieces


def _run_piece(
    operands: list[tuple[Any, Any]], destinations: list[Destination], out: Any, thread: int
) -> None:
    partial_sums, targets = destinations[thread]
    for (left, right), target in zip(operands, targets, strict=True):
        np.matmul(left, right, target)
    if partial_sums is not None:
        np.add.reduce(partial_sums, 0, None, out)


def _operand_stacks(left: Array, right: Array, splits: Splits) -> list[tuple[Array, Array]]:
    """Return stacks of slices of both operands, with axes (row, column, term) of the slices."""
    return [
        (
            left[m, k].reshape(count_m, 1, M, count_k, K).swapaxes(2, 3),
            right[k, n].reshape(count_k, K, count_n, N).transpose(2, 0, 1, 3),
        )
        for m, count_m, M in splits[0]
        for k, count_k, K in splits[1]
        for n, count_n, N in splits[2]
    ]


def _output_stacks(partial_sums: Array, splits: Splits) -> list[Array]:
    """Return the stacks in `partial_sums` (sums, rows, columns) that these products write."""
    stacks: list[Array] = []
    for m, count_m, M in splits[0]:
        first = 0
        for _, count_k, _ in splits[1]:
            for n, count_n, N in splits[2]:
                stack = partial_sums[first : first + count_k, m, n]
                blocks = stack.reshape(count_k, count_m, M, count_n, N)
                stacks.append(blocks.transpose(1, 3, 0, 2, 4))
            first += count_k
    return stacks


def _split(length: int, most: int) -> Split:
    """Return the range, number and length of equal blocks of at most `most`, then of a shorter."""
    size = -(-length // -(-length // most))
    count = length // size
    end = count * size
    split = [(slice(0, end), count, size)]
    return split if end == length else [*split, (slice(end, length), 1, length - end)]


# -- the threads that share the pieces of a product


class _Product:
    """The pieces of a product, for the threads that share them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._queue = deque(pieces)
        self._lock = threading.Lock()
        self._joined = self._working = 0  # numbers of worker threads
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None

    def work(self, thread: int = 0) -> None:
        """Run pieces until none is left; `thread`: index of the calling thread."""
        queue = self._queue
        while queue:
            try:
                piece = queue.popleft()
            except IndexError:  # another thread was faster
                return
            piece(thread)

    def join(self) -> None:
        """Run pieces in a worker thread, for which `finish` waits; nothing if no piece is left."""
        with self._lock:
            if not self._queue:
                return
            self._joined += 1
            self._working += 1
            thread = self._joined
        try:
            self.work(thread)
        except BaseException as raised:  # `finish` raises it in the caller's thread
            self._queue.clear()
            self._error = raised
        with self._lock:
            self._working -= 1
        self._ended.put(None)

    def finish(self) -> None:
        """Drop pieces that have not begun, wait for the others and raise the error of one."""
        error = None
        while True:
            try:
                with self._lock:  # so that no further worker joins
                    self._queue.clear()
                while self._working:
                    self._ended.get()
                break
            except BaseException as raised:  # Ctrl-C: workers still write to the arrays
                error = raised
        error = error or self._error
        if error is not None:
            raise error


class _Workers:
    """Worker threads for one caller at a time; a second caller meanwhile works alone."""

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._products: SimpleQueue[_Product] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def share(self, product: _Product, workers: int) -> None:
        """Run all pieces, in the caller's thread and up to `workers` others."""
        if not self._free.acquire(blocking=False):
            product.work()
            return
        try:
            self._start(workers)
            for _ in range(min(workers, len(self._threads))):
                self._products.put(product)
            try:
                product.work()
            finally:
                product.finish()
        finally:
            self._free.release()

    def _start(self, count: int) -> None:
        while len(self._threads) < count:
            # daemons: they wait for products when the interpreter exits
            thread = threading.Thread(target=_worker_loop, args=(self._products,), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system's limit, or the interpreter is shutting down
                return
            self._threads.append(thread)


def _worker_loop(products: SimpleQueue[_Product]) -> None:
    with environment():  # per thread, and this thread makes no other calls
        while True:
            products.get().join()


_workers = _Workers()


def _share(pieces: Sequence[Piece], workers: int) -> None:
    _workers.share(_Product(pieces), workers)


def _reset_after_fork() -> None:
    """Replace the workers: a forked process has none of its parent's threads."""
    global _workers
    _workers = _Workers()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_reset_after_fork)
