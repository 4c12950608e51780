"""The table that chooses who serves a cell: the plain code of `cells/`, or a faster kernel.

There are two seams, and the plain code is the fallback and the oracle of both: "pointwise"
(what a step does by element in one kernel) and "sequence" (all steps in one launch). To add a
kernel: a folder here with a dict of cells like `cuda.POINTWISE`, one line in `_pointwise`; for
whole sequences its rows in `cuda/table.py`, from which `cuda/plan.py` says which calls they fit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arithmetic import Arithmetic
from ..backend import Backend
from ..backend.cupy import CupyBackend
from ..cells import Cell
from .narrow import widened

if TYPE_CHECKING:
    from .cuda.plan import Plan
    from .cuda.sequence import SequenceKernels

ENVIRONMENT_VARIABLE = "XPRNN_KERNELS"
IMPLEMENTATIONS = ("reference", "pointwise", "sequence")
# Of these "auto" takes what fits. The sequence kernels are right on a CPU that stands for a GPU,
# fibers for threads; they join when a GPU has shown them right and faster.
AUTOMATIC = ("reference", "pointwise")
UNTRIED = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}=sequence forces it"


class KernelUnavailableError(RuntimeError):
    """`XPRNN_KERNELS` forces an implementation that cannot serve this call."""


@dataclass(frozen=True)
class Engine:
    """What a call runs on: who takes the steps, with which products, in which types."""

    implementation: str
    reason: str  # why this one
    missing: tuple[tuple[str, str], ...]  # each faster implementation, and why not that one
    backend: Backend
    xp: Any  # the backend's array module, with products as precise as the layer asks for
    cell: Cell
    arithmetic: Arithmetic
    sequences: SequenceKernels | None = None  # those that take all steps in one launch

    def whole(
        self, work: str, N: int, H: int, T: int, directions: int
    ) -> tuple[SequenceKernels, Plan] | None:
        """The launch that takes all T steps of N rows, or None: they are taken one by one.

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
    def dtype(self) -> np.dtype[Any]:
        """A, the type of what the caller sees and of arithmetic."""
        return self.arithmetic.dtype

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """T, the type of what products read."""
        return self.arithmetic.compute_dtype


def choose(
    cell: Cell, backend: Backend, arithmetic: Arithmetic, sizes: tuple[int, int, int], record: bool
) -> Engine:
    """Who serves a call of a cell on a backend in these types; only sequence kernels mind sizes.

    Where one fits forward and none backward, the steps are undone one by one.

    :param sizes: (N, H, T) of the call.
    :raises ValueError: `XPRNN_KERNELS` is not auto, reference, pointwise or sequence.
    :raises KernelUnavailableError: it forces what is not there, or does not fit.
    """
    forced = _forced()
    if isinstance(backend, CupyBackend) and wants_sequences():
        return _fitted(cell, backend, arithmetic, forced, sizes, record)
    return _choose(cell, backend, arithmetic, forced)


def choose_step(
    cell: Cell, backend: Backend, arithmetic: Arithmetic, sizes: tuple[int, int, int, int]
) -> Engine:
    """Who serves the steps of a stepper; "sequence" is the launch for all layers.

    :param sizes: (L, N, I, H) of the stack and its streams.
    :raises ValueError: `XPRNN_KERNELS` is not auto, reference, pointwise or sequence.
    :raises KernelUnavailableError: it forces what is not there, or does not fit.
    """
    forced, refused = _forced(), _refuse_stack_step(cell, backend, arithmetic, sizes)
    if refused is None and wants_sequences():
        reason = "the fastest that fits" if forced == "auto" else f"{ENVIRONMENT_VARIABLE}={forced}"
        engine = _choose(cell, backend, arithmetic, "auto")
        return replace(engine, implementation="sequence", reason=reason, missing=())
    if forced == "sequence":
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}=sequence: {refused}")
    engine = _choose(cell, backend, arithmetic, forced)
    others = [row for row in engine.missing if row[0] != "sequence"]
    why = refused or (UNTRIED if forced == "auto" else engine.reason)
    return replace(engine, missing=(*others, ("sequence", why)))


def _refuse_stack_step(
    cell: Cell, backend: Backend, arithmetic: Arithmetic, sizes: tuple[int, int, int, int]
) -> str | None:
    """Why no kernel takes a step of all layers; None: one can."""
    if not isinstance(backend, CupyBackend):
        return _absent(cell, backend)
    from .cuda.stack_step import Sizes, refusal

    return refusal(backend, cell.name, arithmetic, Sizes(*sizes))


def _absent(cell: Cell, backend: Backend) -> str:
    return f"no kernel for cell '{cell.name}' on backend '{backend.name}' in this version"


def _forced() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def wants_sequences() -> bool:
    """Whether sequence kernels are asked for, or "auto" may take them."""
    forced = _forced()
    return forced == "sequence" or (forced == "auto" and "sequence" in AUTOMATIC)


def has_sequences(cell: Cell, backend: Backend) -> bool:
    """Whether there are sequence kernels for a cell on a backend, whatever they fit."""
    if backend.kernels != "cuda":
        return False
    from .cuda.table import KERNELS

    return (cell.name, "forward") in KERNELS


def _fitted(
    cell: Cell,
    backend: CupyBackend,
    arithmetic: Arithmetic,
    forced: str,
    sizes: tuple[int, int, int],
    record: bool,
) -> Engine:
    """The engine with sequence kernels where they fit, or the one without and the reason."""
    sequences, (N, H, T) = _sequences(cell, backend, arithmetic), sizes
    works = ("training", "backward") if record else ("forward",)
    # a call without rows or steps launches nothing, whoever serves
    plans = {work: sequences.plan(work, max(N, 1), H, max(T, 1), 1) for work in works}
    refused = [f"{work}: {plan}" for work, plan in plans.items() if isinstance(plan, str)]
    if refused and forced == "sequence":
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}=sequence: {refused[0]}")
    engine = _choose(cell, backend, arithmetic, "auto")
    if isinstance(plans[works[0]], str):
        others = tuple([row for row in engine.missing if row[0] != "sequence"])
        return replace(engine, missing=(*others, ("sequence", refused[0])))
    reason = "the fastest that fits" if forced == "auto" else f"{ENVIRONMENT_VARIABLE}={forced}"
    missing = tuple([("sequence", why) for why in refused])
    return replace(
        engine, implementation="sequence", reason=reason, missing=missing, sequences=sequences
    )


@cache
def _sequences(cell: Cell, backend: CupyBackend, arithmetic: Arithmetic) -> SequenceKernels:
    from .cuda.sequence import SequenceKernels

    return SequenceKernels(backend, cell.name, arithmetic)


@cache
def _choose(cell: Cell, backend: Backend, arithmetic: Arithmetic, forced: str) -> Engine:
    if forced not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected auto, {', '.join(IMPLEMENTATIONS)}; got {forced!r}"
        )
    serving = {"reference": widened(cell, arithmetic.dtype) if arithmetic.narrow else cell}
    pointwise = _pointwise(backend)
    if cell.name in pointwise:
        serving["pointwise"] = pointwise[cell.name]
    absent = _absent(cell, backend)
    if forced == "auto":
        chosen = next(name for name in reversed(IMPLEMENTATIONS) if name in serving)
        reason = f"the fastest of {len(serving)}" if len(serving) > 1 else "the only one here"
    elif forced in serving:
        chosen, reason = forced, f"{ENVIRONMENT_VARIABLE}={forced}"
    else:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={forced}: {absent}")
    faster = IMPLEMENTATIONS[IMPLEMENTATIONS.index(chosen) + 1 :]
    there = {*serving, "sequence"} if has_sequences(cell, backend) else {*serving}
    why = UNTRIED if forced == "auto" else reason  # "auto" leaves out nothing else
    missing = tuple([(name, why if name in there else absent) for name in faster])
    xp = backend.module(arithmetic.precision, arithmetic.narrow)
    return Engine(chosen, reason, missing, backend, xp, serving[chosen], arithmetic)


def _pointwise(backend: Backend) -> Mapping[str, Cell]:
    """The cells whose parts are fused, for the family of kernels that a backend runs."""
    if backend.kernels == "cuda":
        from .cuda.cells import POINTWISE

        return POINTWISE
    return {}
