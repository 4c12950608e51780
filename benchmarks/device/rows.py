"""The rows of a report: each call first compared with float64, then timed beside torch's."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import isfinite
from typing import Any

import numpy as np

from xprnn import use_kernels
from xprnn.backend import Backend
from xprnn.backend.cupy import CupyBackend
from xprnn.bench import DisagreementError, agreement
from xprnn.bench.clock import measure, timer
from xprnn.bench.peers import ours, theirs
from xprnn.bench.task import Setting, Task
from xprnn.kernels import KernelUnavailableError
from xprnn.tolerances import error_of
from xprnn.verify.equations import Equations, results_of
from xprnn.verify.suite import ARITHMETIC, LAYERS

from .ceilings import Ceilings, unpolled
from .floor import floor
from .problems import BOTH, FORWARD, PASSES, AnyProblem, Problem

CHECKED = 3  # steps compared with float64: one has a step before it and one behind
BUDGET = 0.8  # seconds after which no round of a pass begins
Row = dict[str, Any]


# -- compared


def compared(problem: Problem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and the kernels that cannot serve it.

    A row's error is that of the array that does worst by its limit, over the array's largest
    element; "wrong" says what is wrong, else it is "".
    """
    layer = layer_of(problem, backend)
    with use_kernels("reference"):
        equations = Equations(layer, (CHECKED, problem.N, problem.H), None, 0)
    layer.load_state_dict(equations.parameters)
    rows: list[Row] = []
    absent: list[Row] = []
    for name in candidates(backend):
        with use_kernels(name):
            try:
                _check_served(layer, problem)
            except KernelUnavailableError as error:
                absent.append({**described(problem), "kernels": name, "reason": str(error)})
                continue
            try:
                with poisoned(backend):
                    found = results_of(layer, equations.given)
            except (RuntimeError, MemoryError) as error:  # one kernel, not the whole report
                rows += [row_of(problem, what, name, wrong=said(error)) for what in PASSES]
                layer = layer_of(problem, backend)
                layer.load_state_dict(equations.parameters)
                continue
        rows += [_verdict(problem, what, name, found, equations) for what in PASSES]
    return rows, absent


def candidates(backend: Backend) -> tuple[str, ...]:
    """The kernels that are tried on a backend: all but the plain code, where there are others."""
    return ("sequence", "pointwise") if isinstance(backend, CupyBackend) else ("reference",)


def layer_of(problem: AnyProblem, backend: Backend) -> Any:
    family, options = LAYERS[problem.cell]
    types = ARITHMETIC[problem.dtype]
    options = {**options, **types, "bidirectional": problem.directions == 2}
    sizes = problem.H, problem.H, problem.layers
    return family(*sizes, seed=0, backend=backend.name, **options)


def described(problem: AnyProblem) -> Row:
    """What a row says of its problem."""
    names = "cell", "dtype", "direction", "layers", "N", "H", "T"
    return {name: getattr(problem, name) for name in names}


def _check_served(layer: Any, problem: Problem) -> None:
    """KernelUnavailableError unless what is forced takes the whole problem, both passes."""
    for mode in (layer.eval, layer.train):
        mode()._plan(problem.T, problem.N)


def _verdict(
    problem: Problem, what: str, name: str, found: dict[str, np.ndarray], equations: Equations
) -> Row:
    expected = {
        array: values
        for array, values in equations.expected.items()
        if array.endswith("(eval)") == (what == FORWARD)
    }
    return judged(row_of(problem, what, name), found, expected, equations.limits)


def judged(
    row: Row,
    found: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    limits: Mapping[str, float],
) -> Row:
    """A row with the error of the array that does worst by its limit, and what is wrong."""
    errors = {array: error_of(found[array], values) for array, values in expected.items()}
    worst = max(errors, key=lambda array: errors[array] / limits[array])
    row |= {"error": errors[worst], "limit": limits[worst], "of": worst}
    if not row["error"] <= row["limit"]:
        row["wrong"] = f"{worst} is off by {row['error']:.2g} of its largest element"
    if not isfinite(row["error"]):  # which JSON does not have
        row["error"], row["wrong"] = None, f"{worst} is not a number somewhere"
    return row


def row_of(problem: AnyProblem, what: str, name: str, **facts: Any) -> Row:
    """A row without times; `facts` are those of the comparison, or why there are no times."""
    compared = {"error": None, "limit": None, "of": None, "wrong": ""}
    times = dict.fromkeys(("ours_us", "ours_quartiles_us", "torch_us", "torch_quartiles_us"))
    rest = dict.fromkeys(("ratio", "ratio_quartiles", "floor_us", "floor_of", "not_timed"))
    row = {**described(problem), "pass": what, "kernels": name}
    return {**row, **compared, **times, **rest, **facts}


def said(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


@contextmanager
def poisoned(backend: Backend) -> Iterator[None]:
    """New device memory is full of NaN, so that what nobody writes shows."""
    if not isinstance(backend, CupyBackend):
        yield
        return
    cuda = backend.xp.cuda
    with cuda.using_allocator(partial(filled, cuda.get_allocator())):
        yield


def filled(allocate: Any, nbytes: int) -> Any:
    """Memory from an allocator, every byte 0xFF: NaN in every floating type."""
    memory = allocate(nbytes)
    if nbytes:
        memory.memset_async(0xFF, nbytes)
    return memory


# -- timed


def timed(problem: Problem, rows: Sequence[Row], backend: Backend, ceilings: Ceilings) -> None:
    """Add the times of a problem to those of its rows that are right, beside torch's."""
    right = [name for name in candidates(backend) if _all_right(name, rows)]
    for row in rows:
        if row["kernels"] not in right:
            row["not_timed"] = "wrong" if row["wrong"] else "the other pass is wrong"
    if not right:
        return
    try:
        mine, peer = _peers(problem, right, backend)
        alone: dict[str, float] = {}
        if "sequence" in mine:
            calls = {FORWARD: mine["sequence"].forward, BOTH: mine["sequence"].both}
            with use_kernels("sequence"):
                alone = {what: unpolled(call, backend) for what, call in calls.items()}
        for what in PASSES:
            here = [row for row in rows if row["pass"] == what and row["kernels"] in right]
            calls = [_call(mine, row["kernels"], what) for row in here]
            theirs_call = peer.forward if what == FORWARD else peer.both
            fill(here, measure([*calls, theirs_call], timer(backend), BUDGET))
            least, which = floor(problem, what, ceilings, alone.get(what))
            for row in here:
                row["floor_us"], row["floor_of"] = 1e6 * least, which
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in rows:
            if row["kernels"] in right and row["ours_us"] is None:
                row["wrong"] = row["not_timed"] = said(error)


def _all_right(name: str, rows: Sequence[Row]) -> bool:
    mine = [row for row in rows if row["kernels"] == name]
    return bool(mine) and not any(row["wrong"] for row in mine)


def _peers(problem: Problem, names: Sequence[str], backend: Backend) -> tuple[dict[str, Any], Any]:
    """xprnn with each of the kernels, and torch, all of whose results agree at full length."""
    _, dtype, N, H, T, D = problem
    setting = Setting(problem.cell, H, H, N, T, dtype, backend.name, D)
    layer = layer_of(problem, backend)
    narrow = layer.arithmetic.compute_dtype
    x, doutput = (
        drawn(T, N, width, seed).astype(narrow).astype(layer.dtype)
        for seed, width in enumerate((H, D * H))
    )
    mine = {}
    for name in names:
        with use_kernels(name):
            mine[name] = ours(Task(setting, copy.deepcopy(layer), x, doutput, ()))
    peer = theirs(Task(setting, layer, x, doutput, ()))
    for one in mine.values():
        agreement(setting, one, peer)
    return mine, peer


@cache
def drawn(T: int, N: int, H: int, seed: int) -> np.ndarray:
    """Normal numbers (T, N, H) in float32, the same for every cell and dtype."""
    return np.random.default_rng(seed).standard_normal((T, N, H), np.float32)


def _call(mine: dict[str, Any], name: str, what: str) -> Callable[[], Any]:
    function = mine[name].forward if what == FORWARD else mine[name].both

    def run() -> Any:
        with use_kernels(name):
            return function()

    return run


def fill(rows: Sequence[Row], samples: Sequence[Sequence[float]]) -> None:
    """Write times into rows: the seconds of each in turns, torch's behind them."""
    *times, theirs_seconds = samples
    for row, seconds in zip(rows, times, strict=True):
        ratios = [b / a for a, b in zip(seconds, theirs_seconds, strict=True)]
        row["ours_us"], row["ours_quartiles_us"] = _summary(seconds, 1e6)
        row["torch_us"], row["torch_quartiles_us"] = _summary(theirs_seconds, 1e6)
        row["ratio"], row["ratio_quartiles"] = _summary(ratios, 1.0)


def _summary(values: Sequence[float], unit: float) -> tuple[float, list[float]]:
    """The median, and the lower and upper quartile."""
    low, middle, high = statistics.quantiles([unit * value for value in values], n=4)
    return middle, [low, high]
