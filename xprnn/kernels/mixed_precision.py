"""The plain code of a cell on low-precision arrays: upcast, computed, rounded again.

It is the reference for mixed precision on every backend: it computes on copies what a fused kernel
computes in registers. A value is rounded exactly where it is stored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np

from ..cells import Buffers, Cell


def upcasting(cell: Cell, dtype: np.dtype[Any]) -> Cell:
    """A cell whose pointwise ops, not its products, upcast low-precision buffers to `dtype`."""
    result = copy.copy(cell)
    result.kernel_launches = None
    for name in cell.pointwise_ops:
        setattr(result, name, _upcasting_op(cell, name, dtype))
    return result


def _upcasting_op(cell: Cell, name: str, dtype: np.dtype[Any]) -> Callable[..., None]:
    def run(xp: Any, *buffers: Any) -> None:
        copies: list[tuple[Any, Any]] = []

        def upcast(buffer: Any) -> Any:
            if isinstance(buffer, Buffers):
                return Buffers(*[upcast(item) for item in buffer])
            if isinstance(buffer, tuple):
                return tuple([upcast(item) for item in buffer])
            if buffer is None or buffer.dtype == dtype:
                return buffer
            copies.append((buffer, buffer.astype(dtype)))
            return copies[-1][1]

        getattr(cell, name)(xp, *[upcast(buffer) for buffer in buffers])
        for buffer, computed in copies:  # rounding does not change what was not written
            buffer[...] = computed

    return run
