"""Arrays of another library that exports DLPack, and a fake CuPy that imports them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.fake_cupy.array import FakeArray, FakeCupyBackend, FakeModule
from xprnn.backend import Backend

CPU, CUDA, MANAGED = 1, 2, 13  # DLPack's kinds of device


class ForeignArray:
    """A tensor of another library, accessible only by DLPack."""

    def __init__(self, array: np.ndarray, kind: int = CUDA, number: int = 0) -> None:
        self.memory = array
        self.device = kind, number
        self.ndim, self.shape = array.ndim, array.shape
        self.dtype = f"other.{array.dtype}"  # a type of that library
        self.streams: list[int] = []  # of the imports

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int, **_: Any) -> np.ndarray:
        self.streams.append(stream)
        return self.memory

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("this tensor is not on the host")


class UnexportableArray(ForeignArray):
    """An array whose export raises an error."""

    def __init__(self, array: np.ndarray, error: Exception, requires_grad: bool = False) -> None:
        super().__init__(array)
        self.error, self.requires_grad = error, requires_grad

    def __dlpack__(self, *, stream: int, **_: Any) -> np.ndarray:
        raise self.error


class DlpackModule(FakeModule):
    """The fake module `cupy` with `from_dlpack`."""

    def from_dlpack(self, array: Any) -> FakeArray:
        stream = self.cuda.get_current_stream().ptr or 1  # DLPack's number of the null stream
        return FakeArray(array.__dlpack__(stream=stream, max_version=(1, 0), copy=None))


class DlpackBackend(FakeCupyBackend):
    """The backend "cupy:0", with the fake CuPy."""

    kind = "cupy"

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls("cupy:0", DlpackModule(), 0)

    @classmethod
    def name_of(cls, array: object) -> str | None:
        return "cupy:0" if isinstance(array, FakeArray) else None
