"""The base of the optimisers: iteration over modules, their state, and its file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np

from ..backend import Array, asarray, to_numpy
from ..backend.exports import exported_from
from ..core.checks import (
    Checked,
    as_numpy_floats,
    check_count,
    check_number,
    range_errors,
    state_errors,
)
from ..core.oom import translate_out_of_memory
from ..nn.module import Module
from .state import Stateful

check_rate: Callable[..., float] = partial(check_number, low=0.0, high=math.inf)


@exported_from("xprnn.optim")
class Optimizer(Stateful):
    """The base of the optimisers: iterates over modules and has one flat buffer per slot.

    `lr` and the other numbers of the constructor may be set at any time, with the checks of the
    constructor.

    :param modules: the modules to train, each once; their dtypes and backends may differ.
    :param lr: learning rate, at least 0.
    :param slots: the names of the buffers, each of the size of a module's parameters, that the
        optimiser keeps for each module.
    :raises TypeError, ValueError: `modules` are not distinct modules, or `lr` is invalid.
    :raises MemoryError: there is not enough memory for the buffers.
    """

    lr: Checked[float] = Checked(check_rate, "The learning rate, at least 0.")
    _renamed: ClassVar = {"modules": "_modules", "steps": "_steps", "momentum": "_momentum"}

    def __init__(self, modules: Iterable[Module], lr: float, slots: tuple[str, ...]) -> None:
        self._modules = as_modules(modules)
        self.lr = lr
        self._steps = 0
        # by module: the number of steps in which a parameter was frozen, if any
        self._missed: list[Counter[str]] = [Counter() for _ in self._modules]
        self._state = _buffers(self._modules, (*slots, "scratch"))
        self._scratch = [slots.pop("scratch") for slots in self._state]

    def __setstate__(self, state: Any) -> None:
        """As the base; in pickles of xprnn 0.1.0 no parameter has missed a step."""
        super().__setstate__(state)
        self.__dict__.setdefault("_missed", [Counter() for _ in self._modules])

    @property
    def modules(self) -> tuple[Module, ...]:
        """The modules whose parameters are updated."""
        return tuple(self._modules)

    @property
    def steps(self) -> int:
        """The number of steps taken; for a parameter, those in which it was frozen do not count."""
        return self._steps

    def step(self) -> None:
        """Update all parameters that are not frozen, from the modules' `grads`.

        :raises RuntimeError: a module is on another backend or in another dtype than when the
            optimiser was built; nothing is changed.

        >>> import xprnn
        >>> linear = xprnn.Linear(1, 1, bias=False, backend="numpy", seed=0)
        >>> linear.load_state_dict({"weight": linear.asarray([[1.0]])})
        >>> linear.grads["weight"][...] = 2.0
        >>> xprnn.optim.SGD([linear], lr=0.25).step()  # 1 - 0.25 * 2
        >>> linear.parameters["weight"].tolist()
        [[0.5]]
        """
        for module, scratch in zip(self._modules, self._scratch, strict=True):
            with module.backend.activate():  # if this raises, nothing has been changed
                matches = module.backend.owns(scratch) and scratch.dtype == module.dtype
            if not matches:
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
        if not missed:  # nothing has ever been frozen
            return [(0, module.parameters.flat.size, self._steps)]
        counts = {name: missed[name] for name in module.parameters if name not in module.frozen}
        return [
            (start, stop, self._steps - n)
            for n in sorted(set(counts.values()))
            for start, stop in module.parameters.parts_without(
                frozenset(name for name in module.parameters if counts.get(name) != n)
            )
        ]

    def _update(
        self, xp: Any, p: Array, dp: Array, state: dict[str, Array], t: Array, steps: int
    ) -> None:
        """Update `p` in step number `steps`; in: dp, inout: p, state, scratch: t; all 1-D."""
        raise NotImplementedError

    def _add_slot(self, slot: str) -> None:
        """Allocate a slot of zeros, unless it exists."""
        if slot not in self._state[0]:
            added = _buffers(self._modules, (slot,))
            self._state = [old | new for old, new in zip(self._state, added, strict=True)]

    def zero_grad(self) -> None:
        """Set the gradients of all modules to zero.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.grads["weight"][...] = 5.0
        >>> xprnn.optim.SGD([linear], lr=0.1).zero_grad()
        >>> linear.grads["weight"].tolist()
        [[0.0, 0.0]]
        """
        for module in self._modules:
            module.zero_grad()

    @translate_out_of_memory
    def state_dict(self) -> dict[str, Any]:
        """The state: the number of steps, the learning rate, and the buffers of each module.

        :return: `steps`, `lr`, and for module k: `k.steps`, int64 (number of parameters,) on the
            host, the number of steps that each parameter has taken; and for each slot `k.slot`, a
            copy of the buffer, 1-D in the layout, the dtype and on the backend of its `grads.flat`.
        :raises MemoryError: there is not enough memory for the copies.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> optimizer = xprnn.optim.SGD([linear], lr=0.1, momentum=0.9)
        >>> state = optimizer.state_dict()
        >>> sorted(state)
        ['0.momentum_buffer', '0.steps', 'lr', 'steps']
        >>> optimizer.step()
        >>> optimizer.load_state_dict(state)
        >>> optimizer.steps
        0
        """
        arrays: dict[str, Array] = {}
        for k, (module, state) in enumerate(zip(self._modules, self._state, strict=True)):
            arrays[f"{k}.steps"] = np.array(
                [self._steps - self._missed[k][name] for name in module.parameters], np.int64
            )
            with module.backend.activate():
                arrays |= {f"{k}.{slot}": array.copy() for slot, array in state.items()}
        return {"steps": self._steps, "lr": self.lr, **arrays}

    @translate_out_of_memory
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` returned, for the same modules in the same dtypes.

        In states without any `k.steps`, of xprnn 0.1.0, no parameter has missed a step. An example
        is at `state_dict`.

        :param state: the values by name; arrays may be of NumPy, CuPy or torch, those of the slots
            in any real floating dtype.
        :raises TypeError, ValueError: entries are missing, unexpected or invalid; nothing is
            changed.
        :raises MemoryError: there is not enough memory for the copies; nothing is changed.
        """
        values = dict(state)
        try:
            steps = check_count("steps", values.pop("steps"))
            lr = check_rate("lr", values.pop("lr"))
        except KeyError as error:
            raise ValueError(f"state of {type(self).__name__}: missing {error}") from error
        arrays = {name: as_numpy_floats(to_numpy(value)) for name, value in values.items()}
        missed = self._pop_missed(steps, arrays)
        buffers = {
            f"{k}.{slot}": array
            for k, slots in enumerate(self._state)
            for slot, array in slots.items()
        }
        errors = state_errors({name: a.shape for name, a in buffers.items()}, arrays)
        if not errors:
            errors = [e for n, a in buffers.items() for e in range_errors(n, arrays[n], a.dtype)]
        if errors:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(errors))
        loaded = [
            {
                slot: module.backend.from_host(
                    asarray(arrays[f"{k}.{slot}"], backend="numpy", dtype=module.dtype)
                )
                for slot in slots
            }
            for k, (module, slots) in enumerate(zip(self._modules, self._state, strict=True))
        ]
        self._steps, self.lr, self._missed, self._state = steps, lr, missed, loaded

    def _pop_missed(self, steps: int, arrays: dict[str, np.ndarray]) -> list[Counter[str]]:
        """The steps that each parameter has missed; removes all `k.steps` from `arrays`."""
        names = [f"{k}.steps" for k in range(len(self._modules))]
        if not any(name in arrays for name in names):
            return [Counter() for _ in names]
        missed = []
        for name, module in zip(names, self._modules, strict=True):
            taken, shape = arrays.pop(name, None), (len(module.parameters),)
            if taken is None or taken.shape != shape or taken.dtype.kind not in "iu":
                actual = "nothing" if taken is None else f"{taken.dtype} {taken.shape}"
                raise ValueError(
                    f"{name}: expected {shape} integers, got {actual}; a state is for "
                    "modules in the order in which they were saved"
                )
            if taken.min() < 0 or taken.max() > steps:
                raise ValueError(
                    f"{name}: expected 0 to {steps}, the total number of steps; "
                    f"got {taken.min()} to {taken.max()}"
                )
            pairs = zip(module.parameters, taken.tolist(), strict=True)
            missed.append(Counter({n: steps - count for n, count in pairs if count < steps}))
        return missed


@translate_out_of_memory
def _buffers(modules: list[Module], slots: tuple[str, ...]) -> list[dict[str, Array]]:
    """The slots of each module: zeros in the layout of its gradients."""
    state = []
    for module in modules:
        with module.backend.activate():
            flat, zeros = module.grads.flat, module.backend.xp.zeros_like
            state.append({slot: zeros(flat) for slot in slots})
    return state


def as_modules(modules: Iterable[Module]) -> list[Module]:
    """`modules` as a list; TypeError or ValueError unless they are distinct modules."""
    if isinstance(modules, Module) or not isinstance(modules, Iterable):
        raise TypeError(f"modules: expected a list of modules, got {type(modules).__name__}")
    listed = list(modules)
    for module in listed:
        if not isinstance(module, Module):
            raise TypeError(f"modules: expected xprnn modules, got {type(module).__name__}")
    if not listed or len({id(module) for module in listed}) < len(listed):
        raise ValueError("modules: expected at least one, and none of them twice")
    return listed
