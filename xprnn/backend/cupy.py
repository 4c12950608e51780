"""CuPy on NVIDIA GPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident, local
from typing import Any

import numpy as np

from . import cuda
from .base import Array, Backend
from .cooperative import CooperativeKernels
from .cublas import CudaModule
from .dlpack import MANAGED, ON_CUDA, place_of

PER_THREAD = 2  # cudaStreamPerThread

_log = logging.getLogger("xprnn")


class _Depth(local):
    """How many `activate` blocks this thread is in."""

    value = 0


class CupyBackend(Backend):
    """CuPy on one CUDA device, on whichever CuPy stream and with whichever allocator is current."""

    kind = "cupy"
    kernels = "cuda"
    on_gpu = True

    def __init__(self, name: str, cupy: Any, device: int) -> None:
        super().__init__(name)
        self.xp = cupy
        self.device = device
        self.cooperative = CooperativeKernels(cupy, device)
        self._modules: dict[str, CudaModule] = {}
        self._depth = _Depth()

    @classmethod
    def open(cls, index: str) -> Backend:
        """CuPy on device `index` (default 0), or `BackendUnavailableError` with the cause."""
        if index and not index.isdecimal():
            raise ValueError(
                f"backend: expected 'cupy' or 'cupy:N' with N >= 0, got 'cupy:{index}'"
            )
        device = int(index or 0)
        cupy, advice = cuda.load()
        cuda.check_devices(cupy, device)
        cuda.check_libraries(cupy)
        if advice:
            _log.warning("%s", advice)
        return cls(f"cupy:{device}", cupy, device)

    @classmethod
    def name_of(cls, array: object) -> str | None:
        """The name of the backend that `array` lives on, or None if it is not CuPy's."""
        if type(array).__module__.partition(".")[0] != "cupy" or not hasattr(array, "device"):
            return None
        return f"cupy:{array.device.id}"

    def adopt(self, array: Any) -> Array | None:
        """`array` itself, or a view of the memory on this device that another library lends.

        What was put on the library's current stream is done before what comes on CuPy's; the
        protocol sees to that on the device. The memory stays while the view does.

        :raises BufferError: the library does not lend it, such as torch a tensor with a gradient.
        :raises RuntimeError: the current stream is being captured.
        """
        if self.owns(array):
            return array
        place = place_of(array)
        if place is None or place[0] not in ON_CUDA:
            return None
        if place[0] != MANAGED and place[1] != self.device:
            return None
        with self.activate():
            lent = self.xp.from_dlpack(array)
        return lent if self.owns(lent) else None

    @contextmanager
    def activate(self) -> Iterator[None]:
        """A context in which this device is the current one.

        :raises RuntimeError: the current stream is being captured, at entry.
        :raises KernelStoppedError: a kernel launched before gave up, at entry of the outermost
            such block: an operation that has begun goes on.
        """
        with self.xp.cuda.Device(self.device):
            if self._capturing():
                raise RuntimeError(
                    f"backend {self.name!r}: the current stream is being captured, and CuPy cannot "
                    "capture cuBLAS; nothing has been done. Call xprnn outside of the capture"
                )
            self._report()
            self._depth.value += 1
            try:
                yield
            finally:
                self._depth.value -= 1

    def _report(self) -> None:
        """Raise for a kernel that gave up, outside of every `activate` block."""
        if not self._depth.value:
            self.cooperative.check()

    def _capturing(self) -> bool:
        """Whether the current stream is being captured, or cannot be asked for another one is."""
        try:
            return bool(self.xp.cuda.get_current_stream().is_capturing())
        except RuntimeError as error:
            if "StreamCapture" not in str(error):
                raise
            return True

    def module(self, precision: str, narrow: bool) -> Any:
        """CuPy, with products of cuBLAS's own: wide or narrow, and as precise as is asked for."""
        if precision not in self._modules:
            self._modules[precision] = CudaModule(self.xp, precision)
        return self._modules[precision]

    def stream(self) -> int:
        """The current CUDA stream; each thread's own default stream has one address for all."""
        pointer = int(self.xp.cuda.get_current_stream().ptr)
        return -get_ident() if pointer == PER_THREAD else pointer

    def synchronize(self) -> None:
        """Wait for the device.

        :raises KernelStoppedError: a kernel gave up.
        """
        with self.activate():
            self.xp.cuda.Device(self.device).synchronize()
        self._report()

    def from_host(self, array: np.ndarray) -> Array:
        """A copy of a NumPy array on this device; the array may be changed at once.

        CuPy would copy page-locked memory later, without waiting; so it gets a copy of that.
        """
        with self.activate():
            return self.xp.asarray(np.array(array) if self._page_locked(array) else array)

    def _page_locked(self, array: np.ndarray) -> bool:
        """Whether the device reads the array's memory by itself."""
        runtime = self.xp.cuda.runtime
        kind = runtime.pointerGetAttributes(array.ctypes.data).type
        return bool(kind == runtime.memoryTypeHost)

    def converted(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """As NumPy's, on this device."""
        with self.activate():
            return super().converted(array, dtype)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy of a device array on the host; waits for it, raises as `synchronize`."""
        with self.activate():
            host: np.ndarray = array.get()
        self._report()
        return host

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Zeros (size,); CuPy's allocations stand on 256 bytes or more."""
        with self.activate():
            return self.xp.zeros(size, dtype)

    def set_writable(self, array: Array, writable: bool) -> None:
        """CuPy has no read-only arrays."""

    def describe(self) -> str:
        """The GPU's name, its compute capability and its memory."""
        facts = self.xp.cuda.runtime.getDeviceProperties(self.device)
        name = facts["name"].decode() if isinstance(facts["name"], bytes) else facts["name"]
        memory = facts["totalGlobalMem"] / 2**30
        return f"{name}, compute capability {facts['major']}.{facts['minor']}, {memory:.0f} GiB"
