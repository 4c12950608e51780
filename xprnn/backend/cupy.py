"""CuPy on NVIDIA GPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident, local
from typing import Any, cast

import numpy as np

from . import cuda
from .arrays import Array
from .base import Backend
from .cooperative import CooperativeKernels
from .cublas import CudaModule
from .dlpack import MANAGED, ON_CUDA, dlpack_device

PER_THREAD = 2  # cudaStreamPerThread

_log = logging.getLogger("xprnn")


class _Depth(local):
    """How many `activate` blocks this thread is in."""

    value = 0


class CupyBackend(Backend):
    """CuPy on one CUDA device, with CuPy's current stream and allocator."""

    kind = "cupy"
    kernels = "cuda"
    on_gpu = True

    def __init__(self, name: str, cupy: Any, device: int) -> None:
        super().__init__(name)
        self.xp = cupy
        self.device = device
        self.cooperative: CooperativeKernels = CooperativeKernels(cupy, device)
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
        """The name of the backend that owns `array`, or None if it is not CuPy's."""
        if type(array).__module__.partition(".")[0] != "cupy" or not hasattr(array, "device"):
            return None
        return f"cupy:{array.device.id}"

    def from_dlpack(self, array: Any) -> Array | None:
        """`array` itself, or a view by DLPack of another library's array on this device.

        DLPack orders, on the device, work submitted to the library's current stream before later
        work on CuPy's. The memory lives at least as long as the view.

        :raises BufferError: the library does not export it; torch: a tensor that requires grad.
        :raises RuntimeError: the current stream is being captured.
        """
        if self.owns(array):
            return array
        device = dlpack_device(array)
        if device is None or device[0] not in ON_CUDA:
            return None
        if device[0] != MANAGED and device[1] != self.device:
            return None
        with self.activate():
            view = self.xp.from_dlpack(array)
        return view if self.owns(view) else None

    @contextmanager
    def activate(self) -> Iterator[None]:
        """A context in which this device is the current device.

        :raises RuntimeError: at entry, if the current stream is being captured.
        :raises KernelStoppedError: at entry of the outermost such block, if an earlier kernel
            has timed out; operations in progress continue.
        """
        with self.xp.cuda.Device(self.device):
            if self._capturing():
                raise RuntimeError(
                    f"backend {self.name!r}: the current stream is being captured, and CuPy cannot "
                    "capture cuBLAS; nothing has been done. Call xprnn outside of the capture"
                )
            self._raise_if_timed_out()
            self._depth.value += 1
            try:
                yield
            finally:
                self._depth.value -= 1

    def _raise_if_timed_out(self) -> None:
        """Outside of all `activate` blocks, raise if a kernel has timed out."""
        if not self._depth.value:
            self.cooperative.check()

    def _capturing(self) -> bool:
        """Whether the current stream is being captured, or another capture prevents the query."""
        try:
            return bool(self.xp.cuda.get_current_stream().is_capturing())
        except RuntimeError as error:
            if "StreamCapture" not in str(error):
                raise
            return True

    def module(self, precision: str, mixed: bool) -> Any:
        """CuPy, with products by cuBLAS of the given precision and of any operand dtype."""
        if precision not in self._modules:
            self._modules[precision] = CudaModule(self.xp, precision)
        return self._modules[precision]

    def new_stream(self) -> AbstractContextManager[Any]:
        """A context with a new stream, which does not wait for the default stream."""
        stream: AbstractContextManager[Any] = self.xp.cuda.Stream(non_blocking=True)
        return stream

    def stream(self) -> int:
        """The current CUDA stream; per-thread default streams all have the same address."""
        pointer = int(self.xp.cuda.get_current_stream().ptr)
        return -get_ident() if pointer == PER_THREAD else pointer

    def synchronize(self) -> None:
        """Wait for the device.

        :raises KernelStoppedError: a kernel timed out.
        """
        with self.activate():
            self.xp.cuda.Device(self.device).synchronize()
        self._raise_if_timed_out()

    def from_host(self, array: Array) -> Array:
        """A copy of a NumPy array on this device; the array may be changed at once.

        CuPy copies page-locked memory asynchronously; so a copy of it is passed to CuPy.
        """
        with self.activate():
            return self.xp.asarray(np.array(array) if self._page_locked(array) else array)

    def _page_locked(self, array: Any) -> bool:
        """Whether the array's memory is page-locked, so that the device can read it directly."""
        runtime = self.xp.cuda.runtime
        kind = runtime.pointerGetAttributes(array.ctypes.data).type
        return bool(kind == runtime.memoryTypeHost)

    def astype(self, array: Array, dtype: np.dtype[Any]) -> Array:
        """As NumPy's, on this device."""
        with self.activate():
            return super().astype(array, dtype)

    def to_host(self, array: Array) -> np.ndarray:
        """A copy of a device array on the host; synchronises, and raises as `synchronize`."""
        with self.activate():
            host: np.ndarray = cast("Any", array).get()
        self._raise_if_timed_out()
        return host

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> Array:
        """Zeros (size,); CuPy's allocations are aligned to 256 bytes or more."""
        with self.activate():
            return self.xp.zeros(size, dtype)

    def set_writable(self, array: Array, writable: bool) -> None:
        """CuPy has no read-only arrays."""

    def describe(self) -> str:
        """The GPU's name, its compute capability and its memory."""
        name, capability, memory = self.device_facts()
        return f"{name}, compute capability {capability}, {memory / 2**30:.0f} GiB"

    def device_facts(self) -> tuple[str, str, int]:
        """The GPU's name, its compute capability and its memory in bytes."""
        properties = self.xp.cuda.runtime.getDeviceProperties(self.device)
        name = properties["name"]
        name = name.decode() if isinstance(name, bytes) else name
        capability = f"{properties['major']}.{properties['minor']}"
        return name, capability, properties["totalGlobalMem"]
