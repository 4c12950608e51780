"""Random masks of cells: those of `core/dropout.py`, drawn by compiled code."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from ...backend import Array
from ...core import dropout
from .jit import compile_for, number_of, row, written

_FEATURE = np.uint32(dropout.FEATURE)
_SHIFTS = tuple(np.uint32(shift) for shift, _ in dropout.FINALISER)
_FACTORS = tuple(np.uint32(factor) for _, factor in dropout.FINALISER)


def keep(
    xp: Any,
    rate: float,
    key: tuple[int, ...],
    at: tuple[Array, Array],
    width: int,
    dtype: np.dtype[Any],
) -> Array:
    """The mask of `dropout.keep`, bit for bit."""
    mask = np.empty((len(at[0]), width), dtype)
    low, high = dropout.row_keys(xp, key, *at)
    compiled(np.dtype(dtype))(low, high, dropout.threshold(rate), mask)
    return mask


@cache
def compiled(dtype: np.dtype[Any]) -> Any:
    """The compiled `draw_mask`."""
    keys = written(types.uint32, 1)
    return compile_for(draw_mask, (keys, keys, types.uint32, written(number_of(dtype), 2)))


def draw_mask(
    low: Any,  # in, (S,), uint32: the first key of each row
    high: Any,  # in, (S,), uint32: the second one
    threshold: Any,  # in: the least hash of an element that is kept
    mask: Any,  # out, (S, H): 0 or 1
) -> None:
    """Draw the elements of all rows."""
    for s in range(mask.shape[0]):
        _draw_row(low[s], high[s], threshold, mask[s])


@row
def _draw_row(low: Any, high: Any, threshold: Any, mask_row: Any) -> None:
    for j in range(mask_row.size):
        h = low ^ np.uint32(np.uint32(j) * _FEATURE)  # a product of uint32 is a uint64 in Numba
        h = np.uint32(np.uint32(h ^ (h >> _SHIFTS[0])) * _FACTORS[0])
        h = np.uint32(np.uint32(h ^ (h >> _SHIFTS[1])) * _FACTORS[1])
        h = np.uint32(h ^ (h >> _SHIFTS[2])) ^ high
        mask_row[j] = 1.0 if h >= threshold else 0.0
