"""Scratch memory that calls reuse: a pool of workspaces, acquired and released by each call.

A call, or a recorded call, owns its workspace until it releases it, so calls and threads never
share one, and in the steady state a call allocates no scratch memory. Results are always newly
allocated, outside of the pool. On a GPU the pool, with a list for each stream, is the only
memory that is not returned to CuPy's allocator.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ..backend import ALIGNMENT, Array, Backend

MAX_IDLE = 8  # consecutive small calls before a large buffer is dropped


class Workspace:
    """A stack of uninitialised arrays in one buffer, whose size follows the demand.

    The arrays have the workspace's dtype, or a smaller one passed to `empty`.
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
        self.is_small: bool = False  # whether the last use needed more
        self.captures: Any = None  # `Captures` of engine/replay.py, in separate memory

    def aligned(self, size: int) -> Array:
        """New memory for `captures`, aligned."""
        return self._backend.zeros_aligned(size, self.dtype)

    def empty(self, *shape: int, dtype: np.dtype[Any] | None = None) -> Array:
        """An uninitialised C-contiguous array, valid until `rewind` or `reset`."""
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

    def arrays(self, *shapes: tuple[int, int], dtype: np.dtype[Any] | None = None) -> list[Array]:
        """Several uninitialised arrays, as `empty`."""
        if dtype is not None and dtype != self.dtype:
            return [self.empty(*shape, dtype=dtype) for shape in shapes]
        arrays, grain, available = [], self._grain, self._buffer.size
        for shape in shapes:
            size, start = shape[0] * shape[1], self._used
            self._used = end = start + -(-size // grain) * grain
            if end > available:
                arrays.append(self._backend.xp.empty(shape, self.dtype))
            else:
                arrays.append(self._buffer[start : start + size].reshape(shape))
        self._peak = max(self._peak, self._used)
        return arrays

    def mark(self) -> int:
        """The current end of the stack, for `rewind`."""
        return self._used

    def rewind(self, mark: int) -> None:
        """Free all arrays allocated since `mark`."""
        self._used = mark

    def reset(self) -> None:
        """Free all arrays; a buffer that was too small or mostly unused is dropped.

        It shrinks only after most of it was unused several times in a row, so that calls of
        different sizes, such as forward and backward passes, may alternate.
        """
        size = self._buffer.shape[0]
        self._idle = self._idle + 1 if self._peak < size // 8 else 0
        if self._peak > size or self._idle == MAX_IDLE:
            if self._idle == MAX_IDLE:
                self.captures = None
            self._size = self._peak
            self._buffer = self._backend.xp.empty(0, self.dtype)
        self._used = self._peak = 0
        self.is_small = self._buffer.shape[0] < self._size

    def prepare(self) -> None:
        """Allocate a buffer of the size last needed: before a call, where failing is safe."""
        self._buffer = self._backend.zeros_aligned(self._size, self.dtype)
        self.is_small = False


class WorkspacePool:
    """Unused workspaces of one backend and dtype; safe to use from several threads."""

    def __init__(self, backend: Backend, dtype: np.dtype[Any]) -> None:
        self._backend = backend
        self._dtype = dtype
        self._free: dict[int, list[Workspace]] = {}

    def acquire(self) -> Workspace:
        """An unused workspace, either new or last used on the current stream."""
        # a CPU has one stream, and a query takes time
        stream = self._backend.stream() if self._backend.on_gpu else 0
        free = self._free.setdefault(stream, [])
        try:
            workspace = free.pop()
        except IndexError:
            return Workspace(self._backend, self._dtype)
        if workspace.is_small:
            workspace.prepare()
        return workspace

    def release(self, workspace: Workspace) -> None:
        """Return a workspace to the pool; its arrays must not be used any more."""
        workspace.reset()
        stream = self._backend.stream() if self._backend.on_gpu else 0
        self._free.setdefault(stream, []).append(workspace)
