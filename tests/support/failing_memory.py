"""Memory whose k-th allocation fails, and which reports the bytes in use."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.support.fake_cupy import array as fake_array
from tests.support.fake_cupy.cuda import LOG
from xprnn.backend import Backend


class FakeMemory:
    """The memory of the fake CuPy."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = backend
        self._arrays: list[weakref.ref[np.ndarray]] = []
        new = fake_array._new

        def new_and_recorded(array: np.ndarray) -> Any:
            wrapped = new(array)
            self._arrays.append(weakref.ref(array))
            return wrapped

        monkeypatch.setattr(fake_array, "_new", new_and_recorded)

    @contextmanager
    def failing(self, k: int) -> Iterator[None]:
        """Let the k-th allocation inside the block fail."""
        LOG.fail_allocation(k)
        try:
            yield
        finally:
            LOG.fail_allocation(None)

    def held(self) -> int:
        """The bytes of the arrays that are alive."""
        return sum(array.nbytes for ref in self._arrays if (array := ref()) is not None)


class CupyMemory:
    """The memory of a GPU, from the caller's allocator."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._pool = backend.xp.cuda.MemoryPool()
        self.requested: list[int] = []
        self._left = 0

    def __call__(self, size: int) -> Any:
        self.requested.append(size)
        self._left -= bool(size)
        if not self._left and size:
            raise self.backend.xp.cuda.memory.OutOfMemoryError(size, self._pool.used_bytes())
        return self._pool.malloc(size)

    @contextmanager
    def failing(self, k: int) -> Iterator[None]:
        """Let the k-th allocation inside the block fail."""
        self._left = k
        try:
            yield
        finally:
            self._left = 0

    def held(self) -> int:
        """The bytes of the arrays that are alive."""
        return int(self._pool.used_bytes())
