"""Which implementation is requested: `use_kernels`, or else the environment variable."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import NamedTuple

from ..backend.exports import exported_from

ENVIRONMENT_VARIABLE = "XPRNN_KERNELS"
IMPLEMENTATIONS = ("reference", "pointwise", "sequence")
# Forces "sequence", and one launch for all layers of a stack.
WAVE = "wave"
CHOICES = ("auto", *IMPLEMENTATIONS, WAVE)


class Request(NamedTuple):
    """The requested implementation, and where it is requested."""

    name: str  # one of `CHOICES`
    source: str  # for messages: "XPRNN_KERNELS=reference", "use_kernels('reference')"


_context: ContextVar[Request | None] = ContextVar("xprnn_kernels", default=None)


def requested() -> Request:
    """The request in force: of `use_kernels`, else of `XPRNN_KERNELS`, else "auto".

    :raises ValueError: `XPRNN_KERNELS` is none of `CHOICES`.
    """
    return _context.get() or _of_environment(os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


def requested_name() -> str:
    """The name of the request in force."""
    return requested().name


@lru_cache(16)
def _of_environment(name: str) -> Request:
    if name not in CHOICES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected {', '.join(CHOICES)}; got {name!r}")
    return Request(name, f"{ENVIRONMENT_VARIABLE}={name}")


@exported_from("xprnn")
@contextmanager
def use_kernels(name: str) -> Iterator[str]:
    """Force an implementation inside the block; other threads and tasks are not affected.

    It precedes the environment variable `XPRNN_KERNELS`, which holds the default.

    :param name: "reference", the plain array code; "pointwise", one kernel for the element-wise
        part of a step; "sequence", one kernel for all steps of a layer; "wave", as "sequence", and
        all layers of a stack in one launch; "auto", the fastest implementation that fits.
    :raises ValueError: at entry, `name` is none of these. A call that the forced implementation
        does not support raises `KernelUnavailableError`.

    >>> import xprnn
    >>> gru = xprnn.GRU(3, 4, seed=0)
    >>> with xprnn.use_kernels("reference"):
    ...     gru.explain((10, 2, 3)).splitlines()[0]
    'GRU(3, 4) on numpy, float32, T=10 N=2: reference'
    """
    if name not in CHOICES:
        raise ValueError(f"name: expected {', '.join(CHOICES)}; got {name!r}")
    token = _context.set(Request(name, f"use_kernels({name!r})"))
    try:
        yield name
    finally:
        _context.reset(token)
