"""The attributes of modules and steppers: those that are only read, and those that users set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any


def read_only(name: str, doc: str, advice: str) -> Any:
    """The property `name`, whose value is in `_name`; to set it raises AttributeError.

    :param advice: what to do instead, the end of the message.
    """

    def refuse(owner: Any, value: Any) -> None:
        raise AttributeError(f"{type(owner).__name__}.{name} cannot be set: {advice}")

    return property(attrgetter(f"_{name}"), refuse, doc=doc)


def option(name: str, doc: str) -> Any:
    """The property `name`: the argument of a module's constructor, fixed from then on.

    To set it to what it is does nothing, as constructors of subclasses do that were torch's.
    """

    def value(module: Any) -> Any:
        return module._options[name]

    def keep(module: Any, given: Any) -> None:
        kind, options = type(module).__name__, module.__dict__.get("_options")
        if options is None:
            raise AttributeError(f"{kind}.{name} cannot be set: super().__init__(...) comes first")
        if given != options[name]:
            raise AttributeError(
                f"{kind}.{name} cannot be set to {given!r}: it is fixed at {options[name]!r} when "
                "the module is built; build another one"
            )

    return property(value, keep, doc=doc)


class Options(dict[str, Any]):
    """The options of a module, JSON values: they cannot be changed, a copy of them is a dict."""

    def _refuse(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("options cannot be changed: a module is fixed when it is built")

    if not TYPE_CHECKING:  # for a type checker a dict: its methods have overloads
        __setitem__ = __delitem__ = __ior__ = _refuse
        clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        """A dict."""
        return dict, (dict(self),)


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
