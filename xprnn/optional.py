"""Packages that need not be there: imported where they are used, or the reason why they cannot be.

A broken installation may raise anything, so anything counts as a reason, but for what is not the
package's fault: MemoryError, KeyboardInterrupt and the like pass.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_failures: dict[str, Exception] = {}  # by module


class OptionalPackageError(ImportError):
    """A package is not installed, or fails to import; the message says why, `__cause__` is it."""


def load(name: str, install: str = "") -> Any:
    """The module of this name.

    An import that failed is not tried again in the same process: the parts of the package that
    were imported would hide the cause.

    :param install: what `pip install` installs it by; its own name by default.
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
    """An error's kind and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
