"""Which array module, on which device: NumPy on the CPU, CuPy on NVIDIA GPUs.

A `Backend` is an array module `xp` together with a device. Everything above this file
writes its equations against `xp` and asks a backend only to allocate, to move and to
wait. To add a backend: one class here and one line in `BACKENDS`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # an array of whichever module serves: numpy.ndarray, cupy.ndarray

ALIGNMENT = 64  # bytes: one cache line, and enough for every vector load
ENVIRONMENT_VARIABLE = "XPRNN_BACKEND"

_log = logging.getLogger("xprnn")
_context: ContextVar[str | None] = ContextVar("xprnn_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot be used; the message says why."""


class Backend:
    """An array module and a device; the base of every backend.

    `name` is what a user writes ("numpy", "cupy:0"), `xp` the array module. A concrete
    backend overrides what differs from NumPy on the CPU.
    """

    kind = "numpy"
    xp: Any = np

    def __init__(self, name: str) -> None:
        self.name = name

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

    def activate(self) -> AbstractContextManager[Any]:
        """A context in which new arrays are made on this backend's device."""
        return nullcontext()

    def stream(self) -> int:
        """What identifies the queue that work is put on now; scratch is reused within one."""
        return 0

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def from_host(self, array: np.ndarray) -> Array:
        """A copy of a NumPy array on this backend."""
        return np.array(array)

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

    def __repr__(self) -> str:
        """The backend's name."""
        return f"<backend {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy by name: a backend is a place, not data."""
        return get_backend, (self.name,)


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


BACKENDS: dict[str, type[Backend]] = {"numpy": Backend, "cupy": CupyBackend}


@cache
def _open(name: str) -> Backend:
    kind, colon, index = name.partition(":")
    if kind not in BACKENDS or (colon and not index):
        raise ValueError(
            f"backend: expected 'numpy', 'cupy', 'cupy:N' or 'auto', got {name!r} (an argument, "
            f"use_backend or {ENVIRONMENT_VARIABLE} said so)"
        )
    return BACKENDS[kind].open(index)


@cache
def _auto() -> Backend:
    try:
        chosen = _open("cupy")
    except BackendUnavailableError as error:
        chosen = _open("numpy")
        _log.warning("backend 'auto' chose numpy: %s", error)  # once a process
    return chosen


def get_backend(name: str | None = None) -> Backend:
    """The backend that a name stands for, or the one in force where none is given.

    The name is looked for in this order: the argument, `with use_backend(...)`, the
    environment variable `XPRNN_BACKEND` (empty means not given), "numpy".

    :param name: "numpy", "cupy", "cupy:N" or "auto"; None means not given.
    :raises ValueError: the name is none of these.
    :raises BackendUnavailableError: the backend cannot be used; only "auto" falls back,
        and logs what it chose and why.

    >>> get_backend("numpy").name
    'numpy'
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected a string or None, got {type(name).__name__}")
    if name is None:
        name = _context.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"
    return _auto() if name == "auto" else _open(name)


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Make `name` the backend of all layers built inside the block without one of their own.

    :param name: as for `get_backend`.
    :raises ValueError, BackendUnavailableError: at entry, as `get_backend`.

    >>> with use_backend("numpy") as backend:
    ...     backend.name
    'numpy'
    """
    backend = get_backend(name)
    token = _context.set(backend.name)
    try:
        yield backend
    finally:
        _context.reset(token)


def backend_of(array: object) -> Backend | None:
    """The backend that an array lives on, or None if it is no backend's array."""
    for kind in BACKENDS.values():
        name = kind.name_of(array)
        if name is not None:
            return _open(name)
    return None


def to_numpy(value: Any) -> np.ndarray:
    """The values of an array of any library as a NumPy array; moves them if they are elsewhere.

    :param value: NumPy, CuPy or torch array of any shape, or nested numbers.
    :return: the values in the same shape and dtype; a NumPy array is returned as it is.
    :raises TypeError: the array has a mask.

    >>> to_numpy([1.0, 2.0])
    array([1., 2.])
    """
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError("value: expected an array without a mask; convert it with .filled(0.0)")
    home = backend_of(value)
    if home is not None:
        return home.to_host(value)
    if type(value).__module__.partition(".")[0] == "torch":
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds its values
            value = value.float()
        value = value.numpy()
    return np.asarray(value)


def asarray(value: Any, *, backend: str | None = None, dtype: Any = None) -> Array:
    """The values of any array on a backend, in a dtype: the one explicit way across.

    :param value: NumPy, CuPy or torch array of any shape, or nested numbers.
    :param backend: where to; as for `get_backend`.
    :param dtype: "float32", "float64" or any NumPy dtype; None keeps the value's own.
    :return: `value` itself where nothing has to change, a converted copy otherwise.
    :raises ValueError, BackendUnavailableError: as `get_backend`.

    >>> asarray([[1, 2]], dtype="float32")
    array([[1., 2.]], dtype=float32)
    """
    target = get_backend(backend)
    if target.owns(value) and not isinstance(value, (np.ma.MaskedArray, np.matrix)):
        wanted = value.dtype if dtype is None else np.dtype(dtype)
        with target.activate():
            return value.astype(wanted, copy=False)
    return target.from_host(np.asarray(to_numpy(value), dtype))
