"""Running out of memory: one error that says who asked for how much, and the memory back.

A call that fails leaves its frames in the error's traceback, and these keep its arrays: as long
as somebody holds the error, and an interactive session holds the last one, the memory is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from .backend import Backend, home_of

P = ParamSpec("P")
R = TypeVar("R")

# In what CUDA's, cuBLAS's and other libraries' allocators raise, which are RuntimeErrors
_WORDS = ("out of memory", "ALLOC_FAILED")


class OutOfMemoryError(MemoryError):
    """A MemoryError that names who ran out of memory; its cause is the allocator's error."""


def frees_memory(function: Callable[P, R]) -> Callable[P, R]:
    """Make `function` end with MemoryError, and without its arrays, where memory runs out.

    The error names the module or function, its backend, and what the allocator says: how many
    bytes it was asked for. The traceback ends here: the frames below are dropped.
    """

    @wraps(function)
    def freeing(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            translate(error, function, args)
            raise

    return freeing


def translate(
    error: MemoryError | RuntimeError, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Raise the error of `frees_memory` for one of an allocator; return if it is none."""
    if not isinstance(error, MemoryError) and not any(word in str(error) for word in _WORDS):
        return
    plain = error.with_traceback(None)
    if isinstance(plain, OutOfMemoryError):
        raise plain
    asked = str(plain) or "no memory is left"
    raise OutOfMemoryError(f"{_owner(function, arguments)}: {asked}") from plain


def _owner(function: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Who ran out of memory, and on which backend: that of the first argument that has one."""
    name = f"{function.__module__}.{function.__name__}".partition("._")[0]
    for argument in arguments:
        backend = getattr(argument, "backend", None)
        if isinstance(backend, Backend):
            return f"{type(argument).__name__} on {backend.name}"
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        backend = getattr(first, "backend", None) or home_of(first)
        if backend is not None:
            return f"{name} on {backend.name}"
    return name
