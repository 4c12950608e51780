"""The rows of layers: each call is compared with float64, then timed interleaved with torch's."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from math import isfinite
from typing import Any

import numpy as np

from xprnn.backend import Backend
from xprnn.backend.cupy import CupyBackend
from xprnn.diagnostics.tolerances import error_of
from xprnn.diagnostics.verification.equations import Equations, results_of
from xprnn.diagnostics.verification.suite import LAYERS, PRECISIONS
from xprnn.kernels import KernelUnavailableError
from xprnn.tools.bench.clock import measure, timer
from xprnn.tools.bench.peers import torch_peer, xprnn_peer
from xprnn.tools.bench.run import DisagreementError, agreement
from xprnn.tools.bench.task import Setting, Task

from ..common import use_kernels
from .bounds import call_bound
from .peaks import Peaks, without_waiting
from .problems import BOTH, FORWARD, PASSES, AnyProblem, Problem

CHECKED = 3  # steps compared with float64: the middle one has a step before and a step after it
BUDGET = 0.8  # seconds after which no new round of a pass begins
Row = dict[str, Any]


# -- compared


def compared(problem: Problem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and the kernels that do not support it.

    A row's error is that of the array with the largest error / limit, relative to the array's
    largest element; "wrong" describes a failure, else it is "".
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
                _check_supported(layer, problem)
            except KernelUnavailableError as error:
                absent.append({**described(problem), "kernels": name, "reason": str(error)})
                continue
            try:
                with poisoned(backend):
                    results = results_of(layer, equations.arguments)
            except (RuntimeError, MemoryError) as error:  # fails these rows, not the report
                rows += [row_of(problem, what, name, wrong=one_line(error)) for what in PASSES]
                layer = layer_of(problem, backend)
                layer.load_state_dict(equations.parameters)
                continue
        rows += [_verdict(problem, what, name, results, equations) for what in PASSES]
    return rows, absent


def candidates(backend: Backend) -> tuple[str, ...]:
    """The kernels to measure on a backend: the plain code only where there are no others."""
    return ("sequence", "pointwise") if isinstance(backend, CupyBackend) else ("reference",)


def layer_of(problem: AnyProblem, backend: Backend) -> Any:
    """The layer of a problem."""
    family, options = LAYERS[problem.cell]
    types = PRECISIONS[problem.dtype]
    options = {**options, **types, "bidirectional": problem.directions == 2}
    sizes = problem.H, problem.H, problem.layers
    return family(*sizes, seed=0, backend=backend.name, **options)


def described(problem: AnyProblem) -> Row:
    """A row's fields that describe its problem."""
    names = "cell", "dtype", "direction", "layers", "N", "H", "T"
    return {name: getattr(problem, name) for name in names}


def _check_supported(layer: Any, problem: Problem) -> None:
    """KernelUnavailableError unless the forced kernels support both passes of the problem."""
    for mode in (layer.eval, layer.train):
        mode()._plan(problem.T, problem.N)


def _verdict(
    problem: Problem, what: str, name: str, results: dict[str, np.ndarray], equations: Equations
) -> Row:
    expected = {
        array: values
        for array, values in equations.expected.items()
        if array.endswith("(eval)") == (what == FORWARD)
    }
    return with_error(row_of(problem, what, name), results, expected, equations.limits)


def with_error(
    row: Row,
    results: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    limits: Mapping[str, float],
) -> Row:
    """The row with the error of the array with the largest error / limit, and its "wrong"."""
    errors = {array: error_of(results[array], values) for array, values in expected.items()}
    worst = max(errors, key=lambda array: errors[array] / limits[array])
    row |= {"error": errors[worst], "limit": limits[worst], "of": worst}
    if not row["error"] <= row["limit"]:
        row["wrong"] = f"{worst} is off by {row['error']:.2g} of its largest element"
    if not isfinite(row["error"]):  # not representable in JSON
        row["error"], row["wrong"] = None, f"{worst} is not finite"
    return row


def row_of(problem: AnyProblem, what: str, name: str, **facts: Any) -> Row:
    """A row without times; `facts` are results of the comparison, or why there are no times."""
    compared = {"error": None, "limit": None, "of": None, "wrong": ""}
    times = dict.fromkeys(("ours_us", "ours_quartiles_us", "torch_us", "torch_quartiles_us"))
    rest = dict.fromkeys(("ratio", "ratio_quartiles", "floor_us", "floor_of", "not_timed"))
    row = {**described(problem), "pass": what, "kernels": name}
    return {**row, **compared, **times, **rest, **facts}


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


@contextmanager
def poisoned(backend: Backend) -> Iterator[None]:
    """New device memory is filled with NaN, so that unwritten elements are detected."""
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


def timed(problem: Problem, rows: Sequence[Row], backend: Backend, peaks: Peaks) -> None:
    """Add times to the problem's correct rows, interleaved with torch's."""
    correct = [name for name in candidates(backend) if _is_correct(name, rows)]
    for row in rows:
        if row["kernels"] not in correct:
            row["not_timed"] = "wrong" if row["wrong"] else "the other pass is wrong"
    if not correct:
        return
    try:
        mine, peer = _peers(problem, correct, backend)
        computing: dict[str, float] = {}
        if "sequence" in mine:
            calls = {FORWARD: mine["sequence"].forward, BOTH: mine["sequence"].both}
            with use_kernels("sequence"):
                computing = {what: without_waiting(call, backend) for what, call in calls.items()}
        for what in PASSES:
            of_pass = [row for row in rows if row["pass"] == what and row["kernels"] in correct]
            calls = [_call(mine, row["kernels"], what) for row in of_pass]
            torch_call = peer.forward if what == FORWARD else peer.both
            fill(of_pass, measure([*calls, torch_call], timer(backend), BUDGET))
            bound, resource = call_bound(problem, what, peaks, computing.get(what))
            for row in of_pass:
                row["floor_us"], row["floor_of"] = 1e6 * bound, resource
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in rows:
            if row["kernels"] in correct and row["ours_us"] is None:
                row["wrong"] = row["not_timed"] = one_line(error)


def _is_correct(name: str, rows: Sequence[Row]) -> bool:
    mine = [row for row in rows if row["kernels"] == name]
    return bool(mine) and not any(row["wrong"] for row in mine)


def _peers(problem: Problem, names: Sequence[str], backend: Backend) -> tuple[dict[str, Any], Any]:
    """xprnn with each of the kernels, and torch; their results at full length agree."""
    _, dtype, N, H, T, D = problem
    setting = Setting(problem.cell, H, H, N, T, dtype, backend.name, D)
    layer = layer_of(problem, backend)
    compute_dtype = layer.arithmetic.compute_dtype
    x, doutput = (
        drawn(T, N, width, seed).astype(compute_dtype).astype(layer.dtype)
        for seed, width in enumerate((H, D * H))
    )
    mine = {}
    for name in names:
        with use_kernels(name):
            mine[name] = xprnn_peer(Task(setting, copy.deepcopy(layer), x, doutput, ()))
    peer = torch_peer(Task(setting, layer, x, doutput, ()))
    for own in mine.values():
        agreement(setting, own, peer)
    return mine, peer


@cache
def drawn(T: int, N: int, H: int, seed: int) -> np.ndarray:
    """Normally distributed float32 values (T, N, H), the same for every cell and dtype."""
    return np.random.default_rng(seed).standard_normal((T, N, H), np.float32)


def _call(mine: dict[str, Any], name: str, what: str) -> Callable[[], Any]:
    function = mine[name].forward if what == FORWARD else mine[name].both

    def run() -> Any:
        with use_kernels(name):
            return function()

    return run


def fill(rows: Sequence[Row], samples: Sequence[Sequence[float]]) -> None:
    """Write times into rows, from interleaved samples of each and of torch, which is last."""
    *times, torch_seconds = samples
    for row, seconds in zip(rows, times, strict=True):
        ratios = [b / a for a, b in zip(seconds, torch_seconds, strict=True)]
        row["ours_us"], row["ours_quartiles_us"] = _summary(seconds, 1e6)
        row["torch_us"], row["torch_quartiles_us"] = _summary(torch_seconds, 1e6)
        row["ratio"], row["ratio_quartiles"] = _summary(ratios, 1.0)


def _summary(values: Sequence[float], unit: float) -> tuple[float, list[float]]:
    """The median, and the lower and upper quartile."""
    low, middle, high = statistics.quantiles([unit * value for value in values], n=4)
    return middle, [low, high]
