"""The plain code of a cell on low-precision arrays: upcast, computed, rounded again.

It is the reference of mixed precision on every backend: what a fused kernel does in registers is
done on copies here. A value is rounded exactly where it is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cells import Buffers, Cell


def widened(cell: Cell, dtype: np.dtype[Any]) -> Cell:
    """A cell whose parts compute in `dtype` on low-precision buffers, which its products read."""
    wide = copy.copy(cell)
    wide.kernel_launches = None
    for part in cell.pointwise_ops:
        setattr(wide, part, _part(cell, part, dtype))
    return wide


def _part(cell: Cell, name: str, dtype: np.dtype[Any]) -> Callable[..., None]:
    def run(xp: Any, *buffers: Any) -> None:
        copies: list[tuple[Any, Any]] = []

        def widen(buffer: Any) -> Any:
            if isinstance(buffer, Buffers):
                return Buffers(*[widen(item) for item in buffer])
            if isinstance(buffer, tuple):
                return tuple([widen(item) for item in buffer])
            if buffer is None or buffer.dtype == dtype:
                return buffer
            copies.append((buffer, buffer.astype(dtype)))
            return copies[-1][1]

        getattr(cell, name)(xp, *[widen(buffer) for buffer in buffers])
        for buffer, wide in copies:  # what was not written is unchanged
            buffer[...] = wide

    return run
