"""CuPy on NVIDIA GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from .base import Array, Backend, BackendUnavailableError


class CupyBackend(Backend):
    """CuPy on one CUDA device."""

    kind = "cupy"

    def __init__(self, name: str, cupy: Any, device: int) -> None:
        super().__init__(name)
        self.xp = cupy
        self.device = device

    @classmethod
    def open(cls, index: str) -> Backend:
        """CuPy on device `index` (default 0), or `BackendUnavailableError` with the cause."""
        if index and not index.isdecimal():
            raise ValueError(
                f"backend: expected 'cupy' or 'cupy:N' with N >= 0, got 'cupy:{index}'"
            )
        try:
            import cupy
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(
                "backend 'cupy': CuPy is not installed; for CUDA 12 pip install 'xprnn[cuda12]', "
                "for CUDA 13 pip install 'xprnn[cuda13]'"
            ) from error
        except ImportError as error:
            raise BackendUnavailableError(
                f"backend 'cupy': CuPy fails to import: {error}"
            ) from error
        device = int(index or 0)
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except RuntimeError as error:  # no driver, no device, or versions that do not fit
            raise BackendUnavailableError(
                f"backend 'cupy': CuPy {cupy.__version__} finds no usable GPU: {error}"
            ) from error
        if device >= count:
            raise BackendUnavailableError(
                f"backend 'cupy:{device}': there is no such device; this machine has {count}"
            )
        return cls(f"cupy:{device}", cupy, device)

    @classmethod
    def name_of(cls, array: object) -> str | None:
        """The name of the backend that `array` lives on, or None if it is not CuPy's."""
        if type(array).__module__.partition(".")[0] != "cupy" or not hasattr(array, "device"):
            return None
        return f"cupy:{array.device.id}"

    def activate(self) -> AbstractContextManager[Any]:
        """A context in which this device is the current one."""
        device: AbstractContextManager[Any] = self.xp.cuda.Device(self.device)
        return device

    def stream(self) -> int:
        """The current CUDA stream."""
        return int(self.xp.cuda.get_current_stream().ptr)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.xp.cuda.Device(self.device).synchronize()

    def from_host(self, array: np.ndarray) -> Array:
        """A copy of a NumPy array on this device."""
        with self.activate():
            return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy of a device array on the host; waits for it."""
        host: np.ndarray = array.get()
        return host

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Zeros (size,); CuPy's allocations stand on 256 bytes or more."""
        with self.activate():
            return self.xp.zeros(size, dtype)

    def set_writable(self, array: Array, writable: bool) -> None:
        """CuPy has no read-only arrays."""
