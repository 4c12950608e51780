"""Products of a few rows with packed weights, as in the steps of a sequence.

A BLAS packs its operands in every call, which is expensive for a single step. Here the weights are
packed once for all steps, in panels as wide as a row tile, and a tile of the result stays in
registers during its sums.
"""

from __future__ import annotations

from functools import cache
from math import lcm
from typing import Any

import numpy as np

from .jit import inlined
from .tile import REGISTERS, VECTORS, move, tile, tile_transposed, transpose

TILE_ROWS = REGISTERS.rows  # rows of the largest tile
_BLOCK_ROWS = lcm(TILE_ROWS, 4)
_PACK_ROWS = 16  # rows packed at a time: their pages are still in the TLB for the next panel
_largest, _four, _two, _one = (tile(rows) for rows in (TILE_ROWS, 4, 2, 1))
_largest_transposed, _one_transposed = (tile_transposed(rows) for rows in (TILE_ROWS, 1))


@cache
def width_of(dtype: np.dtype[Any]) -> int:
    """Return the number of columns of a panel."""
    return VECTORS * REGISTERS.bytes // dtype.itemsize


def panels_of(columns: int, dtype: np.dtype[Any]) -> int:
    """Return the number of panels of a matrix; the last one is padded with zeros."""
    return -(-columns // width_of(dtype))


@inlined
def pack(matrix: Any, panels: Any) -> None:
    """Write a matrix (K, columns) into `panels` (panels, K, width)."""
    K, width = matrix.shape[0], panels.shape[2]
    for k in range(0, K, _PACK_ROWS):
        rows = slice(k, min(k + _PACK_ROWS, K))
        for p in range(panels.shape[0]):
            pack_panel(matrix[rows, p * width :], panels[p, rows])


@inlined
def pack_panel(columns: Any, panel: Any) -> None:
    """Write the leading columns of `columns` (K, F) into one panel (K, width)."""
    width = panel.shape[1]
    filled = min(width, columns.shape[1])
    for k in range(panel.shape[0]):
        source, target = columns[k], panel[k]
        if filled == width:
            move(source, target)
        else:
            for j in range(filled):
                target[j] = source[j]
            for j in range(filled, width):
                target[j] = 0.0


@inlined
def pack_transposed(matrix: Any, panels: Any) -> None:
    """Write the transpose of a matrix (columns, K) into `panels` (panels, K, width)."""
    columns, K, width = matrix.shape[0], matrix.shape[1], panels.shape[2]
    lanes = width // VECTORS
    for p in range(panels.shape[0]):
        panel = panels[p]
        for v in range(0, width, lanes):
            first = p * width + v
            full = K // lanes * lanes if first + lanes <= columns else 0
            for k in range(0, full, lanes):
                transpose(matrix[first:, k:], panel[k:, v:])
            for j in range(lanes):
                for k in range(full, K):
                    panel[k, v + j] = matrix[first + j, k] if first + j < columns else 0.0


@inlined
def product(a: Any, panels: Any, start: Any, out: Any) -> None:
    """Write start + a @ panels to `out`; sums begin at `start`, None for zero.

    `a` is (N, K), `panels` (panels, K, width), `start` (panels, width), `out`
    (N, panels * width). Tiles of four rows and more sum over k in order, smaller ones do not: the
    bits of a row depend only on whether it is among the last N % 4.
    """
    rows, width = a.shape[0], panels.shape[2]
    for p in range(panels.shape[0]):
        panel, columns = panels[p], out[:, p * width :]
        n = 0
        while n + _BLOCK_ROWS <= rows:
            for first in range(n, n + _BLOCK_ROWS, TILE_ROWS):
                _largest(a[first:], panel, start, p, columns[first:])
            n += _BLOCK_ROWS
        while n + 4 <= rows:
            _four(a[n:], panel, start, p, columns[n:])
            n += 4
        if n + 1 < rows:
            _two(a[n:], panel, start, p, columns[n:])
            n += 2
        if n < rows:
            _one(a[n:], panel, start, p, columns[n:])


@inlined
def add_transposed(a: Any, panel: Any, out: Any) -> None:
    """Add a.T @ panel to the leading columns of `out`, summed over the rows of `a` in order.

    `a` is (K, N), `panel` (K, width) and `out` (N, columns); the rows of `a` and `out` may have any
    stride.
    """
    rows = a.shape[1]
    full = rows // TILE_ROWS * TILE_ROWS
    for n in range(0, full, TILE_ROWS):
        _largest_transposed(a[:, n:], panel, out[n:])
    for n in range(full, rows):
        _one_transposed(a[:, n:], panel, out[n:])
