"""Compare one implementation with the float64 equations, at the sizes of one kind of call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextvars import copy_context
from functools import lru_cache
from threading import Thread
from typing import NamedTuple

import numpy as np

from ... import kernels
from ...backend import Backend, asarray, get_backend, to_numpy
from ...nn.layers import _Layer
from ..tolerances import error_of
from ..verification.equations import (
    CallArguments,
    Equations,
    Results,
    packed,
    recorded_results,
    unrecorded_results,
)
from ..verification.suite import Problem, build
from .grid import Case

STEPS = 4  # of the calls compared: a first, a last, and two between
# Values of an element; a pass that saves activations shares the rest of its code with the other
SPECIAL = (("NaN", "x"), ("infinity", "h0"), ("infinity", "x"), ("NaN", "h0"))
NUMBERS = {"NaN": np.nan, "infinity": np.inf}


class Outcome(NamedTuple):
    """The result of a comparison, as in a row of `qualification`."""

    outcome: str
    error: float | None
    detail: str


class Difference(Exception):  # noqa: N818 - a result, not an error of the program
    """A check that failed; the message says what differed."""


def compare(backend: Backend, implementation: str, case: Case) -> Outcome:
    """Compare values, then bits of repeated calls, of calls beside others, and NaN and infinity.

    A step is that of a stepper. For the other kinds, layers of one direction with rows of one
    length and of two directions with rows of different length, zero among them, are compared.
    """
    N, H, _ = case.shape
    worst: tuple[float, str] = (0.0, "")
    with kernels.use_kernels(implementation):
        if why_not := unsupported(backend, implementation, case):
            return Outcome("unsupported", None, why_not)
        for directions in (1,) if case.kind == "step" else (1, 2):
            subject = _subject(case.cell, case.dtype, N, H, directions, backend.name)
            try:
                worst = max(worst, _check(subject, case.kind))
            except Difference as difference:
                return Outcome("wrong", None, str(difference))
    error, name = worst
    if error <= 1:
        return Outcome("right", error, name)
    return Outcome("wrong", error if np.isfinite(error) else None, f"{name} differs")


def unsupported(backend: Backend, implementation: str, case: Case) -> str:
    """Why the implementation, which is forced, does not run a call; "" if it does."""
    N, H, T = case.shape
    layer = build(case.cell, case.dtype, Problem(T, N, H, H), backend)
    try:
        if case.kind == "step":
            selected = kernels.plan_step(layer._spec, backend, layer.arithmetic, N).implementation
        else:
            layer = layer.train() if case.kind == "training" else layer.eval()
            selected = layer._plan(T, N).implementation
    except kernels.KernelUnavailableError as error:
        return str(error).partition(": ")[2]
    return "" if selected == implementation else f"{selected} runs instead"


class Subject(NamedTuple):
    """A layer, and the equations for its call."""

    layer: _Layer
    equations: Equations


@lru_cache(2)  # a call's kinds are compared one after the other
def _subject(cell: str, dtype: str, N: int, H: int, directions: int, backend: str) -> Subject:
    lengths = None
    if directions == 2:
        lengths = tuple([(STEPS, 1, 0)[k % 3] for k in range(N)])
    problem = Problem(STEPS, N, H, H, directions=directions, lengths=lengths)
    layer = build(cell, dtype, problem, get_backend(backend))  # type: ignore[arg-type]
    with kernels.use_kernels("reference"):
        equations = Equations(layer, (STEPS, N, H), lengths, 0)
    layer.load_state_dict(equations.parameters)
    return Subject(layer, equations)


Call = Callable[[_Layer, CallArguments], Results]


def _check(subject: Subject, kind: str) -> tuple[float, str]:
    """The largest error in units of its limit, and the name of its array.

    :raises Difference: something other than a value's error is wrong.
    """
    layer, equations = subject
    call = CALLS[kind]
    first = call(layer, equations.arguments)
    worst = max(
        (error_of(first[name], expected) / equations.limits[name], name)
        for name, expected in equations.expected.items()
        if name in first
    )
    if not worst[0] <= 1:
        return worst
    _check_bits(first, call(layer, equations.arguments), "when the call is repeated")
    if equations.arguments.options["lengths"] is None:
        for results in _beside(layer, call, equations.arguments):
            _check_bits(first, results, "beside other calls")
        _check_special_values(subject, call, first)
    return worst


def _check_bits(first: Results, other: Results, when: str) -> None:
    for name, array in first.items():
        if array.tobytes() != other[name].tobytes():
            raise Difference(f"{name} has other bits {when}")


def _step_results(layer: _Layer, arguments: CallArguments) -> Results:
    """The results of the steps of a stepper, with the names of a call in eval mode."""
    backend, dtype = layer.backend.name, layer.dtype
    stepper = layer.stepper(arguments.x.shape[1])
    states = [asarray(state, backend=backend, dtype=dtype) for state in arguments.states]
    stepper.load(packed(states))
    steps = [stepper.step(asarray(x, backend=backend, dtype=dtype)) for x in arguments.x]
    ends = stepper.state()
    arrays = [*(ends if isinstance(ends, tuple) else (ends,))]
    names = [f"{name}_n (eval)" for name in layer._spec.cell.state_names]
    return {
        "output (eval)": np.stack([to_numpy(step) for step in steps]),
        **{name: np.array(to_numpy(a)) for name, a in zip(names, arrays, strict=True)},
    }


CALLS: dict[str, Call] = {
    "forward": unrecorded_results,
    "training": recorded_results,
    "step": _step_results,
}


def _beside(layer: _Layer, call: Call, arguments: CallArguments) -> list[Results]:
    """The results of calls in two threads at once; on a GPU each has a stream of its own."""
    results: list[Results] = []
    errors: list[BaseException] = []

    def repeat(own: _Layer) -> None:
        try:
            with own.backend.new_stream():
                results.append(call(own, arguments))
        except BaseException as error:
            errors.append(error)

    other = Thread(target=copy_context().run, args=(repeat, copy.deepcopy(layer)))
    other.start()
    repeat(layer)
    other.join()
    if errors:
        raise errors[0]
    return results


def _check_special_values(subject: Subject, call: Call, first: Results) -> None:
    """NaN and infinity in one row: where the equations have them, and nothing in other rows."""
    layer, equations = subject
    arguments = equations.arguments
    row, step = arguments.x.shape[1] // 2, len(arguments.x) // 2
    names = [name for name in first if name.startswith("output") or "_n" in name]
    for value, target in SPECIAL[:2] if call is recorded_results else SPECIAL:
        x, states = arguments.x.copy(), [state.copy() for state in arguments.states]
        changed_row = x[step, row] if target == "x" else states[0][0, row]
        changed_row[0] = NUMBERS[value]
        changed = CallArguments(x, states, arguments.upstream, arguments.options)
        with kernels.use_kernels("reference"):
            expected = equations.unrecorded(changed)
        results = call(layer, changed)
        for name in names:
            key = name if name.endswith("(eval)") else f"{name} (eval)"
            what = f"{name}, with {value} in {target}"
            _check_row(results[name], first[name], row, f"{what}: another row has other bits")
            _check_places(results[name], expected[key], equations.limits[key], what)


def _check_row(actual: np.ndarray, before: np.ndarray, row: int, message: str) -> None:
    """Compare the bits of all rows but one; rows are the axis before the last."""
    others = [k for k in range(actual.shape[-2]) if k != row]
    if actual[..., others, :].tobytes() != before[..., others, :].tobytes():
        raise Difference(message)


def _check_places(actual: np.ndarray, expected: np.ndarray, limit: float, what: str) -> None:
    """NaN and infinities must be those of the equations, and other elements close to theirs."""
    wide, finite = actual.astype(np.float64), np.isfinite(expected)
    same = np.where(finite, 0, expected) == np.where(np.isfinite(wide), 0, wide)
    same |= np.isnan(expected) & np.isnan(wide)
    if not same.all():
        raise Difference(f"{what}: NaN or infinity at other elements than in the equations")
    if finite.any() and error_of(wide[finite], expected[finite]) > limit:
        raise Difference(f"{what}: finite elements differ")
