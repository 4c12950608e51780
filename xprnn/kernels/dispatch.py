"""The choice of the implementation that runs a call, with the reasons against faster ones.

A cell has up to three implementations: "reference", the plain code of `cells/`; "pointwise", with
the element-wise parts of a step in one kernel each; "sequence", all steps of a layer in one launch
or call. The plain code is the fallback and the reference for the others. A backend names its kernel
package, a folder here whose `package.py` is a `KernelPackage`. To add a kernel: a cell in the
package's `POINTWISE`; for full sequences its rows in `cuda/table.py`, from which `cuda/plan.py`
derives which calls are supported, or a name in `numba/table.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakSet

import numpy as np

from ..backend import Backend
from ..backend.cupy import CupyBackend
from ..backend.exports import exported_from
from ..cells import Cell
from ..cells.definition.defined_cell import DefinedCell
from ..core.precision import PrecisionPolicy
from ..core.spec import StackSpec
from . import qualification
from .codegen.numpy_cell import on_numpy
from .interface import (
    ExecutionPlan,
    KernelPackage,
    KernelRunner,
    LayerRunner,
    Pass,
    Sizes,
    StepPlan,
    Unsupported,
    WavefrontRunner,
)
from .mixed_precision import upcasting
from .qualification import Shape
from .request import ENVIRONMENT_VARIABLE, IMPLEMENTATIONS, WAVE, Request, requested, requested_name

FUSED = ("sequence", WAVE)  # requests that force sequence kernels
# What "auto" selects from. The CUDA sequence kernels have only run in an emulator on a CPU; they
# are added when they have been shown to be correct and faster on a GPU.
AUTOMATIC: dict[str, tuple[str, ...]] = {
    "cuda": ("reference", "pointwise"),
    "numba": IMPLEMENTATIONS,
}
NOT_GENERATED = "none are generated for definitions until a GPU has run the present ones"
EXPERIMENTAL = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}=sequence forces it"
WAVEFRONT_EXPERIMENTAL = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}={WAVE} forces it"
SLOWER = "slower here, or not right, by the qualification"
NOT_QUALIFIED = f"not qualified as right and faster here; {ENVIRONMENT_VARIABLE}=sequence forces it"
FEATURE_MAJOR = "a stepper's arrays are feature-major on a CPU, pointwise kernels need batch-major"
MAX_PLANS = 256  # of one layer; then they are dropped

P = TypeVar("P", bound=StepPlan)
PlainRunner = Callable[[Any, Cell, np.dtype[Any], bool], LayerRunner]


@exported_from("xprnn")
class KernelUnavailableError(RuntimeError):
    """The implementation forced by `use_kernels` or `XPRNN_KERNELS` does not support a call."""


class CallShape(NamedTuple):
    """The properties of a call that determine its plan."""

    steps: int  # T
    batch: int  # N
    running: int  # rows that run at least one step
    record: bool
    recompute: int | None = None


class Plans(dict[Any, ExecutionPlan]):
    """The cached plans of one layer."""

    __slots__ = ("__weakref__",)

    def __init__(self) -> None:
        super().__init__()
        _all_plans.add(self)

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        """Empty: a copy of a layer makes its own plans."""
        return Plans, ()


_all_plans: WeakSet[Plans] = WeakSet()


def forget_plans() -> None:
    """Drop all cached plans, because what they depend on has changed."""
    _select.cache_clear()
    _qualification.cache_clear()
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
    """The plan of a call of a stack.

    Where a kernel supports only the forward pass, the backward pass is that of the step loop.

    :param plain: makes the runner of the plain code from an array module, a cell, the compute dtype
        and whether calls are replayed.
    :raises KernelUnavailableError: the request cannot be met.
    """
    sizes = _sizes(spec, shape)
    call = Call("training" if shape.record else "forward", Shape(sizes.N, sizes.H, sizes.T))

    def select() -> ExecutionPlan:
        make = partial(_plan, spec, backend, precision, shape, plain)
        return _qualified(make(request), call, request, make)

    candidate = select()
    if _is_prepared(candidate, candidate.implementation, shape.record):
        return candidate
    return select()


def _plan(
    spec: StackSpec,
    backend: Backend,
    precision: PrecisionPolicy,
    shape: CallShape,
    plain: PlainRunner,
    request: Request,
) -> ExecutionPlan:
    package = _package(backend.kernels)
    fused = _wants_fused(backend, request) and not package.unsupported(precision)
    steps_request = _for_steps(request) if fused else request
    selection = _select(spec.cell, backend, precision, steps_request, shape.record)
    xp = backend.module(precision.precision, precision.is_mixed)
    is_plain = xp is np and selection.implementation == "reference"
    if is_plain:
        selection = selection._replace(cell=on_numpy(selection.cell, shape.record))
    replays = is_plain and selection.cell.is_captured
    steps = plain(xp, selection.cell, precision.compute_dtype, replays)
    forward = backward = steps
    kernels: KernelRunner | None = None
    if fused:
        runner = package.layer_runner(spec.cell, backend, precision)
        selection = _with_fused(selection, _sizes(spec, shape), shape.record, request, runner)
    if selection.implementation == "sequence":
        forward = kernels = runner
        backward = steps if selection.missing else runner
    sizes, D = _sizes(spec, shape)._replace(N=shape.running), spec.num_directions
    kind = Pass.TRAINING if shape.record else Pass.FORWARD
    result = ExecutionPlan(
        selection.implementation,
        selection.reason,
        selection.missing,
        backend,
        xp,
        selection.cell,
        precision,
        forward,
        backward,
        kernels,
        tuple(forward.groups(kind, sizes, D)),
        tuple(backward.groups(Pass.BACKWARD, sizes, D)),
        Unsupported("there is one layer"),
    )
    if spec.num_layers == 1:
        return result
    return replace(result, wavefront=_wavefront(result, spec, shape, request))


def _sizes(spec: StackSpec, shape: CallShape) -> Sizes:
    steps = shape.steps if shape.recompute is None else min(shape.steps, shape.recompute)
    return Sizes(shape.batch, spec.widest_input, spec.hidden_size, steps)


class Selection(NamedTuple):
    """An implementation of a cell, and the reasons for and against it."""

    implementation: str
    reason: str
    missing: tuple[tuple[str, Unsupported], ...]
    cell: Cell


def _with_fused(
    steps: Selection, sizes: Sizes, record: bool, request: Request, kernels: KernelRunner
) -> Selection:
    """The selection of sequence kernels, or `steps` with the reason why they are not used.

    If they support only the forward pass, `missing` has the reason.
    """
    # a call without rows or steps launches nothing, in any implementation
    nonempty = sizes._replace(N=sizes.N or 1, T=sizes.T or 1)
    kinds = (Pass.TRAINING, Pass.BACKWARD) if record else (Pass.FORWARD,)
    results = [(kind, kernels.unsupported(kind, nonempty, 1)) for kind in kinds]
    reasons = [Unsupported(f"{kind}: {why}") for kind, why in results if why]
    if reasons and request.name in FUSED:
        raise KernelUnavailableError(f"{request.source}: {reasons[0]}")
    why_not = reasons[0] if results[0][1] else None
    if not why_not and request.name == "auto":
        why_not = kernels.not_profitable(sizes)
    if why_not:
        others = tuple([row for row in steps.missing if row[0] != "sequence"])
        return steps._replace(missing=(*others, ("sequence", why_not)))
    missing = tuple([("sequence", why) for why in reasons])
    return Selection("sequence", _reason(request), missing, steps.cell)


def _reason(request: Request) -> str:
    return "the fastest that fits" if request.name == "auto" else request.source


def _wavefront(
    plan: ExecutionPlan, spec: StackSpec, shape: CallShape, request: Request
) -> WavefrontRunner | Unsupported:
    """One launch for all layers, in which a layer runs a step as soon as the one below has."""
    wavefront = _supported_wavefront(plan, spec, shape)
    if isinstance(wavefront, Unsupported):
        if request.name == WAVE:
            raise KernelUnavailableError(f"{request.source}: {wavefront}")
        return wavefront
    if request.name != WAVE:
        return Unsupported(WAVEFRONT_EXPERIMENTAL)
    return wavefront if shape.running and shape.steps else Unsupported("there is nothing to launch")


def _supported_wavefront(
    plan: ExecutionPlan, spec: StackSpec, shape: CallShape
) -> WavefrontRunner | Unsupported:
    if plan.backend.kernels != "cuda":
        return Unsupported(f"no kernel for it on backend '{plan.backend.name}' in this version")
    from .cuda.sequence import CudaRunner

    if not isinstance(plan.kernels, CudaRunner):
        return Unsupported("sequence kernels are not selected")
    if spec.num_directions > 1:
        return Unsupported("a layer above would wait for the end of a reverse direction")
    if shape.record and spec.dropout:
        return Unsupported(f"dropout={spec.dropout} acts between layers")
    if shape.record and shape.recompute is not None:
        return Unsupported("recomputed segments of a layer run one after the other")
    kind = Pass.TRAINING if shape.record else Pass.FORWARD
    sizes = Sizes(max(shape.running, 1), spec.widest_input, spec.hidden_size, max(shape.steps, 1))
    return plan.kernels.wavefront(kind, sizes, spec.num_layers)


# -- the plan of a step


def plan_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int
) -> StepPlan:
    """The plan of a step of N rows; "sequence" is one launch or call for all layers.

    :raises ValueError: `XPRNN_KERNELS` is none of the known names.
    :raises KernelUnavailableError: the request cannot be met.
    """
    request = requested()
    call = Call("step", Shape(batch, spec.hidden_size, 1))

    def select() -> StepPlan:
        make = partial(_plan_step, spec, backend, precision, batch)
        return _qualified(make(request), call, request, make)

    candidate = select()
    name = "step" if candidate.is_fused else candidate.implementation
    if _is_prepared(candidate, name, False):
        return candidate
    return select()


def _plan_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int, request: Request
) -> StepPlan:
    cell, name = spec.cell, request.name
    why_not = _unsupported_step(spec, backend, precision, batch, request)
    if name == "pointwise" and not backend.on_gpu:
        raise KernelUnavailableError(f"{request.source}: {FEATURE_MAJOR}")
    if why_not is None and _wants_fused(backend, request):
        selection = _select(cell, backend, precision, _for_steps(request))
        selection = selection._replace(
            implementation="sequence", reason=_reason(request), missing=()
        )
    elif name in FUSED:
        raise KernelUnavailableError(f"{request.source}: {why_not}")
    elif name == "auto" and not backend.on_gpu:
        plain = Request("reference", request.source)
        missing = (
            ("pointwise", Unsupported(FEATURE_MAJOR)),
            ("sequence", why_not or Unsupported("not requested")),
        )
        selection = _select(cell, backend, precision, plain)
        selection = selection._replace(reason="the fastest that fits", missing=missing)
    else:
        selection = _select(cell, backend, precision, request)
        others = [row for row in selection.missing if row[0] != "sequence"]
        why = why_not or Unsupported(EXPERIMENTAL if name == "auto" else selection.reason)
        selection = selection._replace(missing=(*others, ("sequence", why)))
    xp = backend.module(precision.precision, precision.is_mixed)
    if xp is np and selection.implementation == "reference":
        selection = selection._replace(cell=on_numpy(selection.cell, record=False))
    return StepPlan(
        selection.implementation,
        selection.reason,
        selection.missing,
        backend,
        xp,
        selection.cell,
        precision,
    )


def _unsupported_step(
    spec: StackSpec, backend: Backend, precision: PrecisionPolicy, batch: int, request: Request
) -> Unsupported | None:
    """Why no kernel runs a step of all layers; None: one does, or none is requested."""
    L, N, I, H = spec.num_layers, batch, spec.input_size, spec.hidden_size  # noqa: E741
    if isinstance(backend, CupyBackend):
        from .cuda.stack_step import StepSizes, unsupported

        return unsupported(backend, spec.cell.name, precision, StepSizes(L, N, I, H))
    from .numba.package import step_not_profitable, step_unsupported

    if not _wants_fused(backend, request):
        return None  # not checked: importing Numba is slow
    why_not = step_unsupported(spec.cell, precision)
    if why_not or request.name != "auto":
        return why_not
    return step_not_profitable(spec.cell, (L, N, I, H))


# -- shared by both


class Call(NamedTuple):
    """What a qualification depends on in a call."""

    kind: str  # one of `qualification.PASSES`
    shape: Shape


def _qualified(default: P, call: Call, request: Request, make: Callable[[Request], P]) -> P:
    """The plan that this machine's qualification selects for "auto", or the default."""
    package = _package(default.backend.kernels)
    if request.name != "auto" or package.unsupported(default.precision):
        return default
    search = _qualification(default.backend, os.environ.get(qualification.ENVIRONMENT_VARIABLE))
    if search.qualification is None:
        if not search.why_not:
            return default
        reason = "qualification", Unsupported(search.why_not)
        return replace(default, missing=(*default.missing, reason))
    dtype, name = default.precision.name, default.implementation
    choice = search.qualification.choice(default.cell.name, dtype, call.kind, call.shape, name)
    ran = search.qualification.outcomes(default.cell.name, dtype, "sequence")
    kept = _with_reason(default, EXPERIMENTAL, NOT_QUALIFIED) if ran else default
    if choice is None:
        return kept
    try:
        plan = make(Request(choice.implementation, choice.reason))
    except KernelUnavailableError:  # at a size between those that were measured
        return kept
    return _with_reason(plan, choice.reason, SLOWER)


def _with_reason(plan: P, old: str, new: str) -> P:
    """The plan with another reason against the implementations that have the reason `old`."""
    missing = [(n, Unsupported(new) if why.reason == old else why) for n, why in plan.missing]
    return replace(plan, missing=tuple(missing))


@cache
def _qualification(backend: Backend, requested: str | None) -> qualification.Found:
    """This machine's file for a backend; `requested` is the value of the environment variable."""
    package = _package(backend.kernels)
    return qualification.find(backend.kernels, lambda: package.identity(backend))


@cache
def _select(
    cell: Cell, backend: Backend, precision: PrecisionPolicy, request: Request, record: bool = False
) -> Selection:
    """The implementation that runs steps one after the other.

    :param record: whether backward steps follow.
    """
    cells = {"reference": upcasting(cell, precision.dtype) if precision.is_mixed else cell}
    package, name = _package(backend.kernels), request.name
    known = {"sequence"} if has_sequence_kernels(cell, backend) else set()
    unavailable = Unsupported(
        f"no kernel for cell '{cell.name}' on backend '{backend.name}' in this version"
    )
    if name == "reference":  # the others are not checked: importing Numba is slow
        present = {"pointwise", *known}
    else:
        why_not = package.unsupported(precision)
        if why_not is None:
            fused = package.fused_cell(cell, precision, record)
            if fused is not None:
                cells["pointwise"] = fused
            present = {*cells, *known}
        else:
            unavailable, present = why_not, {*cells}
    if name == "auto":
        usable = [each for each in AUTOMATIC[backend.kernels] if each in cells]
        selected = usable[-1]
        reason = "the only one available"
        if len(usable) > 1:
            reason = f"the fastest of {len(usable)}"
    elif name in cells:
        selected, reason = name, request.source
    else:
        raise KernelUnavailableError(f"{request.source}: {unavailable}")
    faster = IMPLEMENTATIONS[IMPLEMENTATIONS.index(selected) + 1 :]
    # "auto" omits nothing but experimental kernels
    why = Unsupported(EXPERIMENTAL if name == "auto" else request.source)
    reasons = {each: why if each in present else unavailable for each in faster}
    if isinstance(cell, DefinedCell) and backend.kernels == "cuda":
        reasons["sequence"] = Unsupported(NOT_GENERATED)
    missing = tuple(reasons.items())
    return Selection(selected, reason, missing, cells[selected])


def _is_prepared(plan: ExecutionPlan | StepPlan, name: str, record: bool) -> bool:
    """Compile the kernels of a plan; False if that failed, so that it cannot be used."""
    if name == "reference":
        return True
    package = _package(plan.backend.kernels)
    if package.prepare(name, plan.cell, plan.precision, record):
        return True
    forget_plans()
    return False


def _for_steps(request: Request) -> Request:
    """The request for the implementation of single steps if sequence kernels are requested."""
    return Request("auto", request.source)


def _wants_fused(backend: Backend, request: Request) -> bool:
    """Whether sequence kernels are requested, or "auto" may select them on a backend."""
    if request.name == "auto":
        return "sequence" in AUTOMATIC[backend.kernels]
    return request.name in FUSED


def experimental(cell: Cell, backend: Backend, precision: PrecisionPolicy) -> Unsupported | None:
    """Why a cell's sequence kernels run only on request.

    None: they are requested, or "auto" may select them, or there are none.
    """
    if "sequence" in AUTOMATIC[backend.kernels] or requested_name() in FUSED:
        return None
    if not has_sequence_kernels(cell, backend):
        return None
    value = os.environ.get(qualification.ENVIRONMENT_VARIABLE)
    file = _qualification(backend, value).qualification
    outcomes = file.outcomes(cell.name, precision.name, "sequence") if file else set()
    if faults := outcomes - {"right"}:
        return Unsupported(f"{', '.join(sorted(faults))}, by the qualification")
    return None if outcomes else Unsupported(EXPERIMENTAL)


def has_sequence_kernels(cell: Cell, backend: Backend) -> bool:
    """Whether there are sequence kernels for a cell on a backend, for any sizes."""
    return _package(backend.kernels).has_sequence_kernels(cell)


def package_of(backend: Backend) -> KernelPackage:
    """The kernel package of a backend."""
    return _package(backend.kernels)


@lru_cache(2)
def _package(name: str) -> KernelPackage:
    """The kernel package of this name."""
    if name == "cuda":
        from .cuda import package as cuda

        return cast("KernelPackage", cuda)
    from .numba import package as numba

    return cast("KernelPackage", numba)
