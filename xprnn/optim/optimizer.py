"""What the optimisers share: the walk over modules, their state, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from .. import io
from ..backend import Array, asarray, to_numpy
from ..checks import check_count, check_number, range_errors, state_errors
from ..memory import frees_memory
from ..module import Module


class Optimizer:
    """The base of the optimisers: walks over modules and keeps one flat buffer per slot."""

    def __init__(self, modules: Iterable[Module], lr: float, slots: tuple[str, ...]) -> None:
        self.modules = as_modules(modules)
        self.lr = check_number("lr", lr, 0.0, math.inf)
        self.steps = 0
        self._state, self._scratch = _buffers(self.modules, slots)

    def step(self) -> None:
        """Update every parameter that is not frozen from its gradient.

        :raises RuntimeError: a module has been moved since; nothing is changed.
        """
        for module, scratch in zip(self.modules, self._scratch, strict=True):
            with module.backend.activate():  # refuses here, if it does, with nothing changed
                fits = module.backend.owns(scratch) and scratch.dtype == module.dtype
            if not fits:
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

    @frees_memory
    def state_dict(self) -> dict[str, Any]:
        """The number of steps, the learning rate, and copies of the slots by module."""
        arrays: dict[str, Array] = {}
        for k, (module, state) in enumerate(zip(self.modules, self._state, strict=True)):
            with module.backend.activate():
                arrays |= {f"{k}.{slot}": array.copy() for slot, array in state.items()}
        return {"steps": self.steps, "lr": self.lr, **arrays}

    @frees_memory
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, for the same modules in the same dtypes.

        :raises TypeError, ValueError: entries are missing, unexpected or not what they should
            be; nothing is changed.
        """
        values = dict(state)
        try:
            steps = check_count("steps", values.pop("steps"))
            lr = check_number("lr", values.pop("lr"), 0.0, math.inf)
        except KeyError as error:
            raise ValueError(f"state of {type(self).__name__}: missing {error}") from error
        arrays = {name: to_numpy(value) for name, value in values.items()}
        places = {
            f"{k}.{slot}": array
            for k, slots in enumerate(self._state)
            for slot, array in slots.items()
        }
        wrong = state_errors({name: a.shape for name, a in places.items()}, arrays)
        if not wrong:
            wrong = [e for n, a in places.items() for e in range_errors(n, arrays[n], a.dtype)]
        if wrong:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(wrong))
        moved = [
            {
                slot: module.backend.from_host(
                    asarray(arrays[f"{k}.{slot}"], backend="numpy", dtype=module.dtype)
                )
                for slot in slots
            }
            for k, (module, slots) in enumerate(zip(self.modules, self._state, strict=True))
        ]
        self.steps, self.lr, self._state = steps, lr, moved

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


@frees_memory
def _buffers(
    modules: list[Module], slots: tuple[str, ...]
) -> tuple[list[dict[str, Array]], list[Array]]:
    """For each module its slots and a scratch array, zeros in the layout of its gradients."""
    state, scratch = [], []
    for module in modules:
        with module.backend.activate():
            flat, zeros = module.grads.flat, module.backend.xp.zeros_like
            state.append({slot: zeros(flat) for slot in slots})
            scratch.append(zeros(flat))
    return state, scratch


def as_modules(modules: Iterable[Module]) -> list[Module]:
    """`modules` as a list; TypeError or ValueError unless it holds different modules."""
    if isinstance(modules, Module) or not isinstance(modules, Iterable):
        raise TypeError(f"modules: expected a list of modules, got {type(modules).__name__}")
    found = list(modules)
    for module in found:
        if not isinstance(module, Module):
            raise TypeError(f"modules: expected xprnn modules, got {type(module).__name__}")
    if not found or len({id(module) for module in found}) < len(found):
        raise ValueError("modules: expected at least one, and none of them twice")
    return found
