"""The table that chooses who serves a cell: the plain code of `cells/`, or a faster kernel.

There are two seams, and the plain code is the fallback and the oracle of both: "pointwise"
(what a step does by element in one kernel) and "sequence" (all steps in one call). A backend
names its family of kernels, a folder here whose `__init__` is a `KernelPackage`. To add a kernel: a
cell in the family's `POINTWISE`; for whole sequences its rows in `cuda/table.py`, from which
`cuda/plan.py` says which calls they fit, or a name in `numba.SEQUENCE`. `wave.py` says whether one
call takes all layers of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, cast

import numpy as np

from ..arithmetic import PrecisionPolicy
from ..backend import Backend
from ..backend.cupy import CupyBackend
from ..backend.exports import exported_from
from ..cells import Cell
from .family import KernelPackage, LayerRunner
from .narrow import widened
from .request import (
    ENVIRONMENT_VARIABLE,
    IMPLEMENTATIONS,
    WAVE,
    asked,
    requested,
    use_kernels,
)

WHOLE = ("sequence", WAVE)  # what forces sequence kernels
# Of these "auto" takes what fits. The GPU's sequence kernels are right on a CPU that stands for a
# GPU, fibers for threads; they join when a GPU has shown them right and faster.
AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cuda": ("reference", "pointwise"),
    "numba": IMPLEMENTATIONS,
}
UNTRIED = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}=sequence forces it"

BY_COLUMN = "a stepper's arrays stand by column on a CPU, compiled parts take rows"


@exported_from("xprnn")
class KernelUnavailableError(RuntimeError):
    """`XPRNN_KERNELS` forces an implementation that cannot serve this call."""


@dataclass(frozen=True)
class ExecutionPlan:
    """What a call runs on: who takes the steps, with which products, in which types."""

    implementation: str
    reason: str  # why this one
    missing: tuple[tuple[str, str], ...]  # each faster implementation, and why not that one
    backend: Backend
    xp: Any  # the backend's array module, with products as precise as the layer asks for
    cell: Cell
    arithmetic: PrecisionPolicy
    sequences: LayerRunner | None = None  # those that take all steps in one call

    def whole(
        self, work: str, N: int, H: int, T: int, directions: int
    ) -> tuple[LayerRunner, Any] | None:
        """Who takes all T steps of N rows, and how, or None: they are taken one by one.

        :param work: "forward", "training" (forward, recorded) or "backward".
        :param directions: of a layer, all of which it takes.
        """
        if self.sequences is None:
            return None
        chosen = self.sequences.plan(work, N, H, T, directions)
        return None if isinstance(chosen, str) else (self.sequences, chosen)

    def groups(self, work: str, N: int, H: int, T: int, directions: int) -> list[range]:
        """A layer's directions, in groups that run one after the other; see `whole`."""
        if directions > 1 and self.whole(work, N, H, T, directions):
            return [range(directions)]
        return [range(d, d + 1) for d in range(directions)]

    @property
    def repeats(self) -> bool:
        """Whether the cell's plain code runs on NumPy itself, so that its calls can be recorded."""
        return self.xp is np and self.implementation == "reference"

    @property
    def dtype(self) -> np.dtype[Any]:
        """A, the type of what the caller sees and of arithmetic."""
        return self.arithmetic.dtype

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """T, the type of what products read."""
        return self.arithmetic.compute_dtype


def choose(
    cell: Cell,
    backend: Backend,
    arithmetic: PrecisionPolicy,
    sizes: tuple[int, int, int, int],
    record: bool,
) -> ExecutionPlan:
    """Who serves a call of a cell on a backend in these types; only sequence kernels mind sizes.

    Where one fits forward and none backward, the steps are undone one by one.

    :param sizes: (N, I, H, T) of the call, I that of the layer with the widest input.
    :raises ValueError: `XPRNN_KERNELS` is not auto, reference, pointwise, sequence or wave.
    :raises KernelUnavailableError: it forces what is not there, or does not fit.
    """
    return _prepared(lambda: _choose_layer(cell, backend, arithmetic, sizes, record), "", record)


def _choose_layer(
    cell: Cell,
    backend: Backend,
    arithmetic: PrecisionPolicy,
    sizes: tuple[int, int, int, int],
    record: bool,
) -> ExecutionPlan:
    forced = asked()
    if _wants_sequences(backend, forced) and not _family(backend.kernels).refusal(arithmetic):
        return _fitted(cell, backend, arithmetic, forced, sizes, record)
    return _choose(cell, backend, arithmetic, forced)


def _prepared(choice: Callable[[], ExecutionPlan], whole: str, record: bool) -> ExecutionPlan:
    """The engine that is chosen, with its kernels made; chosen again where they cannot be.

    :param whole: what a family calls the kernels of "sequence"; "" as they are called.
    """
    engine = choice()
    if engine.implementation == "reference":
        return engine
    name = whole if whole and engine.implementation == "sequence" else engine.implementation
    family = _family(engine.backend.kernels)
    if family.prepare(name, engine.cell.name, engine.arithmetic, record):
        return engine
    for remembered in (_choose, _whole):  # they did not know of it
        remembered.cache_clear()
    return choice()


def plan_step(
    cell: Cell, backend: Backend, arithmetic: PrecisionPolicy, sizes: tuple[int, int, int, int]
) -> ExecutionPlan:
    """Who serves the steps of a stepper; "sequence" is the one call for all layers.

    :param sizes: (L, N, I, H) of the stack and its streams.
    :raises ValueError: `XPRNN_KERNELS` is not auto, reference, pointwise, sequence or wave.
    :raises KernelUnavailableError: it forces what is not there, or does not fit.
    """
    return _prepared(lambda: _choose_step(cell, backend, arithmetic, sizes), "step", False)


def _choose_step(
    cell: Cell, backend: Backend, arithmetic: PrecisionPolicy, sizes: tuple[int, int, int, int]
) -> ExecutionPlan:
    forced = asked()
    refused = _refuse_stack_step(cell, backend, arithmetic, sizes, forced)
    if forced == "pointwise" and not backend.on_gpu:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={forced}: {BY_COLUMN}")
    if refused is None and _wants_sequences(backend, forced):
        reason = "the fastest that fits" if forced == "auto" else f"{ENVIRONMENT_VARIABLE}={forced}"
        engine = _choose(cell, backend, arithmetic, "auto")
        return replace(engine, implementation="sequence", reason=reason, missing=())
    if forced in WHOLE:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={forced}: {refused}")
    if forced == "auto" and not backend.on_gpu:
        engine = _choose(cell, backend, arithmetic, "reference")
        missing = ("pointwise", BY_COLUMN), ("sequence", refused or "not asked for")
        return replace(engine, reason="the fastest that fits", missing=missing)
    engine = _choose(cell, backend, arithmetic, forced)
    others = [row for row in engine.missing if row[0] != "sequence"]
    why = refused or (UNTRIED if forced == "auto" else engine.reason)
    return replace(engine, missing=(*others, ("sequence", why)))


def _refuse_stack_step(
    cell: Cell,
    backend: Backend,
    arithmetic: PrecisionPolicy,
    sizes: tuple[int, int, int, int],
    forced: str,
) -> str | None:
    """Why no kernel takes a step of all layers; None: one can, or nobody would ask for it."""
    if isinstance(backend, CupyBackend):
        from .cuda.stack_step import Sizes, refusal

        return refusal(backend, cell.name, arithmetic, Sizes(*sizes))
    from .numba import refuse_step, step_outdone

    if not _wants_sequences(backend, forced):
        return None  # nothing is looked for: Numba takes its time to import
    refused = refuse_step(cell.name, arithmetic)
    return refused if refused or forced != "auto" else step_outdone(cell.name, sizes) or None


def _absent(cell: Cell, backend: Backend) -> str:
    return f"no kernel for cell '{cell.name}' on backend '{backend.name}' in this version"


def _wants_sequences(backend: Backend, forced: str) -> bool:
    """Whether sequence kernels are asked for, or "auto" may take them on a backend."""
    return forced in WHOLE or (forced == "auto" and "sequence" in AUTOMATIC[backend.kernels])


def untried(backend: Backend) -> bool:
    """Whether sequence kernels have to be asked for on a backend, and nobody asks."""
    return "sequence" not in AUTOMATIC[backend.kernels] and asked() not in WHOLE


def has_sequences(cell: Cell, backend: Backend) -> bool:
    """Whether there are sequence kernels for a cell on a backend, whatever they fit."""
    return _family(backend.kernels).has_sequences(cell.name)


def _fitted(
    cell: Cell,
    backend: Backend,
    arithmetic: PrecisionPolicy,
    forced: str,
    sizes: tuple[int, int, int, int],
    record: bool,
) -> ExecutionPlan:
    """The engine with sequence kernels where they fit, or the one without and the reason."""
    sequences, (N, width, H, T) = _sequences(cell, backend, arithmetic), sizes
    works = ("training", "backward") if record else ("forward",)
    # a call without rows or steps launches nothing, whoever serves
    plans = [sequences.plan(work, N or 1, H, T or 1, 1) for work in works]
    refused = tuple([f"{w}: {p}" for w, p in zip(works, plans, strict=True) if isinstance(p, str)])
    if refused and forced in WHOLE:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={forced}: {refused[0]}")
    left = refused[0] if isinstance(plans[0], str) else ""
    if not left and forced == "auto":
        left = sequences.outdone(N, width, H, T)
    return _whole(cell, backend, arithmetic, forced, left, refused)


@lru_cache(256)  # reasons name sizes: there is no end of them
def _whole(
    cell: Cell,
    backend: Backend,
    arithmetic: PrecisionPolicy,
    forced: str,
    left: str,
    refused: tuple[str, ...],
) -> ExecutionPlan:
    """The engine with sequence kernels, or with a reason why a call is left to others without."""
    engine = _choose(cell, backend, arithmetic, "auto")
    if left:
        others = tuple([row for row in engine.missing if row[0] != "sequence"])
        return replace(engine, missing=(*others, ("sequence", left)))
    reason = "the fastest that fits" if forced == "auto" else f"{ENVIRONMENT_VARIABLE}={forced}"
    missing = tuple([("sequence", why) for why in refused])
    sequences = _sequences(cell, backend, arithmetic)
    return replace(
        engine, implementation="sequence", reason=reason, missing=missing, sequences=sequences
    )


@cache
def _sequences(cell: Cell, backend: Backend, arithmetic: PrecisionPolicy) -> LayerRunner:
    return _family(backend.kernels).sequences(cell.name, backend, arithmetic)


@cache
def _choose(
    cell: Cell, backend: Backend, arithmetic: PrecisionPolicy, forced: str
) -> ExecutionPlan:
    """The engine that takes steps one by one."""
    serving = {"reference": widened(cell, arithmetic.dtype) if arithmetic.narrow else cell}
    family, asked = _family(backend.kernels), f"{ENVIRONMENT_VARIABLE}={forced}"
    known = {"sequence"} if has_sequences(cell, backend) else set()
    if forced == "reference":  # nothing else is looked for: Numba takes its time to import
        refusal, there = "", {"pointwise", *known}
    else:
        refusal = family.refusal(arithmetic)
        fused = {} if refusal else family.fused_cells()
        if cell.name in fused:
            serving["pointwise"] = fused[cell.name]
        there = {*serving} if refusal else {*serving, *known}
    absent = refusal or _absent(cell, backend)
    if forced == "auto":
        able = [name for name in AUTOMATIC[backend.kernels] if name in serving]
        chosen = able[-1]
        reason = f"the fastest of {len(able)}" if len(able) > 1 else "the only one here"
    elif forced in serving:
        chosen, reason = forced, asked
    else:
        raise KernelUnavailableError(f"{asked}: {absent}")
    faster = IMPLEMENTATIONS[IMPLEMENTATIONS.index(chosen) + 1 :]
    why = UNTRIED if forced == "auto" else asked  # "auto" leaves out nothing else
    missing = tuple([(name, why if name in there else absent) for name in faster])
    xp = backend.module(arithmetic.precision, arithmetic.narrow)
    return ExecutionPlan(chosen, reason, missing, backend, xp, serving[chosen], arithmetic)


@cache
def _family(name: str) -> KernelPackage:
    """The family of kernels of this name, a folder here."""
    if name == "cuda":
        from . import cuda

        return cast("KernelPackage", cuda)
    from . import numba

    return cast("KernelPackage", numba)


__all__ = [
    "AUTOMATIC",
    "ENVIRONMENT_VARIABLE",
    "IMPLEMENTATIONS",
    "WAVE",
    "ExecutionPlan",
    "KernelUnavailableError",
    "asked",
    "choose",
    "plan_step",
    "requested",
    "use_kernels",
]
