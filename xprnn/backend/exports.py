"""Where a public name is imported from, whichever file holds it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def exported_from(module: str) -> Callable[[T], T]:
    """Make a class or function name `module` as its own: in pickles, messages and documentation."""

    def export(thing: T) -> T:
        thing.__module__ = module
        return thing

    return export
