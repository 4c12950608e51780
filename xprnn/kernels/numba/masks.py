"""Random masks of cells: those of `core/dropout.py`, drawn by compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from ...backend import Array
from ...core import dropout
from ...core.workspace import Workspace
from .jit import compile_for, inlined, number_of, row, written

_FEATURE = np.uint32(dropout.FEATURE)
_SHIFTS = tuple(np.uint32(shift) for shift, _ in dropout.FINALISER)
_FACTORS = tuple(np.uint32(factor) for _, factor in dropout.FINALISER)
_GOLDEN = np.uint64(dropout.GOLDEN)
_ROW_SHIFTS = tuple(np.uint64(shift) for shift, _ in dropout.ROW_FINALISER)
_ROW_FACTORS = tuple(np.uint64(factor) for _, factor in dropout.ROW_FINALISER)
_HALF = np.uint64(32)


def keep(
    scratch: Workspace,
    xp: Any,
    rate: float,
    key: tuple[int, ...],
    at: tuple[Array, Array],
    width: int,
    dtype: np.dtype[Any],
) -> Array:
    """The mask of `dropout.keep`, bit for bit, in memory of `scratch`."""
    time, rows = (np.ascontiguousarray(each, np.int64) for each in at)
    mask = scratch.empty(len(time), width, dtype=dtype)
    root = np.uint64(dropout.root_of(key))
    compiled(np.dtype(dtype))(time, rows, root, np.uint32(dropout.threshold(rate)), mask)
    return mask


@cache
def compiled(dtype: np.dtype[Any]) -> Any:
    """The compiled `draw_mask`."""
    indices = written(types.int64, 1)
    mask = written(number_of(dtype), 2)
    return compile_for(draw_mask, (indices, indices, types.uint64, types.uint32, mask))


def draw_mask(
    time: Any,  # in, (S,): the step of each row
    rows: Any,  # in, (S,): the caller's row
    root: Any,  # in: the hash of the key
    threshold: Any,  # in: the least hash of an element that is kept
    mask: Any,  # out, (S, H): 0 or 1
) -> None:
    """Draw the elements of all rows."""
    for s in range(mask.shape[0]):
        h = _mix(np.uint64(time[s]) * _GOLDEN + root)
        h = _mix(h ^ (np.uint64(rows[s]) * _GOLDEN))
        _draw_row(np.uint32(h), np.uint32(h >> _HALF), threshold, mask[s])


@inlined
def _mix(h: Any) -> Any:
    h = (h ^ (h >> _ROW_SHIFTS[0])) * _ROW_FACTORS[0]
    h = (h ^ (h >> _ROW_SHIFTS[1])) * _ROW_FACTORS[1]
    return (h ^ (h >> _ROW_SHIFTS[2])) * _ROW_FACTORS[2]


@row
def _draw_row(low: Any, high: Any, threshold: Any, mask_row: Any) -> None:
    for j in range(mask_row.size):
        h = low ^ np.uint32(np.uint32(j) * _FEATURE)  # a product of uint32 is a uint64 in Numba
        h = np.uint32(np.uint32(h ^ (h >> _SHIFTS[0])) * _FACTORS[0])
        h = np.uint32(np.uint32(h ^ (h >> _SHIFTS[1])) * _FACTORS[1])
        h = np.uint32(h ^ (h >> _SHIFTS[2])) ^ high
        mask_row[j] = 1.0 if h >= threshold else 0.0
