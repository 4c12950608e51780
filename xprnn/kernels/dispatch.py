"""Which implementation runs a call, and why no other one does.

A cell has up to three implementations: "reference", the plain code of `cells/`; "pointwise", with
the element-wise parts of a step in one kernel each; "sequence", all steps of a layer in one launch
or call. The plain code is the fallback and the reference of the others. A backend names its package
of kernels, a folder here whose `package.py` is a `KernelPackage`. To add a kernel: a cell in the
package's `POINTWISE`; for whole sequences its rows in `cuda/table.py`, from which `cuda/plan.py`
decides which calls are supported, or a name in `numba/table.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakSet

import numpy as np

from ..backend import Backend
from ..backend.cupy import CupyBackend
from ..backend.exports import exported_from
from ..cells import Cell
from ..core.precision import PrecisionPolicy
from ..core.spec import StackSpec
from .interface import KernelPackage, KernelRunner, LayerRunner, Pass, Sizes, Unsupported
from .mixed_precision import widened
from .request import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, WAVE, Request, asked, requested

if TYPE_CHECKING:
    from .cuda.sequence import Wavefront

FUSED = ("sequence", WAVE)  # requests that force sequence kernels
# What "auto" selects from. The GPU's sequence kernels are right in emulation on a CPU; they are
# added when a GPU has shown them right and faster.
AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cuda": ("reference", "pointwise"),
    "numba": IMPLEMENTATIONS,
}
UNTRIED = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}=sequence forces it"
WAVE_UNTRIED = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}={WAVE} forces it"
FEATURE_MAJOR = "a stepper's arrays are feature-major on a CPU, compiled parts read rows"
MOST = 256  # plans of one layer that are kept

PlainRunner = Callable[[Any, Cell, np.dtype[Any], bool], LayerRunner]


@exported_from("xprnn")
class KernelUnavailableError(RuntimeError):
    """The implementation that is forced, by `use_kernels` or `XPRNN_KERNELS`, is unsupported."""


class CallShape(NamedTuple):
    """What of a call decides its plan."""

    steps: int  # T
    batch: int  # N
    running: int  # rows that run at least one step
    record: bool
    recompute: int | None = None


@dataclass(frozen=True)
class StepPlan:
    """How a step of all layers is run: by which implementation, in which types."""

    implementation: str
    reason: str  # why this one
    missing: tuple[tuple[str, str], ...]  # each faster implementation, and why not that one
    backend: Backend
    xp: Any  # the backend's array module, with products as precise as the layer asks for
    cell: Cell
    precision: PrecisionPolicy

    @cached_property
    def is_mixed(self) -> bool:
        """Whether products read another type than the layer's dtype."""
        return self.precision.narrow

    @property
    def replays(self) -> bool:
        """Whether the plain code runs on NumPy itself, so that its calls can be captured."""
        return self.xp is np and self.implementation == "reference"

    @property
    def is_fused(self) -> bool:
        """Whether one launch or call runs all steps, or a step of all layers."""
        return self.implementation == "sequence"


@dataclass(frozen=True)
class ExecutionPlan(StepPlan):
    """How a call is run: by which runners, and which directions of a layer together."""

    forward: LayerRunner
    backward: LayerRunner
    kernels: KernelRunner | None  # sequence kernels, if they are selected
    forward_groups: tuple[range, ...]  # of directions
    backward_groups: tuple[range, ...]
    # all layers in one launch, or why they run one after the other
    wavefront: Wavefront | Unsupported


class Plans(dict[Any, ExecutionPlan]):
    """The plans of one layer, by what decides them."""

    __slots__ = ("__weakref__",)

    def __init__(self) -> None:
        super().__init__()
        _all_plans.add(self)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        """A copy of a layer makes its own."""
        return Plans, ()


_all_plans: WeakSet[Plans] = WeakSet()


def forget_plans() -> None:
    """Drop every plan: what they were made from has changed."""
    _select.cache_clear()
    for plans in [*_all_plans]:
        plans.clear()


# -- the plan of a call


def plan(
    spec: StackSpec,
    backend: Backend,
    precision: PrecisionPolicy,
    shape: CallShape,
    request: Request,
    plain: PlainRunner,
) -> ExecutionPlan:
    """How a call of a stack is run. Where a kernel supports only the forward pass, the backward
    pass runs one step after the other.

    :param plain: makes the runner of the plain code from an array module, a cell, the compute dtype
        and whether calls can be replayed.
    :raises KernelUnavailableError: the request cannot be met.
    """
    found = _plan(spec, backend, precision, shape, request, plain)
    if _is_prepared(found, found.implementation, shape.record):
        return found
    return _plan(spec, backend, precision, shape, request, plain)


def _plan(
    spec: StackSpec,
    backend: Backend,
    precision: PrecisionPolicy,
    shape: CallShape,
    request: Request,
    plain: PlainRunner,
) -> ExecutionPlan:
    package = _package(backend.kernels)
    fused = _wants_fused(backend, request) and not package.unsupported(precision)
    chosen = _select(spec.cell, backend, precision, _for_steps(request) if fused else request)
    xp = backend.module(precision.precision, precision.narrow)
    replays = xp is np and chosen.implementation == "reference"
    steps = plain(xp, chosen.cell, precision.compute_dtype, replays)
    forward = backward = steps
    kernels: KernelRunner | None = None
    if fused:
        runner = package.layer_runner(spec.cell.name, backend, precision)
        chosen = _with_fused(chosen, _sizes(spec, shape), shape.record, request, runner)
    if chosen.implementation == "sequence":
        forward = kernels = runner
        backward = steps if chosen.missing else runner
    sizes, D = _sizes(spec, shape)._replace(N=shape.running), spec.num_directions
    kind = Pass.TRAINING if shape.record else Pass.FORWARD
    found = ExecutionPlan(
        chosen.implementation,
        chosen.reason,
        chosen.missing,
        backend,
        xp,
        chosen.cell,
        precision,
        forward,
        backward,
        kernels,
        tuple(forward.groups(kind, sizes, D)),
        tuple(backward.groups(Pass.BACKWARD, sizes, D)),
        Unsupported("there is one layer"),
    )
    if spec.num_layers == 1:
        return found
    return replace(found, wavefront=_wavefront(found, spec, shape, request))


def _sizes(spec: StackSpec, shape: CallShape) -> Sizes:
    steps = shape.steps if shape.recompute is None else min(shape.steps, shape.recompute)
    return Sizes(shape.batch, spec.widest_input, spec.hidden_size, steps)


class Selection(NamedTuple):
    """An implementation of a cell's step, and why it is selected."""

    implementation: str
    reason: str
    missing: tuple[tuple[str, str], ...]
    cell: Cell


def _with_fused(
    steps: Selection, sizes: Sizes, record: bool, request: Request, kernels: KernelRunner
) -> Selection:
    """Sequence kernels, or the implementation of single steps and why they are not used.

    If they support the forward pass only, `missing` has the reason.
    """
    # a call without rows or steps launches nothing, in any implementation
    least = sizes._replace(N=sizes.N or 1, T=sizes.T or 1)
    kinds = (Pass.TRAINING, Pass.BACKWARD) if record else (Pass.FORWARD,)
    answers = [(kind, kernels.unsupported(kind, least, 1)) for kind in kinds]
    refused = [f"{kind}: {why}" for kind, why in answers if why]
    if refused and request.name in FUSED:
        raise KernelUnavailableError(f"{request.source}: {refused[0]}")
    why_not: object = refused[0] if answers[0][1] else None
    if not why_not and request.name == "auto":
        why_not = kernels.not_profitable(sizes)
    if why_not:
        others = tuple([row for row in steps.missing if row[0] != "sequence"])
        return steps._replace(missing=(*others, ("sequence", str(why_not))))
    missing = tuple([("sequence", why) for why in refused])
    return Selection("sequence", _reason(request), missing, steps.cell)


def _reason(request: Request) -> str:
    return "the fastest that fits" if request.name == "auto" else request.source


def _wavefront(
    found: ExecutionPlan, spec: StackSpec, shape: CallShape, request: Request
) -> Wavefront | Unsupported:
    """One launch for all layers, in which a layer runs a step as soon as the one below has."""
    answer = _supported_wavefront(found, spec, shape)
    if isinstance(answer, Unsupported):
        if request.name == WAVE:
            raise KernelUnavailableError(f"{request.source}: {answer}")
        return answer
    if request.name != WAVE:
        return Unsupported(WAVE_UNTRIED)
    return answer if shape.running and shape.steps else Unsupported("there is nothing to launch")


def _supported_wavefront(
    found: ExecutionPlan, spec: StackSpec, shape: CallShape
) -> Wavefront | Unsupported:
    if found.backend.kernels != "cuda":
        return Unsupported(f"no kernel for it on backend '{found.backend.name}' in this version")
    from .cuda.sequence import CudaRunner

    if not isinstance(found.kernels, CudaRunner):
        return Unsupported("sequence kernels are not selected")
    if spec.num_directions > 1:
        return Unsupported("a layer above would wait for the end of a reverse direction")
    if shape.record and spec.dropout:
        return Unsupported(f"dropout={spec.dropout} acts between layers")
    if shape.record and shape.recompute is not None:
        return Unsupported("recomputed segments of a layer run one after the other")
    kind = Pass.TRAINING if shape.record else Pass.FORWARD
    sizes = Sizes(max(shape.running, 1), spec.widest_input, spec.hidden_size, max(shape.steps, 1))
    return found.kernels.wavefront(kind, sizes, spec.num_layers)


# -- the plan of a step


def plan_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int
) -> StepPlan:
    """How a step of N rows is run; "sequence" is one launch or call for all layers.

    :raises ValueError: `XPRNN_KERNELS` is none of the known names.
    :raises KernelUnavailableError: the request cannot be met.
    """
    request = requested()
    found = _plan_step(spec, backend, precision, batch, request)
    name = "step" if found.is_fused else found.implementation
    if _is_prepared(found, name, False):
        return found
    return _plan_step(spec, backend, precision, batch, request)


def _plan_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int, request: Request
) -> StepPlan:
    cell, name = spec.cell, request.name
    why_not = _unsupported_step(spec, backend, precision, batch, request)
    if name == "pointwise" and not backend.on_gpu:
        raise KernelUnavailableError(f"{request.source}: {FEATURE_MAJOR}")
    if why_not is None and _wants_fused(backend, request):
        chosen = _select(cell, backend, precision, _for_steps(request))
        chosen = chosen._replace(implementation="sequence", reason=_reason(request), missing=())
    elif name in FUSED:
        raise KernelUnavailableError(f"{request.source}: {why_not}")
    elif name == "auto" and not backend.on_gpu:
        plain = Request("reference", request.source)
        missing = ("pointwise", FEATURE_MAJOR), ("sequence", str(why_not or "not asked for"))
        chosen = _select(cell, backend, precision, plain)
        chosen = chosen._replace(reason="the fastest that fits", missing=missing)
    else:
        chosen = _select(cell, backend, precision, request)
        others = [row for row in chosen.missing if row[0] != "sequence"]
        why = str(why_not or (UNTRIED if name == "auto" else chosen.reason))
        chosen = chosen._replace(missing=(*others, ("sequence", why)))
    xp = backend.module(precision.precision, precision.narrow)
    return StepPlan(
        chosen.implementation, chosen.reason, chosen.missing, backend, xp, chosen.cell, precision
    )


def _unsupported_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int, request: Request
) -> Unsupported | None:
    """Why no kernel runs a step of all layers; None: one does, or none is wanted."""
    L, N, I, H = spec.num_layers, batch, spec.input_size, spec.hidden_size  # noqa: E741
    if isinstance(backend, CupyBackend):
        from .cuda.stack_step import StepSizes, unsupported

        return unsupported(backend, spec.cell.name, precision, StepSizes(L, N, I, H))
    from .numba.package import step_not_profitable, step_unsupported

    if not _wants_fused(backend, request):
        return None  # not looked for: importing Numba is slow
    why_not = step_unsupported(spec.cell.name, precision)
    if why_not or request.name != "auto":
        return why_not
    return step_not_profitable(spec.cell.name, (L, N, I, H))


# -- what both are made of


@cache
def _select(
    cell: Cell, backend: Backend, precision: PrecisionPolicy, request: Request
) -> Selection:
    """The implementation that runs steps one after the other."""
    cells = {"reference": widened(cell, precision.dtype) if precision.narrow else cell}
    package, name = _package(backend.kernels), request.name
    known = {"sequence"} if has_sequences(cell, backend) else set()
    absent: object = f"no kernel for cell '{cell.name}' on backend '{backend.name}' in this version"
    if name == "reference":  # nothing else is looked for: importing Numba is slow
        present = {"pointwise", *known}
    else:
        why_not = package.unsupported(precision)
        if why_not is None:
            fused = package.fused_cells()
            if cell.name in fused:
                cells["pointwise"] = fused[cell.name]
            present = {*cells, *known}
        else:
            absent, present = why_not, {*cells}
    if name == "auto":
        able = [each for each in AUTOMATIC[backend.kernels] if each in cells]
        chosen = able[-1]
        reason = f"the fastest of {len(able)}" if len(able) > 1 else "the only one here"
    elif name in cells:
        chosen, reason = name, request.source
    else:
        raise KernelUnavailableError(f"{request.source}: {absent}")
    faster = IMPLEMENTATIONS[IMPLEMENTATIONS.index(chosen) + 1 :]
    why = UNTRIED if name == "auto" else request.source  # "auto" leaves out nothing else
    missing = tuple([(each, why if each in present else str(absent)) for each in faster])
    return Selection(chosen, reason, missing, cells[chosen])


def _is_prepared(found: ExecutionPlan | StepPlan, name: str, record: bool) -> bool:
    """Whether the kernels of a plan are compiled; otherwise plans are made without them."""
    if name == "reference":
        return True
    package = _package(found.backend.kernels)
    if package.prepare(name, found.cell.name, found.precision, record):
        return True
    forget_plans()
    return False


def _for_steps(request: Request) -> Request:
    """The request for the implementation of single steps under sequence kernels."""
    return Request("auto", request.source)


def _wants_fused(backend: Backend, request: Request) -> bool:
    """Whether sequence kernels are requested, or "auto" may select them on a backend."""
    if request.name == "auto":
        return "sequence" in AUTOMATIC[backend.kernels]
    return request.name in FUSED


def untried(backend: Backend) -> bool:
    """Whether sequence kernels have to be requested on a backend, and are not."""
    return "sequence" not in AUTOMATIC[backend.kernels] and asked() not in FUSED


def has_sequences(cell: Cell, backend: Backend) -> bool:
    """Whether there are sequence kernels for a cell on a backend, for any sizes."""
    return _package(backend.kernels).has_sequences(cell.name)


@lru_cache(2)
def _package(name: str) -> KernelPackage:
    """The package of kernels of this name, a folder here."""
    if name == "cuda":
        from .cuda import package as cuda

        return cast("KernelPackage", cuda)
    from .numba import package as numba

    return cast("KernelPackage", numba)
