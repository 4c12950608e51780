"""A sum over rows with smaller rounding errors than the obvious one."""

from __future__ import annotations

from typing import Any

from ..backend import Array

_BLOCK = 256  # rows that are summed sequentially


def sum_rows(xp: Any, a: Array, out: Array) -> None:
    """Write the sum over rows of a (S, F), any strides, to `out` (F,), in the dtype of `out`.

    In a sequential sum the rounding error grows with S; here blocks are summed, then their sums.
    """
    while a.shape[0] > _BLOCK:
        end = a.shape[0] // _BLOCK * _BLOCK
        sums = a[:end].reshape(-1, _BLOCK, a.shape[1]).sum(axis=1, dtype=out.dtype)
        a = xp.concatenate([sums, a[end:].astype(out.dtype, copy=False)], axis=0)
    xp.sum(a, axis=0, dtype=out.dtype, out=out)
