"""The backends by name: which one a layer uses, and transfers between them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arrays import AnyArray, AnyDTypeLike, Array, BackendName
from .base import Backend, BackendUnavailableError
from .cupy import CupyBackend
from .dlpack import ON_CUDA, dlpack_device
from .exports import exported_from

ENVIRONMENT_VARIABLE = "XPRNN_BACKEND"

_log = logging.getLogger("xprnn")
_context: ContextVar[str | None] = ContextVar("xprnn_backend", default=None)

BACKENDS: dict[str, type[Backend]] = {"numpy": Backend, "cupy": CupyBackend}
_opened: dict[str, Backend] = {}  # by requested name; one object per device


def _open(name: str) -> Backend:
    return _opened.get(name) or _open_first(name)


def _open_first(name: str) -> Backend:
    kind, colon, index = name.partition(":")
    if kind not in BACKENDS or (colon and not index):
        raise ValueError(
            f"backend: expected 'numpy', 'cupy', 'cupy:N' or 'auto', got {name!r} (an argument, "
            f"use_backend or {ENVIRONMENT_VARIABLE})"
        )
    opened = BACKENDS[kind].open(index)
    backend = _opened.setdefault(opened.name, opened)  # another thread may have been faster
    _opened[name] = backend
    return backend


@cache
def auto_choice() -> tuple[Backend, str]:
    """The backend that "auto" selects, and why."""
    try:
        backend = _open("cupy")
    except BackendUnavailableError as error:
        return _open("numpy"), str(error)
    return backend, backend.describe()


@cache
def _auto() -> Backend:
    backend, reason = auto_choice()
    level = logging.WARNING if backend.kind == "numpy" else logging.INFO
    _log.log(level, "backend 'auto' chose %s: %s", backend.name, reason)  # once per process
    return backend


@exported_from("xprnn")
def get_backend(name: BackendName | None = None) -> Backend:
    """The backend of this name, or the default backend if there is no name.

    The name is taken from, in this order: the argument, `with use_backend(...)`, the
    environment variable `XPRNN_BACKEND` (unless it is empty), "numpy".

    :param name: "numpy", "cupy", "cupy:N" or "auto"; None: the default. Type checkers know N up
        to 15; for a name made at run time use `typing.cast("xprnn.backend.BackendName", name)`.
    :return: the backend; one object for each device.
    :raises TypeError: the name is not a string.
    :raises ValueError: the name is none of these.
    :raises BackendUnavailableError: the backend cannot be used; only "auto" falls back. It
        logs its choice and the reason to logger "xprnn", as a warning if that is NumPy.

    >>> get_backend("numpy").name
    'numpy'
    """
    wanted = requested_name(name)
    return _auto() if wanted == "auto" else _open(wanted)


def requested_name(name: str | None) -> str:
    """The argument, or the name of the default backend, which is not opened."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend: expected a string or None, got {type(name).__name__}")
    if name is not None:
        return name
    return _context.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"


Backend._by_name = staticmethod(get_backend)


@contextmanager
@exported_from("xprnn")
def use_backend(name: BackendName) -> Iterator[Backend]:
    """Make `name` the default backend of layers that are built inside the block.

    :param name: as for `get_backend`.
    :raises TypeError, ValueError, BackendUnavailableError: at entry, as `get_backend`.

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


@exported_from("xprnn")
def synchronize() -> None:
    """Wait until all work submitted to the devices that this process uses is done.

    A call returns before its results are computed; an error of the device is raised by a later
    call, at the latest by this one. It is raised after all devices are done, with the errors of
    other devices as its notes.

    :raises KernelStoppedError: a kernel timed out; its results are NaN.
    :raises RuntimeError: the current stream is being captured.

    >>> synchronize()
    """
    errors = []
    for backend in dict.fromkeys(_opened.copy().values()):  # other threads may open more
        try:
            backend.synchronize()
        except RuntimeError as error:
            errors.append(error)
    if errors:
        for other in errors[1:]:
            errors[0].add_note(f"{type(other).__name__}: {other}")
        raise errors[0]


def backend_of(array: object) -> Backend | None:
    """The backend of an array, or None if it is not an array of any backend."""
    for kind in BACKENDS.values():
        name = kind.name_of(array)
        if name is not None:
            return _open(name)
    return None


def owning_backend(array: object) -> Backend | None:
    """The backend that uses `array` without a copy: its own, or CuPy for a DLPack import.

    :raises BackendUnavailableError: it is another library's, on a CUDA device that CuPy cannot
        use.
    """
    device = dlpack_device(array)
    if device is None or device[0] not in ON_CUDA:
        return backend_of(array)
    return backend_of(array) or _open(f"cupy:{device[1]}")


@exported_from("xprnn")
def to_numpy(value: ArrayLike | AnyArray) -> np.ndarray:
    """The values of an array of any library as a NumPy array; copies them from a device.

    :param value: NumPy, CuPy or torch array of any shape, or nested numbers.
    :return: the values in the same shape and dtype; a NumPy array is returned unchanged.
    :raises TypeError: the array has a mask.

    >>> to_numpy([1.0, 2.0])
    array([1., 2.])
    """
    array: Any = value
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("value: expected an array without a mask; convert it with .filled(0.0)")
    backend = backend_of(array)
    if backend is not None:
        return backend.to_host(array)
    detached = _detached(array)
    if detached is not array:
        array = detached.cpu()
        if str(array.dtype) == "torch.bfloat16":  # not in NumPy; float32 represents its values
            array = array.float()
        array = array.numpy()
    return np.asarray(array)


@exported_from("xprnn")
def asarray(
    value: ArrayLike | AnyArray,
    *,
    backend: BackendName | None = None,
    dtype: AnyDTypeLike | None = None,
) -> Array:
    """The values of any array on a backend, in a dtype: the explicit transfer between backends.

    Conversions are NumPy's `astype`, with overflow handled as `np.errstate` specifies; a number too
    small for the dtype becomes subnormal or zero without an error.

    :param value: NumPy, CuPy, torch or JAX array of any shape, or nested numbers.
    :param backend: the target; as for `get_backend`.
    :param dtype: "float32", "float64" or any NumPy dtype; None: the dtype of `value`.
    :return: `value` itself if nothing changes; a view of its memory if it belongs to another
        library and is on the backend's CUDA device; a converted copy otherwise.
    :raises ValueError, BackendUnavailableError: as `get_backend`.

    >>> asarray([[1, 2]], dtype="float32")
    array([[1., 2.]], dtype=float32)
    """
    target = get_backend(backend)
    value = _detached(value)
    special = isinstance(value, (np.ma.MaskedArray, np.matrix))
    array = None if special else target.from_dlpack(value)
    with np.errstate(under="ignore"):
        if array is None:
            return target.from_host(np.asarray(to_numpy(value), dtype))
        return target.astype(array, array.dtype if dtype is None else np.dtype(dtype))


def _detached(value: Any) -> Any:
    """A torch tensor detached from torch's graph; anything else unchanged."""
    is_tensor = type(value).__module__.partition(".")[0] == "torch"
    return value.detach() if is_tensor else value
