"""A state that goes to a file and comes back: what optimisers and schedules share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import io
from ..backend import backend_of, to_numpy


class Stateful:
    """The base of what has a state: `save` and `load` are `state_dict` and its file."""

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
