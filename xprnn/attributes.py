"""The attributes of modules and steppers: those that are only read, and those that users set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any


def read_only(name: str, doc: str, advice: str) -> Any:
    """The property `name`, whose value is in `_name`; to set it raises AttributeError.

    :param advice: what to do instead, the end of the message.
    """
    return property(attrgetter(f"_{name}"), _refusing(name, advice), doc=doc)


def option(name: str, doc: str) -> Any:
    """The property `name`: the argument of a module's constructor, fixed from then on."""

    def value(module: Any) -> Any:
        return module._options[name]

    advice = "it is fixed when the module is built; build another one"
    return property(value, _refusing(name, advice), doc=doc)


def _refusing(name: str, advice: str) -> Callable[[Any, Any], None]:
    def refuse(owner: Any, value: Any) -> None:
        raise AttributeError(f"{type(owner).__name__}.{name} cannot be set: {advice}")

    return refuse


@contextmanager
def setting_own(thing: Any) -> Iterator[None]:
    """Note in `thing._own` the names of the attributes set in the block: no user has set them."""
    before = thing.__dict__.keys() - thing._own
    yield
    thing._own = frozenset({"_own"} | thing.__dict__.keys() - before)


def set_by_users(thing: Any) -> dict[str, dict[str, Any]]:
    """The `attributes` of `thing` that are not its own, and what it has in `slots`."""
    state = object.__getstate__(thing)
    plain, slots = state if isinstance(state, tuple) else (state, {})
    found = {name: value for name, value in plain.items() if name not in thing._own}
    return {"attributes": found, "slots": slots}


def set_again(thing: Any, state: Mapping[str, Any]) -> None:
    """Set what `set_by_users` gave, and what else a user's `__getstate__` has put beside it."""
    found = dict(state)
    slots = found.pop("slots", {})  # a state of xprnn 0.1.0 has neither
    thing.__dict__.update(found.pop("attributes", {}) | found)
    for name, value in slots.items():
        setattr(thing, name, value)
