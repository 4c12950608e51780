"""Runs sequence kernels on the emulator and compares with the reference of `sequence_cases.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.emulator.build import Faults
from tests.support.emulator.sequence import Run, Tiling, grouped_arguments, launch
from tests.support.sequence_cases import Case
from tests.support.tolerances import assert_close
from xprnn.core.passes import Activations

MAX_POLLS = 2**31
IN_ORDER = Run()
TAG = 7 << 24
ROUNDED = {"BF16": "bfloat16", "F16": "float16", "TF32": "tf32", "TF32X3": "float32"}
CANARY, GUARD = 0xA5, 1 << 14  # bytes; a faulty kernel may read some rows too many


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy aligned to 16 bytes, with guard bytes on both sides."""
    base = np.full(array.nbytes + 2 * GUARD + 16, CANARY, np.uint8)
    start = GUARD + -(base.ctypes.data + GUARD) % 16
    copy = base[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def check_guards(arrays: Mapping[str, np.ndarray | None]) -> None:
    for name, array in arrays.items():
        if array is not None:
            base = array
            while isinstance(base.base, np.ndarray):
                base = base.base
            start = array.ctypes.data - base.ctypes.data
            outside = np.concatenate([base[:start], base[start + array.nbytes :]])
            assert (outside == CANARY).all(), f"the kernel writes outside {name}"


@dataclass
class LaunchResult:
    """A kernel's results, in NumPy arrays by the names of its parameters."""

    outcome: str
    arrays: dict[str, Any]
    report: int


def initial_rows(case: Case) -> np.ndarray:
    """The index of the initial state of each row that runs, in packed order."""
    layout, first = case.layout, case.layout.running
    if not case.reverse:
        return np.arange(first)
    return layout.total + np.arange(first) if layout.ragged is None else layout.ragged.last


def run_forward(case: Case, tiling: Tiling, **options: Any) -> LaunchResult:
    """As `run_forwards`, for one direction."""
    return run_forwards([case], tiling, **options)[0]


def run_forwards(
    cases: Sequence[Case], tiling: Tiling, apart: bool | None = None, **options: Any
) -> list[LaunchResult]:
    """Launch directions, or layers of a wavefront, at once; check the guards of all arrays."""
    every = [_forward_arrays(case, tiling, apart) for case in cases]
    for case, arrays, lower in zip(cases[1:], every[1:], every, strict=False):
        if tiling.wave:
            weight_ih = guarded(case.numbers["weight_ih"])
            arrays |= {"weight_ih": weight_ih, "lower_exchange": lower["exchange"]}
    results = _run(cases, tiling, every, (), **options)
    for case, result in zip(cases, results, strict=True):
        exchange, h = result.arrays["exchange"], result.arrays["h"]
        if result.outcome == "fine" and exchange is not h and not result.report:
            assert np.array_equal(exchange[:, : case.H], h, equal_nan=True), (
                "exchange and states differ"
            )
            assert not exchange[:, case.H :].any(), "padding is not zero"
    return results


def _forward_arrays(case: Case, tiling: Tiling, apart: bool | None) -> dict[str, Any]:
    """New arrays of a direction, as before its first step."""
    layout, H, P, first = case.layout, case.H, case.padded, initial_rows(case)
    assert tiling.reduction >= H, "the tiling is too small for H"
    rows, itemsize = layout.running + layout.total, case.dtype.itemsize
    empty = np.full(rows * P * itemsize, 0xFF, np.uint8).view(case.dtype)
    exchange = guarded(empty.reshape(rows, P))
    apart = P != H if apart is None else apart
    h = guarded(np.zeros((rows, H), case.dtype)) if apart else exchange
    c = guarded(np.zeros((rows, H), np.float32))
    exchange[first] = 0
    exchange[first, :H] = h[first] = layout.sort(case.numbers["h0"])[: layout.running]
    c[first] = layout.sort(case.numbers["c0"])[: layout.running]
    width = case.cell.saved * H if tiling.work == "training" else 0
    return {
        "weight_hh": guarded(case.numbers["weight_hh"]),
        "bias_hh": guarded(case.numbers["bias_hh"]) if case.bias else None,
        "gates": guarded(case.numbers["gx"]),
        "saved": guarded(np.zeros((layout.total, width), case.dtype)) if width else None,
        "h": h,
        "c": c,
        "exchange": exchange,
        "weight_ih": None,
        "lower_exchange": None,
    }


def check_forward(case: Case, tiling: Tiling, second: Case | None = None, **options: Any) -> None:
    """Fail unless the kernel ends and agrees with the reference, within rounding.

    Infinities and NaNs must be where the reference has them. `second`: the other direction, in
    the same launch.
    """
    cases = [case] if second is None else [case, second]
    for each, result in zip(cases, run_forwards(cases, tiling, **options), strict=True):
        check_forward_result(each, tiling, result)


def check_forward_result(case: Case, tiling: Tiling, result: LaunchResult) -> None:
    check_result(case, case.plain(), tiling, result)


def check_result(
    case: Case,
    trace: Activations,
    tiling: Tiling,
    result: LaunchResult,
    of: str = "",
    layers: int = 1,
) -> None:
    """Fail unless a direction ended with the reference's results; `of` names it."""
    assert result.outcome == "fine", result.outcome
    assert result.report == 0
    expected = dict(zip(case.cell.state_names, trace.states, strict=True))
    if tiling.work == "training" and case.cell.saved:
        expected |= {"gates": trace.gates, "saved": trace.saved}
    else:
        assert result.arrays["gates"].tobytes() == case.numbers["gx"].tobytes(), (
            "gates were written"
        )
    for name, value in expected.items():
        compare(case, name + of, result.arrays[name], value, layers)


def run_backward(case: Case, tiling: Tiling, **options: Any) -> LaunchResult:
    """As `run_backwards`, for one direction."""
    return run_backwards([case], tiling, **options)[0]


def run_backwards(
    cases: Sequence[Case], tiling: Tiling, wide: int = 0, **options: Any
) -> list[LaunchResult]:
    """As `run_forwards`; the rows of doutput are `wide` elements longer than H."""
    every = [_backward_arrays(case, tiling, wide) for case in cases]
    names = cases[0].cell.state_names
    before = [{name: arrays[name].tobytes() for name in names} for arrays in every]
    results = _run(cases, tiling, every, (cases[0].H + wide,), **options)
    for case, result, states in zip(cases, results, before, strict=True):
        for name, state in states.items():
            assert result.arrays[name].tobytes() == state, f"{name} was written"
        if result.outcome == "fine" and not result.report:
            dgh, padding = np.split(result.arrays["exchange"], [case.H], axis=2)
            dgh = dgh.reshape(case.layout.total, -1)
            same = np.array_equal(dgh, result.arrays["gates"], equal_nan=True)
            assert same, "exchange and gates differ"
            assert not padding.any(), "padding is not zero"
    return results


def _backward_arrays(case: Case, tiling: Tiling, wide: int) -> dict[str, Any]:
    """New arrays of a direction, as before its first backward step."""
    layout, P, trace = case.layout, case.padded, case.rounded_trace()
    G, S = case.cell.gates, layout.total
    assert tiling.reduction >= G * P, "the tiling is too small for H"
    empty = np.full(S * G * P * case.dtype.itemsize, 0xFF, np.uint8).view(case.dtype)
    doutput = np.pad(case.numbers["doutput"], ((0, 0), (0, wide)), constant_values=np.nan)
    arrays = {
        "weight_hh": guarded(case.numbers["weight_hh"]),
        "doutput": guarded(doutput) if case.upstream else None,
        "gates": guarded(trace.gates),
        "saved": guarded(trace.saved),
        "exchange": guarded(empty.reshape(S, G, P)),
    }
    states = dict(zip(case.cell.state_names, trace.states, strict=True))
    arrays |= {name: guarded(state) for name, state in states.items()}
    for name in case.dstates:
        arrays[name] = guarded(layout.sort(case.numbers[name])[: layout.running])
    return arrays


def check_backward(case: Case, tiling: Tiling, second: Case | None = None, **options: Any) -> None:
    """As `check_forward`; also checks the weight gradients computed from the results."""
    cases = [case] if second is None else [case, second]
    for each, result in zip(cases, run_backwards(cases, tiling, **options), strict=True):
        check_backward_result(each, result)


def check_backward_result(case: Case, result: LaunchResult) -> None:
    trace = case.rounded_trace()
    expected = case.plain_backward(trace)
    assert result.outcome == "fine", result.outcome
    assert result.report == 0
    wide, saved, H = result.arrays["gates"].astype(np.float64), result.arrays["saved"], case.H
    previous = case.layout.previous(trace.states[0], case.reverse).astype(np.float64)
    dgx = wide.copy()
    case.cell.to_input_side(dgx, saved.astype(np.float64))
    with np.errstate(all="ignore"):
        if case.name == "gru":
            dgh_n = expected["saved"] * trace.gates[:, :H].astype(np.float64)
            compare(case, "dgh_n", wide[:, 2 * H :], dgh_n)
        dweight_hh = wide.T @ previous
    compare(case, "dgx", dgx, expected["dgx"])
    compare(case, "saved", saved, expected["saved"])
    for name in case.dstates:
        compare(case, name, result.arrays[name], expected[name][: case.layout.running])
    compare(case, "dweight_hh", dweight_hh, expected["dweight_hh"])


def _run(
    cases: Sequence[Case],
    tiling: Tiling,
    every: list[dict[str, Any]],
    more: tuple[int, ...],
    run: Run = IN_ORDER,
    passes: int = 1,
    faults: Faults = (),
    max_polls: int = MAX_POLLS,
) -> list[LaunchResult]:
    """Launch with the arrays of each direction and the arguments of all kernels."""
    case = cases[0]  # all have the same sizes
    layout, H, n_0 = case.layout, case.H, case.layout.running
    counts = None if layout.ragged is None else guarded(np.array(layout.counts, np.int32))
    report = guarded(np.zeros(1, np.uint32))
    sizes = (layout.steps, n_0, H, layout.total, passes, int(case.reverse))
    arguments = [grouped_arguments(tiling, every), counts, *sizes, *more, max_polls, report, TAG]
    grid = tiling.grid(H, n_0, passes, len(cases))
    outcome = launch(tiling, arguments, grid, passes, run, faults)
    for arrays in every:
        check_guards({**arrays, "counts": counts, "report": report})
    return [LaunchResult(outcome, arrays, int(report[0])) for arrays in every]


def compare(
    case: Case, name: str, actual: np.ndarray, expected: np.ndarray, layers: int = 1
) -> None:
    """Fail unless they agree within the tolerance of the math mode."""
    actual, finite = actual.astype(np.float32), np.isfinite(expected)
    same = np.where(finite, 0, expected) == np.where(np.isfinite(actual), 0, actual)
    same |= np.isnan(expected) & np.isnan(actual)
    assert same.all(), f"{name}: not finite elsewhere: {np.argwhere(~same)[:5].tolist()}"
    width = case.H * (1 + (layers > 1))
    sizes = {"steps": max(case.lengths), "width": width, "layers": layers}
    rounded = ROUNDED[case.kind]
    assert_close(actual[finite], expected[finite], np.float32, name, rounded, **sizes)
