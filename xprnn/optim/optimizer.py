"""What the optimisers share: the walk over modules, their state, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .. import io
from ..backend import Array, to_numpy
from ..checks import check_number, state_errors
from ..module import Module


class Optimizer:
    """The base of the optimisers: walks over modules and keeps one flat buffer per slot."""

    slots: ClassVar[tuple[str, ...]] = ()

    def __init__(self, modules: Iterable[Module], lr: float) -> None:
        self.modules = list(modules)
        for module in self.modules:
            if not isinstance(module, Module):
                raise TypeError(f"modules: expected xprnn modules, got {type(module).__name__}")
        self.lr = check_number("lr", lr, 0.0, math.inf)
        self.steps = 0
        self._state = [
            {slot: module.backend.xp.zeros_like(module.grads.flat) for slot in self.slots}
            for module in self.modules
        ]
        self._scratch = [m.backend.xp.zeros_like(m.grads.flat) for m in self.modules]

    def step(self) -> None:
        """Update every parameter that is not frozen from its gradient.

        :raises RuntimeError: a module has been moved since; nothing is changed.
        """
        for module, scratch in zip(self.modules, self._scratch, strict=True):
            if not module.backend.owns(scratch) or scratch.dtype != module.dtype:
                raise RuntimeError(
                    f"{type(self).__name__}: a {type(module).__name__} was moved or cast after "
                    "the optimiser was built; build it after `to`"
                )
        self.steps += 1
        for module, state, scratch in zip(self.modules, self._state, self._scratch, strict=True):
            with module.backend.activate(), module.writable() as flat:
                for start, stop in module.trainable():
                    part = slice(start, stop)
                    self._update(
                        module.backend.xp,
                        flat[part],
                        module.grads.flat[part],
                        {slot: array[part] for slot, array in state.items()},
                        scratch[part],
                    )

    def _update(self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array) -> None:
        """Add the step to `p`; `dp` is read, `state` updated, `t` scratch; all 1-D."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Set the gradients of all modules to zero."""
        for module in self.modules:
            module.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the learning rate, and copies of the slots by module."""
        arrays = {
            f"{k}.{slot}": array.copy()
            for k, state in enumerate(self._state)
            for slot, array in state.items()
        }
        return {"steps": self.steps, "lr": self.lr, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, for the same modules.

        :raises ValueError: entries are missing, unexpected or misshapen; nothing is changed.
        """
        values = dict(state)
        try:
            steps, lr = int(values.pop("steps")), float(values.pop("lr"))
        except KeyError as error:
            raise ValueError(f"state of {type(self).__name__}: missing {error}") from error
        shapes = {
            f"{k}.{slot}": tuple(array.shape)
            for k, slots in enumerate(self._state)
            for slot, array in slots.items()
        }
        arrays = {name: to_numpy(value) for name, value in values.items()}
        wrong = state_errors(shapes, arrays)
        if wrong:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(wrong))
        self.steps, self.lr = steps, lr
        for k, (module, slots) in enumerate(zip(self.modules, self._state, strict=True)):
            for slot, array in slots.items():
                host = arrays[f"{k}.{slot}"].astype(module.dtype)
                array[...] = module.backend.from_host(host)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all; OSError if that fails."""
        state = self.state_dict()
        options = {name: state.pop(name) for name in ("steps", "lr")}
        arrays = {name: to_numpy(array) for name, array in state.items()}
        io.write(path, type(self).__name__, options, arrays)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take back what `save` wrote.

        :raises FileNotFoundError, ValueError: there is no such file, or it does not hold the
            state of such an optimiser for these modules; nothing is changed.
        """
        kind, options, arrays = io.read(path)
        if kind != type(self).__name__:
            raise ValueError(
                f"{os.fspath(path)}: holds a {kind!r}, expected a {type(self).__name__!r}"
            )
        self.load_state_dict({**options, **arrays})
