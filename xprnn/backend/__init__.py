"""Which array module, on which device: NumPy on the CPU, CuPy on NVIDIA GPUs.

A `Backend` is an array module `xp` together with a device. Everything above this folder
writes its equations against `xp` and asks a backend only to allocate, to move and to
wait. To add a backend: one file here and one line in `BACKENDS`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np

from .base import ALIGNMENT, Array, Backend, BackendUnavailableError
from .cooperative import KernelStoppedError
from .cupy import CupyBackend
from .dlpack import ON_CUDA, place_of, whereabouts

ENVIRONMENT_VARIABLE = "XPRNN_BACKEND"

_log = logging.getLogger("xprnn")
_context: ContextVar[str | None] = ContextVar("xprnn_backend", default=None)

BACKENDS: dict[str, type[Backend]] = {"numpy": Backend, "cupy": CupyBackend}
_opened: dict[str, Backend] = {}  # by every name asked for; one object a device


def _open(name: str) -> Backend:
    return _opened.get(name) or _open_first(name)


def _open_first(name: str) -> Backend:
    kind, colon, index = name.partition(":")
    if kind not in BACKENDS or (colon and not index):
        raise ValueError(
            f"backend: expected 'numpy', 'cupy', 'cupy:N' or 'auto', got {name!r} (an argument, "
            f"use_backend or {ENVIRONMENT_VARIABLE} said so)"
        )
    found = BACKENDS[kind].open(index)
    one = _opened.setdefault(found.name, found)  # another thread's, if that was faster
    _opened[name] = one
    return one


@cache
def auto_choice() -> tuple[Backend, str]:
    """The backend that "auto" stands for, and why."""
    try:
        found = _open("cupy")
    except BackendUnavailableError as error:
        return _open("numpy"), str(error)
    return found, found.describe()


@cache
def _auto() -> Backend:
    found, why = auto_choice()
    level = logging.WARNING if found.kind == "numpy" else logging.INFO
    _log.log(level, "backend 'auto' chose %s: %s", found.name, why)  # once a process
    return found


def get_backend(name: str | None = None) -> Backend:
    """The backend that a name stands for, or the one in force where none is given.

    The name is looked for in this order: the argument, `with use_backend(...)`, the
    environment variable `XPRNN_BACKEND` (empty means not given), "numpy".

    :param name: "numpy", "cupy", "cupy:N" or "auto"; None means not given.
    :raises ValueError: the name is none of these.
    :raises BackendUnavailableError: the backend cannot be used; only "auto" falls back. It
        logs what it chose and why, to logger "xprnn": a warning if that is NumPy.

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


def synchronize() -> None:
    """Wait until all work given to the devices that this process uses is done.

    Results are on their way when a call returns; an error of the device shows at a later call,
    and here at the latest. An error is raised when all are done, with those of other devices as
    its notes.

    :raises KernelStoppedError: a kernel gave up; what it computed is NaN.
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
    """The backend that an array lives on, or None if it is no backend's array."""
    for kind in BACKENDS.values():
        name = kind.name_of(array)
        if name is not None:
            return _open(name)
    return None


def home_of(array: object) -> Backend | None:
    """The backend that takes `array` as it is: its own, or CuPy for what another library lends.

    :raises BackendUnavailableError: it is lent on a CUDA device, and CuPy cannot be used.
    """
    place = place_of(array)
    if place is None or place[0] not in ON_CUDA:
        return backend_of(array)
    return backend_of(array) or _open(f"cupy:{place[1]}")


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
    plain = _without_gradient(value)
    if plain is not value:
        value = plain.cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none; float32 holds its values
            value = value.float()
        value = value.numpy()
    return np.asarray(value)


def asarray(value: Any, *, backend: str | None = None, dtype: Any = None) -> Array:
    """The values of any array on a backend, in a dtype: the one explicit way across.

    A conversion is NumPy's `astype`, an overflow what `np.errstate` says of it; a number too small
    for the dtype becomes subnormal or zero without an error.

    :param value: NumPy, CuPy, torch or JAX array of any shape, or nested numbers.
    :param backend: where to; as for `get_backend`.
    :param dtype: "float32", "float64" or any NumPy dtype; None keeps the value's own.
    :return: `value` itself where nothing has to change; a view of its memory where another
        library has it on the backend's CUDA device; a converted copy otherwise.
    :raises ValueError, BackendUnavailableError: as `get_backend`.

    >>> asarray([[1, 2]], dtype="float32")
    array([[1., 2.]], dtype=float32)
    """
    target = get_backend(backend)
    value = _without_gradient(value)
    here = None if isinstance(value, (np.ma.MaskedArray, np.matrix)) else target.adopt(value)
    with np.errstate(under="ignore"):
        if here is None:
            return target.from_host(np.asarray(to_numpy(value), dtype))
        return target.converted(here, here.dtype if dtype is None else np.dtype(dtype))


def _without_gradient(value: Any) -> Any:
    """A torch tensor without what torch records of it; anything else as it is."""
    is_tensor = type(value).__module__.partition(".")[0] == "torch"
    return value.detach() if is_tensor else value


__all__ = [
    "ALIGNMENT",
    "BACKENDS",
    "Array",
    "Backend",
    "BackendUnavailableError",
    "KernelStoppedError",
    "asarray",
    "auto_choice",
    "backend_of",
    "get_backend",
    "home_of",
    "place_of",
    "synchronize",
    "to_numpy",
    "use_backend",
    "whereabouts",
]
