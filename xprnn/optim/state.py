"""A state that goes to a file and comes back: what optimisers and schedules share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from .. import io
from ..backend import backend_of, to_numpy


class Stateful:
    """The base of what has a state: `save` and `load` are `state_dict` and its file."""

    _renamed: ClassVar[Mapping[str, str]] = {}  # attributes in the pickles of xprnn 0.1.0

    def __setstate__(self, state: Any) -> None:
        """Set a copy's or a pickle's attributes, those of xprnn 0.1.0 by their names of today."""
        plain, slots = state if isinstance(state, tuple) else (state, None)
        for name, value in (plain or {}).items():
            self.__dict__[self._renamed.get(name, name)] = value
        for name, value in (slots or {}).items():
            setattr(self, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Copies of what must be kept: arrays, and numbers that a JSON file can hold."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, all or nothing."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all; OSError if that fails."""
        state = self.state_dict()
        arrays = {n: to_numpy(v) for n, v in state.items() if backend_of(v) is not None}
        options = {name: value for name, value in state.items() if name not in arrays}
        io.write(path, type(self).__name__, options, arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what `save` wrote.

        :raises FileNotFoundError, ValueError: there is no such file, or it does not hold the
            state of such an object; nothing is changed.
        """
        kind, options, arrays = io.read(path)
        if kind != type(self).__name__:
            raise ValueError(
                f"{os.fspath(path)}: holds a {kind!r}, expected a {type(self).__name__!r}"
            )
        try:
            self.load_state_dict({**options, **arrays})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
