"""Saving and loading state: the base of optimisers and schedules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar

from ..backend import backend_of, to_numpy
from ..nn import serialization as io


class Stateful:
    """The base of objects with a state: `state_dict`, and `save` and `load` for files."""

    _renamed: ClassVar[Mapping[str, str]] = {}  # attributes in the pickles of xprnn 0.1.0

    def __setstate__(self, state: Any) -> None:
        """Set the attributes of a copy or pickle, those of xprnn 0.1.0 by their current names."""
        plain, slots = state if isinstance(state, tuple) else (state, None)
        for name, value in (plain or {}).items():
            self.__dict__[self._renamed.get(name, name)] = value
        for name, value in (slots or {}).items():
            setattr(self, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Copies of the state.

        :return: arrays, and numbers that JSON can represent, by name.
        """
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` returned, all or nothing.

        :param state: the values by name.
        """
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically.

        A replaced file keeps its mode; if `path` is a symbolic link, its target is replaced.

        :param path: the file; its folder must exist.
        :raises OSError: the file cannot be written, or exists and is read-only.

        >>> import pathlib, tempfile, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> optimizer = xprnn.optim.SGD([linear], lr=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "sgd.safetensors"
        ...     optimizer.save(path)
        ...     optimizer.lr = 0.5
        ...     optimizer.load(path)
        >>> optimizer.lr
        0.1
        """
        state = self.state_dict()
        arrays = {n: to_numpy(v) for n, v in state.items() if backend_of(v) is not None}
        options = {name: value for name, value in state.items() if name not in arrays}
        io.write(path, type(self).__name__, options, arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load what `save` wrote; an example is at `save`.

        :param path: a file that an object of this class wrote.
        :raises FileNotFoundError, ValueError: there is no such file, or it does not hold the
            state of an object of this class; nothing is changed.
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
