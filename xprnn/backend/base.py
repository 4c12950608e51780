"""What a backend is, and NumPy on the CPU, which is the plainest one."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np

from ..floating_point import environment
from .arrays import Array, BackendName
from .exports import exported_from

ALIGNMENT = 64  # bytes: one cache line, and enough for every vector load


class WideProducts:
    """An array module whose products take narrow operands: widened, multiplied, rounded once."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        """Everything else is the module's own."""
        return getattr(self._xp, name)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Write a @ b to `out`; a and b of one narrow dtype, `out` of that or float32."""
        out[...] = self._xp.matmul(a.astype(np.float32), b.astype(np.float32))


@exported_from("xprnn")
class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot be used; the message says why."""


class Backend:
    """An array module and a device; the base of every backend.

    `name` is what a user writes ("numpy", "cupy:0"), `xp` the array module. A concrete
    backend overrides what differs from NumPy on the CPU.
    """

    kind = "numpy"
    xp: Any = np
    kernels = "numba"  # the family of fused kernels that run here, a folder of `xprnn/kernels`
    on_gpu = False  # where every array operation is a launch

    name: BackendName

    def __init__(self, name: str) -> None:
        self.name = cast("BackendName", name)

    @classmethod
    def open(cls, index: str) -> Backend:
        """The backend on device `index` (text after the colon, may be empty)."""
        if index:
            raise ValueError(f"backend: 'numpy' has no devices; got 'numpy:{index}'")
        return cls("numpy")

    @classmethod
    def name_of(cls, array: object) -> str | None:
        """The name of the backend that `array` lives on, or None if it is not of this kind."""
        return "numpy" if isinstance(array, np.ndarray) else None

    def owns(self, array: object) -> bool:
        """Whether `array` is one of this backend's arrays, on its device."""
        return self.name_of(array) == self.name

    def module(self, precision: str, narrow: bool) -> Any:
        """The array module for equations: `xp`, with products as precise as the layer asks for.

        NumPy's float32 products are exact enough for any `precision`; `narrow` operands are
        widened.
        """
        return WideProducts(self.xp) if narrow else self.xp

    def adopt(self, array: Any) -> Array | None:
        """`array` itself if it is this backend's, or its memory on loan; None if neither can be."""
        return array if self.owns(array) else None

    def activate(self) -> AbstractContextManager[Any]:
        """A context in which new arrays are made on this backend's device.

        Every operation begins by entering it, before anything is changed. On a CPU it is the
        floating-point environment of a call, of the thread that enters it.
        """
        return environment()

    def stream(self) -> int:
        """What identifies the queue that work is put on now; scratch is reused within one."""
        return 0

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def from_host(self, array: Array) -> Array:
        """A copy of a NumPy array on this backend."""
        return np.array(array)

    def converted(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """One of this backend's arrays in another dtype: a copy, or itself where it has that."""
        return array.astype(dtype, copy=False)

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of one of this backend's arrays; may share memory."""
        return np.asarray(array)

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Zeros (size,) whose first element stands on an `ALIGNMENT` boundary."""
        raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size * dtype.itemsize].view(dtype)

    def set_writable(self, array: Array, writable: bool) -> None:
        """Let an array and the buffer it looks into be written or not, where that exists."""
        if writable and isinstance(array.base, np.ndarray):
            array.base.flags.writeable = True
        array.flags.writeable = writable
        if not writable and isinstance(array.base, np.ndarray):
            array.base.flags.writeable = False

    def describe(self) -> str:
        """What computes here, for people."""
        return f"{platform.machine()} {platform.system()}"

    def __repr__(self) -> str:
        """The backend's name."""
        return f"<backend {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by name: a backend is a place, not data."""
        from . import get_backend

        return get_backend, (self.name,)
