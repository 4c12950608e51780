"""Products by NumPy's BLAS, cut by their sizes alone and shared without OpenBLAS's threads.

Beside a busy process a product that OpenBLAS divides waits milliseconds for a thread of its own
that has no processor: layers took eight times as long as on one thread, and more. A limit for the
process would slow whatever else computes in it. But what is small enough OpenBLAS never divides. So

- a product of up to `LARGE` multiply-adds is made in slices, each of them that small, many in one
  call of NumPy; where its sums are cut too, the parts are added in order;
- from `LOOP` on, or `ONCE`, pieces of some slices go to the caller's thread and to other threads of
  this module, each to the next that is free. The caller waits for no thread that has not begun;
- a larger product is left to OpenBLAS: a wait of milliseconds costs it little, and its slices take
  longer than the whole.

How a product is cut depends on its shape, and on whether a call may use several threads. So its
bits depend neither on how many more there are nor on other processes, but for a larger product's,
which are OpenBLAS's. A large product takes up to a quarter longer in slices than whole on one
thread, so where a call may use only one it stays whole; a small one takes a fifth less, because
OpenBLAS's kernels for small products are faster.

A thread that sleeps between products comes later than OpenBLAS's, which look for work all the time:
on two idle cores sharing gave a tenth at five million multiply-adds and cost as much beside busy
processes, hence `LOOP`; at 30 million it gave two fifths, where OpenBLAS's threads gave half.

No thread is kept off the caller's processor, as Numba's are (`xprnn/kernels/numba/threads.py`):
beside busy processes it had to share another with them, and calls took half as long again.
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

from .backend import Array
from .floating_point import environment
from .processors import usable

Calls = list[partial[Any]]
Piece = Callable[[int], None]
Place = tuple[Array | None, list[Any]]  # addends, if sums are cut, and where slices are written
Cut = list[tuple[slice, int, int]]
Cuts = tuple[Cut, Cut, Cut]  # of rows, terms and columns

# Multiply-adds: of the largest product that OpenBLAS leaves to one thread on every processor; of
# the largest whose sums are left whole; of the least that threads share, in a loop of them, and
# once, where they must first wake up; of the largest that is not left to OpenBLAS's threads
SLICE, UNCUT = 262_144, 2_000_000
LOOP, ONCE, LARGE = 8_000_000, 32_000_000, 1_000_000_000
FEWEST = 4  # rows of a slice: with fewer, slices are slower than the whole
COLUMNS, TERMS = 64, 128  # of a slice of a large product, at most
PARTS = 10  # of a sum; rather than more, which take memory, up to twice as many terms
PIECE, PIECES = 1_000_000, 16  # a piece's multiply-adds, at least, and how many there are, at most


def calls(left: Array, right: Array, out: Array, shared: int = LOOP) -> Calls:
    """What writes left right to `out`, call by call; from `shared` multiply-adds on by threads.

    left (M, K), right (K, N) and `out` (M, N) are NumPy arrays of one type.
    """
    M, size, rows = left.shape[0], left.shape[0] * right.size, _rows(left, right)
    if SLICE < size <= LARGE and (size > UNCUT or rows == M) and usable() > 1:
        if out.shape[1] > M:
            left, right, out = right.T, left.T, out.T  # the same product, with more rows to share
        threads = usable() if size >= shared else 1
        pieces = _pieces(left, right, out, threads)
        others = min(threads, len(pieces)) - 1
        return [partial(_share, pieces, others)] if others else [partial(p, 0) for p in pieces]
    if rows == M:
        # the same product with less of NumPy's own than in matmul, which copies no part of a matrix
        plain = out.flags.c_contiguous and left.flags.forc and right.flags.forc
        return [partial(left.dot, right, out) if plain else partial(np.matmul, left, right, out)]
    cut = M // rows * rows
    stacks = [a[:cut].reshape(-1, rows, a.shape[1]) for a in (left, out)]
    found: Calls = [partial(np.matmul, stacks[0], right, stacks[1])]
    if cut < M:
        found.append(partial(np.matmul, left[cut:], right, out[cut:]))
    return found


def matmul(left: Array, right: Array, out: Array) -> None:
    """Write left right to `out` once, as `calls` has it."""
    if left.shape[0] * right.size <= UNCUT and _rows(left, right) < left.shape[0]:
        right = np.ascontiguousarray(right)  # for which the kernels for small products are made
    for call in calls(left, right, out, ONCE):
        call()


def _rows(left: Array, right: Array) -> int:
    """The rows of a slice of `left` that has all of each sum; all of them: it is left whole."""
    M: int = left.shape[0]
    size = M * right.size
    if size > LARGE or (size > UNCUT and usable() == 1):
        return M
    most: int = SLICE // max(right.size, 1)
    if not FEWEST <= most < M:
        return M
    return -(-M // -(-M // most))  # about as many in each


# -- large products, in slices whose sums are cut too


def _pieces(left: Array, right: Array, out: Array, threads: int) -> list[Piece]:
    """What writes some rows of left right each, for all rows.

    A piece takes the number of the thread that calls it: each has its own memory for addends.
    """
    (M, K), N = left.shape, right.shape[1]
    width = min(N, COLUMNS)
    terms = min(K, max(TERMS, min(K // PARTS, 2 * TERMS), SLICE // (COLUMNS * width)))
    rows = max(SLICE // (terms * width), 1)
    count = min(PIECES, -(-M * right.size // PIECE))
    each = min(-(-M // (count * rows)) * rows, M)
    threads = min(threads, -(-M // each))
    inner = _cut(K, terms), _cut(N, width)
    parts = sum(many for _, many, _ in inner[0])
    memory = [np.empty((parts > 1) * parts * each * N, out.dtype) for _ in range(threads)]
    found: list[Piece] = []
    places: list[Place] = []
    for first in range(0, M, each):
        part, height = slice(first, first + each), min(each, M - first)
        cuts = (_cut(height, rows), *inner)
        if parts == 1:
            places = [(None, _targets(out[None, part], cuts))] * threads
        elif not first or height < each:
            arrays = [flat[: parts * height * N].reshape(parts, height, N) for flat in memory]
            places = [(array, _targets(array, cuts)) for array in arrays]
        found.append(partial(_piece, _operands(left[part], right, cuts), places, out[part]))
    return found


def _piece(operands: list[tuple[Any, Any]], places: list[Place], out: Any, thread: int) -> None:
    addends, targets = places[thread]
    for (left, right), target in zip(operands, targets, strict=True):
        np.matmul(left, right, target)
    if addends is not None:
        np.add.reduce(addends, 0, None, out)


def _operands(left: Array, right: Array, cuts: Cuts) -> list[tuple[Array, Array]]:
    """Stacks of slices, both (row, column, term, ...) by which of each they are."""
    return [
        (
            left[m, k].reshape(many_m, 1, M, many_k, K).swapaxes(2, 3),
            right[k, n].reshape(many_k, K, many_n, N).transpose(2, 0, 1, 3),
        )
        for m, many_m, M in cuts[0]
        for k, many_k, K in cuts[1]
        for n, many_n, N in cuts[2]
    ]


def _targets(addends: Array, cuts: Cuts) -> list[Array]:
    """Where the products of these stacks go, of addends (parts of a sum, rows, columns)."""
    found: list[Array] = []
    for m, many_m, M in cuts[0]:
        first = 0
        for _, many_k, _ in cuts[1]:
            for n, many_n, N in cuts[2]:
                stack = addends[first : first + many_k, m, n]
                blocks = stack.reshape(many_k, many_m, M, many_n, N)
                found.append(blocks.transpose(1, 3, 0, 2, 4))
            first += many_k
    return found


def _cut(length: int, most: int) -> Cut:
    """Where equal parts of at most `most` are, how many and how long; and so of a last, shorter."""
    size = -(-length // -(-length // most))
    many = length // size
    end = many * size
    found = [(slice(0, end), many, size)]
    return found if end == length else [*found, (slice(end, length), 1, length - end)]


# -- the threads that share the pieces of a product


class _Product:
    """A product's pieces, for the threads that take them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._left = deque(pieces)
        self._lock = threading.Lock()
        self._joined = self._working = 0  # of the other threads
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._error: BaseException | None = None

    def work(self, thread: int = 0) -> None:
        """Take pieces until none is left; `thread`: its number."""
        left = self._left
        while left:
            try:
                piece = left.popleft()
            except IndexError:  # another thread was faster
                return
            piece(thread)

    def help(self) -> None:
        """`work` beside the caller's thread, which waits for it; nothing if no piece is left."""
        with self._lock:
            if not self._left:
                return
            self._joined += 1
            self._working += 1
            thread = self._joined
        try:
            self.work(thread)
        except BaseException as raised:  # for the caller
            self._left.clear()
            self._error = raised
        with self._lock:
            self._working -= 1
        self._ended.put(None)

    def finish(self) -> None:
        """Wait for the pieces that others have begun, and leave none; raise the error of one."""
        error = None
        while True:
            try:
                with self._lock:  # so that no other begins to work
                    self._left.clear()
                while self._working:
                    self._ended.get()
                break
            except BaseException as raised:  # Ctrl-C: not before they cease to write to the arrays
                error = raised
        error = error or self._error
        if error is not None:
            raise error


class _Helpers:
    """Threads that help one caller at a time; one that comes meanwhile works alone."""

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._products: SimpleQueue[_Product] = SimpleQueue()
        self._others: list[threading.Thread] = []

    def share(self, product: _Product, others: int) -> None:
        """Take all pieces, with up to so many other threads."""
        if not self._free.acquire(blocking=False):
            product.work()
            return
        try:
            self._start(others)
            for _ in range(min(others, len(self._others))):
                self._products.put(product)
            try:
                product.work()
            finally:
                product.finish()
        finally:
            self._free.release()

    def _start(self, count: int) -> None:
        while len(self._others) < count:
            # daemons: they wait for products when the interpreter ends
            thread = threading.Thread(target=_help, args=(self._products,), daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system gives no more, or the interpreter is ending
                return
            self._others.append(thread)


def _help(products: SimpleQueue[_Product]) -> None:
    with environment():  # a thread does not have its caller's, and this one makes no other calls
        while True:
            products.get().help()


_helpers = _Helpers()


def _share(pieces: Sequence[Piece], others: int) -> None:
    _helpers.share(_Product(pieces), others)


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _helpers
    _helpers = _Helpers()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_forget)
