"""Optional packages: imported where they are used, or an error with the reason.

A broken installation may raise any exception, so every exception is a reason, except those that
are not caused by the package: MemoryError, KeyboardInterrupt and the like propagate.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_failures: dict[str, Exception] = {}  # by module


class OptionalPackageError(ImportError):
    """A package is not installed or fails to import; message and `__cause__` give the reason."""


def load(name: str, install: str = "") -> Any:
    """The module of this name.

    A failed import is not retried in the same process: the parts of the package that were imported
    would hide the cause.

    :param install: the argument of `pip install`; `name` by default.
    :raises OptionalPackageError: it is not installed, or its import raises an exception.
    """
    if name not in _failures:
        try:
            return import_module(name)
        except MemoryError:
            raise
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                advice = f"{name}: not installed; pip install {install or name}"
                raise OptionalPackageError(advice, name=name) from error
            _failures[name] = error.with_traceback(None)
    failure = _failures[name]
    why = f"{name}: fails to import: {reason(failure)}"
    raise OptionalPackageError(why, name=name) from failure


def reason(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
