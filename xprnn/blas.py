"""Products by NumPy's BLAS that leave its threads asleep where they would not pay.

Now and then a thread that a product wakes up shares the caller's processor, or sleeps again before
the next one, and the thread looks for more work for 0.1 s: calls of one millisecond took sixteen.
To one product nothing can be said about threads, and a limit for the process would slow whatever
else computes in it. But what is small enough OpenBLAS never divides. So a product that threads do
not pay for is made in slices, each of them that small, in one call of NumPy; on one thread too,
because OpenBLAS's kernels for small products are a fifth faster.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .backend import Array
from .processors import usable

# Multiply-adds: of the largest product that OpenBLAS leaves to one thread on every processor; of
# the least for which others pay, in a loop of them, and once, where they must first wake up
SLICE = 262_144
LOOP, ONCE = 2_000_000, 32_000_000
FEWEST = 4  # rows of a slice: with fewer, slices are slower than the whole


def calls(left: Array, right: Array, out: Array, shared: int = LOOP) -> list[partial[Any]]:
    """What writes left right to `out`, call by call; from `shared` multiply-adds on by threads.

    left (M, K), right (K, N) and `out` (M, N) are NumPy arrays of one type.
    """
    M, rows = left.shape[0], _rows(left, right, shared)
    if rows == M:
        # the same product with less of NumPy's own than in matmul, which copies no part of a matrix
        plain = out.flags.c_contiguous and left.flags.forc and right.flags.forc
        return [partial(left.dot, right, out) if plain else partial(np.matmul, left, right, out)]
    cut = M // rows * rows
    stacks = [a[:cut].reshape(-1, rows, a.shape[1]) for a in (left, out)]
    found: list[partial[Any]] = [partial(np.matmul, stacks[0], right, stacks[1])]
    if cut < M:
        found.append(partial(np.matmul, left[cut:], right, out[cut:]))
    return found


def matmul(left: Array, right: Array, out: Array) -> None:
    """Write left right to `out` once, as `calls` has it."""
    if _rows(left, right, ONCE) < left.shape[0]:
        right = np.ascontiguousarray(right)  # for which the kernels for small products are made
    for call in calls(left, right, out, ONCE):
        call()


def _rows(left: Array, right: Array, shared: int) -> int:
    """The rows of a slice of `left`; all of them: it is left whole.

    So is a product with a vector, which OpenBLAS divides from some 500,000 multiply-adds on, where
    that pays.
    """
    M: int = left.shape[0]
    most: int = SLICE // max(right.size, 1)
    if right.shape[1] == 1 or not FEWEST <= most < M:
        return M
    if M * right.size > shared and usable() > 1:
        return M
    return -(-M // -(-M // most))  # about as many in each
