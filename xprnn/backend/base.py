"""The base class of backends, which is also the NumPy backend."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import numpy as np

from .arrays import Array, BackendName
from .exports import exported_from
from .floating_point import environment

ALIGNMENT = 64  # bytes: a cache line, and sufficient for all vector loads


class UpcastProducts:
    """An array module whose products upcast low-precision operands, and round the result once."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        """All other attributes are the module's."""
        return getattr(self._xp, name)

    def matmul(self, a: Array, b: Array, out: Array) -> None:
        """Write a @ b to `out`; a and b have one low-precision dtype, `out` that or float32."""
        out[...] = self._xp.matmul(a.astype(np.float32), b.astype(np.float32))


@exported_from("xprnn")
class BackendUnavailableError(RuntimeError):
    """A backend was requested by name and cannot be used; the message gives the reason."""


class Backend:
    """An array module and a device; the base of all backends.

    `name` is the name that users write ("numpy", "cupy:0"), `xp` the array module. Subclasses
    override what differs from NumPy on the CPU.
    """

    #: What all devices of a kind share: the name without the device's number.
    kind = "numpy"
    #: The array module.
    #:
    #: :meta hide-value:
    xp: Any = np
    kernels = "numba"  # its kernel package, a folder of `xprnn/kernels`
    #: Whether every array operation is a kernel launch.
    on_gpu = False

    #: As users write it: "numpy", "cupy:0".
    name: BackendName
    _by_name: ClassVar[Callable[[BackendName], Backend]]  # `get_backend`, set by registry.py

    def __init__(self, name: str) -> None:
        self.name = cast("BackendName", name)

    @classmethod
    def open(cls, index: str) -> Backend:
        """The backend on device `index` (the text after the colon, possibly empty)."""
        if index:
            raise ValueError(f"backend: 'numpy' has no devices; got 'numpy:{index}'")
        return cls("numpy")

    @classmethod
    def name_of(cls, array: object) -> str | None:
        """The name of the backend that owns `array`, or None if that is not of this kind."""
        return "numpy" if isinstance(array, np.ndarray) else None

    def owns(self, array: object) -> bool:
        """Whether an array is one of this backend's, on its device.

        :param array: any object.
        """
        return self.name_of(array) == self.name

    def module(self, precision: str, mixed: bool) -> Any:
        """The array module of a layer's equations: `xp`, with products of the given precision.

        NumPy's float32 products are full precision, which any `precision` allows; operands of
        `mixed` precision are upcast.
        """
        return UpcastProducts(self.xp) if mixed else self.xp

    def from_dlpack(self, array: Any) -> Array | None:
        """`array` itself if this backend owns it, or a view by DLPack, or None."""
        return array if self.owns(array) else None

    def activate(self) -> AbstractContextManager[Any]:
        """A context in which new arrays are allocated on this backend's device.

        Every operation enters it before it changes anything. On a CPU it sets the floating-point
        environment of a call in the entering thread.
        """
        return environment()

    def new_stream(self) -> AbstractContextManager[Any]:
        """A context in which operations are ordered among themselves only; on a CPU nothing."""
        return nullcontext()

    def stream(self) -> int:
        """An identifier of the current stream; scratch memory is reused within one stream."""
        return 0

    def synchronize(self) -> None:
        """Wait until all work submitted to the device is done."""

    def from_host(self, array: Array) -> Array:
        """A copy of an array on this backend.

        :param array: a NumPy array.
        """
        return np.array(array)

    def astype(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """An array in another dtype: a copy, or itself if it has that dtype.

        :param array: one of this backend's arrays.
        :param dtype: the dtype of the result.
        """
        return array.astype(dtype, copy=False)

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy array with the values of an array; may share its memory.

        :param array: one of this backend's arrays.
        """
        return np.asarray(array)

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Zeros (size,), with the first element on an `ALIGNMENT` boundary."""
        raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size * dtype.itemsize].view(dtype)

    def set_writable(self, array: Array, writable: bool) -> None:
        """Make an array and its base writable or read-only, where the array module supports it."""
        if writable and isinstance(array.base, np.ndarray):
            array.base.flags.writeable = True
        array.flags.writeable = writable
        if not writable and isinstance(array.base, np.ndarray):
            array.base.flags.writeable = False

    def describe(self) -> str:
        """The hardware, as human-readable text."""
        return f"{platform.machine()} {platform.system()}"

    def __repr__(self) -> str:
        """The backend's name."""
        return f"<backend {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by name: a backend is a device, not data."""
        return type(self)._by_name, (self.name,)
