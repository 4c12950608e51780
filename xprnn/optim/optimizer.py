"""What the optimisers share: the walk over modules, their state, and its file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ..backend import Array, asarray, to_numpy
from ..backend.exports import exported_from
from ..checks import (
    Checked,
    as_numpy_floats,
    check_count,
    check_number,
    range_errors,
    state_errors,
)
from ..memory import frees_memory
from ..module import Module
from .state import Stateful

check_rate: Callable[..., float] = partial(check_number, low=0.0, high=math.inf)


@exported_from("xprnn.optim")
class Optimizer(Stateful):
    """The base of the optimisers: walks over modules and keeps one flat buffer per slot.

    `lr` and the other numbers of the constructor may be set at any time; each is checked then
    as the constructor does.
    """

    lr: Checked[float] = Checked(check_rate)
    _renamed: ClassVar = {"modules": "_modules", "steps": "_steps", "momentum": "_momentum"}

    def __init__(self, modules: Iterable[Module], lr: float, slots: tuple[str, ...]) -> None:
        self._modules = as_modules(modules)
        self.lr = lr
        self._steps = 0
        # by module: for how many steps each parameter was frozen, those that ever were
        self._missed: list[Counter[str]] = [Counter() for _ in self._modules]
        self._state = _buffers(self._modules, (*slots, "scratch"))
        self._scratch = [slots.pop("scratch") for slots in self._state]

    def __setstate__(self, state: Any) -> None:
        """As the base; in the pickles of xprnn 0.1.0 every parameter has taken every step."""
        super().__setstate__(state)
        self.__dict__.setdefault("_missed", [Counter() for _ in self._modules])

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules whose parameters are updated."""
        return tuple(self._modules)

    @property
    def steps(self) -> int:
        """How many steps have been taken; a parameter counts those in which it is not frozen."""
        return self._steps

    def step(self) -> None:
        """Update every parameter that is not frozen from its gradient.

        :raises RuntimeError: a module has been moved since; nothing is changed.
        """
        for module, scratch in zip(self._modules, self._scratch, strict=True):
            with module.backend.activate():  # refuses here, if it does, with nothing changed
                fits = module.backend.owns(scratch) and scratch.dtype == module.dtype
            if not fits:
                raise RuntimeError(
                    f"{type(self).__name__}: a {type(module).__name__} was moved or cast after "
                    "the optimiser was built; build it after `to`"
                )
        self._steps += 1
        for module, missed, state, scratch in zip(
            self._modules, self._missed, self._state, self._scratch, strict=True
        ):
            if module.frozen:
                missed.update(module.frozen)
            with module.backend.activate(), module.writable() as flat:
                for start, stop, steps in self._runs(module, missed):
                    part = slice(start, stop)
                    self._update(
                        module.backend.xp,
                        flat[part],
                        module.grads.flat[part],
                        {slot: array[part] for slot, array in state.items()},
                        scratch[part],
                        steps,
                    )

    def _runs(self, module: Module, missed: Counter[str]) -> list[tuple[int, int, int]]:
        """The parts [start, stop) of the flat buffers to update, each with its number of steps."""
        if not missed:  # and nothing is frozen now
            return [(0, module.parameters.flat.size, self._steps)]
        late = {name: missed[name] for name in module.parameters if name not in module.frozen}
        return [
            (start, stop, self._steps - n)
            for n in sorted(set(late.values()))
            for start, stop in module.parameters.parts_without(
                frozenset(name for name in module.parameters if late.get(name) != n)
            )
        ]

    def _update(
        self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array, steps: int
    ) -> None:
        """Add step number `steps` to `p`; `dp` is read, `state` updated, `t` scratch; all 1-D."""
        raise NotImplementedError

    def _add_slot(self, slot: str) -> None:
        """Allocate a slot, zeros, unless there is one."""
        if slot not in self._state[0]:
            added = _buffers(self._modules, (slot,))
            self._state = [old | new for old, new in zip(self._state, added, strict=True)]

    def zero_grad(self) -> None:
        """Set the gradients of all modules to zero."""
        for module in self._modules:
            module.zero_grad()

    @frees_memory
    def state_dict(self) -> dict[str, Any]:
        """`steps`, `lr`, and for the module k its `k.steps` and copies of its slots.

        `k.steps`, integers on the host, are the steps that each parameter has taken.
        """
        arrays: dict[str, Array] = {}
        for k, (module, state) in enumerate(zip(self._modules, self._state, strict=True)):
            arrays[f"{k}.steps"] = np.array(
                [self._steps - self._missed[k][name] for name in module.parameters], np.int64
            )
            with module.backend.activate():
                arrays |= {f"{k}.{slot}": array.copy() for slot, array in state.items()}
        return {"steps": self._steps, "lr": self.lr, **arrays}

    @frees_memory
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave, for the same modules in the same dtypes.

        In a state without any `k.steps`, of xprnn 0.1.0, every parameter has taken all steps.

        :raises TypeError, ValueError: entries are missing, unexpected or not what they should
            be; nothing is changed.
        """
        values = dict(state)
        try:
            steps = check_count("steps", values.pop("steps"))
            lr = check_rate("lr", values.pop("lr"))
        except KeyError as error:
            raise ValueError(f"state of {type(self).__name__}: missing {error}") from error
        arrays = {name: as_numpy_floats(to_numpy(value)) for name, value in values.items()}
        missed = self._missed_of(steps, arrays)
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
            for k, (module, slots) in enumerate(zip(self._modules, self._state, strict=True))
        ]
        self._steps, self.lr, self._missed, self._state = steps, lr, missed, moved

    def _missed_of(self, steps: int, arrays: dict[str, np.ndarray]) -> list[Counter[str]]:
        """What each parameter has missed of `steps`; takes every `k.steps` out of `arrays`."""
        names = [f"{k}.steps" for k in range(len(self._modules))]
        if not any(name in arrays for name in names):
            return [Counter() for _ in names]
        found = []
        for name, module in zip(names, self._modules, strict=True):
            taken, shape = arrays.pop(name, None), (len(module.parameters),)
            if taken is None or taken.shape != shape or taken.dtype.kind not in "iu":
                came = "nothing" if taken is None else f"{taken.dtype} {taken.shape}"
                raise ValueError(f"{name}: expected {shape} integers, got {came}")
            if taken.min() < 0 or taken.max() > steps:
                raise ValueError(
                    f"{name}: expected 0 to {steps}, the steps in all; "
                    f"got {taken.min()} to {taken.max()}"
                )
            pairs = zip(module.parameters, taken.tolist(), strict=True)
            found.append(Counter({n: steps - own for n, own in pairs if own < steps}))
        return found


@frees_memory
def _buffers(modules: list[Module], slots: tuple[str, ...]) -> list[dict[str, Array]]:
    """For each module its slots, zeros in the layout of its gradients."""
    state = []
    for module in modules:
        with module.backend.activate():
            flat, zeros = module.grads.flat, module.backend.xp.zeros_like
            state.append({slot: zeros(flat) for slot in slots})
    return state


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
