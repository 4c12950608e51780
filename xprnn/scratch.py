"""Scratch memory that calls reuse: taken from a free list, given back when the call is done.

A call, or the record of one, owns the workspace it took until it gives it back, so several
calls and several threads never share one, and in the steady state a call touches no fresh
memory. Only scratch comes from here; what a caller gets is always allocated for him. On a GPU
the lists, one for each stream, are all the memory that is held back from CuPy's allocator.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .backend import ALIGNMENT, Array, Backend

PATIENCE = 8  # small calls one after the other before a large buffer is dropped


class Workspace:
    """A stack of uninitialised arrays, cut from one buffer that follows the demand.

    They are of one dtype, or of a narrower one where that is asked for.
    """

    def __init__(self, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._backend = backend
        self.dtype = dtype
        self._grain = ALIGNMENT // dtype.itemsize
        self._buffer = backend.xp.empty(0, dtype)
        self._size = 0
        self._used = 0
        self._peak = 0
        self._idle = 0

    def empty(self, *shape: int, dtype: np.dtype[Any] | None = None) -> Array:
        """An uninitialised C-contiguous array; its owner is whoever holds the workspace."""
        if dtype is not None and dtype is not self.dtype and dtype != self.dtype:
            size, ratio = prod(shape), self.dtype.itemsize // dtype.itemsize
            return self.empty(-(-size // ratio)).view(dtype)[:size].reshape(shape)
        size, start = prod(shape), self._used
        self._used = end = start + -(-size // self._grain) * self._grain
        if end > self._peak:
            self._peak = end
        if end > self._buffer.size:
            return self._backend.xp.empty(shape, self.dtype)
        return self._buffer[start : start + size].reshape(shape)

    def mark(self) -> int:
        """Where the stack ends now, for `rewind`."""
        return self._used

    def rewind(self, mark: int) -> None:
        """Take back all arrays that were cut since `mark`."""
        self._used = mark

    def reset(self) -> None:
        """Take back all arrays; a buffer that was too small or mostly idle is dropped.

        It shrinks only when most of it lay idle several times, so that calls of different sizes,
        a forward and a backward pass, can take turns.
        """
        size = self._buffer.shape[0]
        self._idle = self._idle + 1 if self._peak < size // 8 else 0
        if self._peak > size or self._idle == PATIENCE:
            self._size = self._peak
            self._buffer = self._backend.xp.empty(0, self.dtype)
        self._used = self._peak = 0

    def prepare(self) -> None:
        """Get a buffer as large as was needed the last time: before a call, where it may fail."""
        if self._buffer.shape[0] < self._size:
            self._buffer = self._backend.zeros_aligned(self._size, self.dtype)


class FreeList:
    """Workspaces not in use, of one backend and dtype; safe to use from several threads."""

    def __init__(self, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._backend = backend
        self._dtype = dtype
        self._free: dict[int, list[Workspace]] = {}

    def take(self) -> Workspace:
        """A workspace nobody else holds, last used on the current stream if ever."""
        free = self._free.setdefault(self._backend.stream(), [])
        try:
            workspace = free.pop()
        except IndexError:
            return Workspace(self._backend, self._dtype)
        workspace.prepare()
        return workspace

    def give(self, workspace: Workspace) -> None:
        """Put a workspace back; none of its arrays may be in use any more."""
        workspace.reset()
        self._free.setdefault(self._backend.stream(), []).append(workspace)
