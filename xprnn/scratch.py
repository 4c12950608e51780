"""Scratch memory that calls reuse: taken from a free list, given back when the call is done.

A call, or the record of one, owns the workspace it took until it gives it back, so several
calls and several threads never share one, and in the steady state a call touches no fresh
memory. Only scratch comes from here; what a caller gets is always allocated for him.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .backend import ALIGNMENT, Array, Backend


class Workspace:
    """A stack of uninitialised arrays of one dtype, cut from one buffer that grows on demand."""

    def __init__(self, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._backend = backend
        self.dtype = dtype
        self._grain = ALIGNMENT // dtype.itemsize
        self._buffer = backend.xp.empty(0, dtype)
        self._used = 0
        self._wanted = 0

    def empty(self, *shape: int) -> Array:
        """An uninitialised C-contiguous array; its owner is whoever holds the workspace."""
        size = 1
        for length in shape:
            size *= length
        start = self._used
        padded = -(-size // self._grain) * self._grain
        self._wanted += padded
        if start + padded > self._buffer.shape[0]:
            return self._backend.xp.empty(shape, self.dtype)
        self._used += padded
        return self._buffer[start : start + size].reshape(shape)

    def reset(self) -> None:
        """Take all arrays back; the buffer grows to what was asked for since the last time."""
        if self._wanted > self._buffer.shape[0]:
            self._buffer = self._backend.zeros_aligned(self._wanted, self.dtype)
        self._used = self._wanted = 0


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
            return free.pop()
        except IndexError:
            return Workspace(self._backend, self._dtype)

    def give(self, workspace: Workspace) -> None:
        """Put a workspace back; none of its arrays may be in use any more."""
        workspace.reset()
        self._free.setdefault(self._backend.stream(), []).append(workspace)
