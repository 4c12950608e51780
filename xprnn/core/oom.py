"""Out-of-memory errors: they name the failed allocation, and do not keep arrays alive.

The traceback of an error references the frames of the failed call, and so their arrays. As long
as the error is referenced (interactive sessions keep the last one) that memory cannot be reused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ..backend import Backend, owning_backend

P = ParamSpec("P")
R = TypeVar("R")

# In the messages of the RuntimeErrors that the allocators of CUDA, cuBLAS and others raise
_MARKERS = ("out of memory", "ALLOC_FAILED")


class OutOfMemoryError(MemoryError):
    """A MemoryError that names the module or function; its cause is the allocator's error."""


def translate_out_of_memory(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` raise OutOfMemoryError, without references to its arrays.

    The error names the module or function and its backend, and quotes the allocator's message:
    the number of bytes requested. The traceback ends here: the frames below are dropped.
    """

    @wraps(function)
    def translating(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            translate(error, function, args)
            raise

    return translating


def translate(
    error: MemoryError | RuntimeError, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Raise the error of `translate_out_of_memory` if `error` is an allocator's, else return."""
    if not isinstance(error, MemoryError) and not any(marker in str(error) for marker in _MARKERS):
        return
    plain = error.with_traceback(None)
    if isinstance(plain, OutOfMemoryError):
        raise plain
    message = str(plain) or "no memory is left"
    raise OutOfMemoryError(f"{_owner(function, arguments)}: {message}") from plain


def _owner(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """The module or function and the backend, that of the first argument that has one."""
    name = f"{function.__module__}.{function.__name__}".partition("._")[0]
    for argument in arguments:
        backend = getattr(argument, "backend", None)
        if isinstance(backend, Backend):
            return f"{type(argument).__name__} on {backend.name}"
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        backend = getattr(first, "backend", None) or owning_backend(first)
        if backend is not None:
            return f"{name} on {backend.name}"
    return name
