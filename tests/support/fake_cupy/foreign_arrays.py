"""Arrays of another library, lent by DLPack, and a stand-in for CuPy that borrows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.fake_cupy.array import StrictArray, StrictBackend, StrictModule
from xprnn.backend import Backend

CPU, CUDA, MANAGED = 1, 2, 13  # DLPack's kinds of device


class Lent:
    """A tensor of another library: its memory and its place are all that is to be had of it."""

    def __init__(self, array: np.ndarray, kind: int = CUDA, number: int = 0) -> None:
        self.memory = array
        self.place = kind, number
        self.ndim, self.shape = array.ndim, array.shape
        self.dtype = f"other.{array.dtype}"  # a type of the library's own
        self.streams: list[int] = []  # that the borrowers were on

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place

    def __dlpack__(self, *, stream: int, **_: Any) -> np.ndarray:
        self.streams.append(stream)
        return self.memory

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("this tensor is not on the host")


class Unwilling(Lent):
    """One that its library does not lend."""

    def __init__(self, array: np.ndarray, error: Exception, requires_grad: bool = False) -> None:
        super().__init__(array)
        self.error, self.requires_grad = error, requires_grad

    def __dlpack__(self, *, stream: int, **_: Any) -> np.ndarray:
        raise self.error


class BorrowingModule(StrictModule):
    """The stand-in for the module `cupy`, with its `from_dlpack`."""

    def from_dlpack(self, array: Any) -> StrictArray:
        stream = self.cuda.get_current_stream().ptr or 1  # DLPack's number of the null stream
        return StrictArray(array.__dlpack__(stream=stream, max_version=(1, 0), copy=None))


class BorrowingBackend(StrictBackend):
    """The backend "cupy:0", on the stand-in."""

    kind = "cupy"

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls("cupy:0", BorrowingModule(), 0)

    @classmethod
    def name_of(cls, array: object) -> str | None:
        return "cupy:0" if isinstance(array, StrictArray) else None
