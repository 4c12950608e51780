"""Products of a few rows with weights packed once: what a step of a sequence multiplies.

A BLAS packs its operands anew in every call, which a step is too short to pay for. Here the
weights stand in panels as wide as a tile, for all steps, and a tile of the result stays in
registers while the sum runs.
"""

from __future__ import annotations

from functools import cache
from math import lcm
from typing import Any

import numpy as np

from .jit import at, inlined
from .tile import REGISTERS, VECTORS, move, tile, tile_transposed, transpose

MOST = REGISTERS.rows  # rows of a tile
_FOURS = lcm(MOST, 4)
_TOGETHER = 16  # rows that are packed at a time: their pages are at hand for the next panel
_most, _four, _two, _one = (tile(rows) for rows in (MOST, 4, 2, 1))
_most_transposed, _one_transposed = (tile_transposed(rows) for rows in (MOST, 1))


@cache
def width_of(dtype: np.dtype[Any]) -> int:
    """The columns of a panel."""
    return VECTORS * REGISTERS.bytes // dtype.itemsize


def panels_of(columns: int, dtype: np.dtype[Any]) -> int:
    """The panels of a matrix; the last one is filled up with zeros."""
    return -(-columns // width_of(dtype))


@inlined
def pack(matrix: Any, panels: Any) -> None:
    """Write a matrix (K, columns) into `panels` (panels, K, width)."""
    K, width = matrix.shape[0], panels.shape[2]
    for k in range(0, K, _TOGETHER):
        rows = slice(k, min(k + _TOGETHER, K))
        for p in range(panels.shape[0]):
            pack_panel(matrix[rows, p * width :], panels[p, rows])


@inlined
def pack_panel(columns: Any, panel: Any) -> None:
    """Write the leading columns of `columns` (K, F) into one panel (K, width)."""
    width = panel.shape[1]
    filled = min(width, columns.shape[1])
    for k in range(panel.shape[0]):
        source, place = columns[k], panel[k]
        if filled == width:
            move(source, place)
        else:
            for j in range(filled):
                place[j] = source[j]
            for j in range(filled, width):
                place[j] = 0.0


@inlined
def pack_transposed(matrix: Any, panels: Any) -> None:
    """Write the transpose of a matrix (columns, K) into `panels` (panels, K, width)."""
    columns, K, width = matrix.shape[0], matrix.shape[1], panels.shape[2]
    lanes = width // VECTORS
    for p in range(panels.shape[0]):
        panel = panels[p]
        for v in range(0, width, lanes):
            first = p * width + v
            whole = K // lanes * lanes if first + lanes <= columns else 0
            for k in range(0, whole, lanes):
                transpose(matrix[first:, k:], panel[k:, v:])
            for j in range(lanes):
                for k in range(whole, K):
                    panel[k, v + j] = matrix[first + j, k] if first + j < columns else 0.0


@inlined
def product(a: Any, panels: Any, start: Any, out: Any) -> None:
    """Write start + a @ panels to `out`; sums begin at `start`, None for zero.

    `a` is (N, K), `panels` (panels, K, width), `start` (panels, width), `out`
    (N, panels * width). Tiles of four rows and more add one k after the other, smaller ones do
    not: what a row gives depends on nothing but whether it is among the last N % 4.
    """
    rows, width = a.shape[0], panels.shape[2]
    for p in range(panels.shape[0]):
        panel, place = panels[p], out[:, p * width :]
        begin = at(start, p)
        n = 0
        while n + _FOURS <= rows:
            for first in range(n, n + _FOURS, MOST):
                _most(a[first:], panel, begin, place[first:])
            n += _FOURS
        while n + 4 <= rows:
            _four(a[n:], panel, begin, place[n:])
            n += 4
        if n + 1 < rows:
            _two(a[n:], panel, begin, place[n:])
            n += 2
        if n < rows:
            _one(a[n:], panel, begin, place[n:])


@inlined
def add_transposed(a: Any, panel: Any, out: Any) -> None:
    """Add a.T @ panel to the leading columns of `out`: a sum over rows, one after the other.

    `a` is (K, N) and `out` (N, columns), their rows may stand apart; `panel` (K, width).
    """
    rows = a.shape[1]
    whole = rows // MOST * MOST
    for n in range(0, whole, MOST):
        _most_transposed(a[:, n:], panel, out[n:])
    for n in range(whole, rows):
        _one_transposed(a[:, n:], panel, out[n:])
