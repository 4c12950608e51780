"""The module from which a public name is imported, independent of the file that defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def exported_from(module: str) -> Callable[[T], T]:
    """Make a class or function name `module` as its own: in pickles, messages and documentation."""

    def export(exported: T) -> T:
        exported.__module__ = module
        return exported

    return export
