"""Attributes of modules and steppers: read-only ones, and those that users set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any


def read_only(name: str, doc: str, advice: str) -> Any:
    """The property `name` with its value in `_name`; setting it raises AttributeError.

    :param advice: what to do instead, the end of the message.
    """

    def reject(owner: Any, value: Any) -> None:
        raise AttributeError(f"{type(owner).__name__}.{name} cannot be set: {advice}")

    return property(attrgetter(f"_{name}"), reject, doc=doc)


def option(name: str, doc: str, absent: Any = None) -> Any:
    """The property `name`: an argument of a module's constructor, fixed from then on.

    Setting it to its current value does nothing: constructors of subclasses written for torch do.

    :param absent: the value where the options do not contain it, which is the default.
    """

    def get(module: Any) -> Any:
        return module._options.get(name, absent)

    def check_unchanged(module: Any, value: Any) -> None:
        kind, options = type(module).__name__, module.__dict__.get("_options")
        if options is None:
            raise AttributeError(f"{kind}.{name} cannot be set: super().__init__(...) comes first")
        if value != (fixed := options.get(name, absent)):
            raise AttributeError(
                f"{kind}.{name} cannot be set to {value!r}: it is fixed at {fixed!r} when "
                "the module is built; build another one"
            )

    return property(get, check_unchanged, doc=doc)


class Options(dict[str, Any]):
    """The options of a module, JSON values: immutable; copies of it are plain dicts."""

    def _reject(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("options cannot be changed: a module is fixed when it is built")

    if not TYPE_CHECKING:  # for a type checker a dict: its methods have overloads
        __setitem__ = __delitem__ = __ior__ = _reject
        clear = pop = popitem = setdefault = update = _reject

    def __reduce__(self) -> tuple[Any, ...]:
        """A dict."""
        return dict, (dict(self),)


@contextmanager
def internal_attributes(owner: Any) -> Iterator[None]:
    """Add the attributes set in the block to `owner._internal`: they are not the user's."""
    before = owner.__dict__.keys() - owner._internal
    yield
    owner._internal = frozenset({"_internal"} | owner.__dict__.keys() - before)


def user_attributes(owner: Any) -> dict[str, dict[str, Any]]:
    """The `attributes` of `owner` that are not internal, and the values of its `slots`."""
    state = object.__getstate__(owner)
    plain, slots = state if isinstance(state, tuple) else (state, {})
    attributes = {name: value for name, value in plain.items() if name not in owner._internal}
    return {"attributes": attributes, "slots": slots}


def restore_user_attributes(owner: Any, state: Mapping[str, Any]) -> None:
    """Set what `user_attributes` returned, and entries that a user's `__getstate__` has added."""
    attributes = dict(state)
    slots = attributes.pop("slots", {})  # a state of xprnn 0.1.0 has neither
    owner.__dict__.update(attributes.pop("attributes", {}) | attributes)
    for name, value in slots.items():
        setattr(owner, name, value)
