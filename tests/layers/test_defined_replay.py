"""Layers of definitions on NumPy by captured calls, against plain evaluation of their cells."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers import test_defined_layers as layers
from tests.layers.test_defined_layers import (
    MASKED,
    NAMES,
    Case,
    Problem,
    assert_equal,
    build,
    check,
    plain_code,  # noqa: F401 - a fixture
    run,
)
from tests.layers.test_stepper_memory import BIG, SMALL, peak
from tests.support.definitions import DEFINITIONS, SIZES
from xprnn import kernels
from xprnn.engine import replay
from xprnn.engine.replay import ReplayLoop
from xprnn.kernels import dispatch
from xprnn.kernels.codegen.numpy_cell import NumpyCell

T = 3 * replay.MIN_STEPS
LENGTHS = {
    "full": None,
    "some end": (T, 0, T - replay.MIN_STEPS, replay.MIN_STEPS),
    "short runs too": (T, T - 3, 0, T - 6),
}
# a value of a layer passes T steps, whose products are summed in another order
UNITS = 100 * T


def bound(dtype: str) -> float:
    return UNITS * float(np.finfo(dtype).eps)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the loops that have replayed steps."""
    calls: list[str] = []
    for name in ("replay_steps", "replay_backward_steps"):
        original = getattr(ReplayLoop, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(*args)

        monkeypatch.setattr(ReplayLoop, name, counted)
    return calls


def by_plain_evaluation(case: Case, problem: Problem, **options: Any) -> Any:
    """The results, with new arrays for each value."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "on_numpy", lambda cell, record: cell)
        kernels.forget_plans()
        layer = build(case, **options)
        assert not layer._plan(case.T, case.N).cell.is_captured
        return run(case, layer, problem)


def in_dtype(problem: Problem, dtype: str) -> Problem:
    problem.x, problem.doutput = problem.x.astype(dtype), problem.doutput.astype(dtype)
    problem.states = [state.astype(dtype) for state in problem.states]
    problem.dstates = [state.astype(dtype) for state in problem.dstates]
    problem.inputs = {name: value.astype(dtype) for name, value in problem.inputs.items()}
    return problem


def both(case: Case, dtype: str, replayed: list[str], **options: Any) -> tuple[Any, Any]:
    layer = build(case, dtype=dtype, **options)
    assert isinstance(layer._plan(case.T, case.N).cell, NumpyCell)
    problem = in_dtype(Problem(case, layer), dtype)
    results = run(case, layer, problem)
    assert {"replay_steps", "replay_backward_steps"} <= {*replayed}
    return results, by_plain_evaluation(case, problem, dtype=dtype, **options)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_equal_plain_evaluation(name: str, lengths: str, replayed: list[str]) -> None:
    case = Case(name, layers=2, directions=2, T=T, lengths=LENGTHS[lengths])
    assert_equal(*both(case, "float64", replayed), bound("float64"))
    case = replace(case, directions=1, states=False, bias=False, batch_first=True)
    assert_equal(*both(case, "float64", replayed), bound("float64"))


@pytest.mark.parametrize("name", NAMES)
def test_in_float32(name: str, replayed: list[str]) -> None:
    case = Case(name, directions=2, T=T, lengths=LENGTHS["some end"])
    assert_equal(*both(case, "float32", replayed), bound("float32"))


@pytest.mark.parametrize("name", NAMES)
def test_with_the_input_product_in_each_step(name: str, replayed: list[str]) -> None:
    case = Case(name, directions=2, T=T, N=replay.MIN_INPUT_ROWS, lengths=None)
    assert_equal(*both(case, "float64", replayed), bound("float64"))


@pytest.mark.parametrize("name", ["zoneout", "projected", "continuous", "slstm"])
def test_recompute(name: str, replayed: list[str]) -> None:
    """With masks, an operand that is saved, an input, and initial values."""
    case = Case(name, layers=2, T=T, lengths=LENGTHS["some end"])
    options = {"recompute": replay.MIN_STEPS}
    assert_equal(*both(case, "float64", replayed, **options), bound("float64"))


@pytest.mark.parametrize("name", NAMES)
def test_equal_autograd(name: str, replayed: list[str]) -> None:
    check(Case(name, T=T, lengths=(T, T - 3, 0)[:3], N=3))
    assert {"replay_steps", "replay_backward_steps"} <= {*replayed}


@pytest.mark.parametrize("name", NAMES)
def test_an_unrecorded_call_agrees(name: str, replayed: list[str]) -> None:
    case = Case(name, T=T, lengths=None)
    layer = build(case)
    problem = Problem(case, layer)
    arguments = problem.x, layers.bare(problem.states)
    layer.eval()
    output, _ = layer(*arguments, **problem.inputs)
    assert replayed
    short = {key: value[:5] for key, value in problem.inputs.items()}
    first, _ = layer(problem.x[:5], arguments[1], **short)  # in rows
    assert_equal({"output": output[:5]}, {"output": first}, bound("float64"))
    if name not in MASKED:
        recorded, _ = layer.train()(*arguments, **problem.inputs)
        assert_equal({"output": recorded}, {"output": output}, bound("float64"))


def test_a_recorded_call_after_an_unrecorded_one(replayed: list[str]) -> None:
    """Only the steps of a recorded call save what backward reads."""
    case = Case("lstm", T=T, lengths=None)
    layer = build(case)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    layer.zero_grad()
    layer.eval()(problem.x, layers.bare(problem.states))
    actual = run(case, layer.train(), problem)
    assert all(np.array_equal(actual[name], value) for name, value in expected.items())


# -- memory


def sized(name: str, N: int) -> tuple[Any, int]:
    """A layer whose smallest arrays with a column for each unit have BIG bytes."""
    units = BIG // 8 // N
    sizes = dict.fromkeys(SIZES.get(name, {}), units)
    options: Any = {"dtype": "float64", "seed": 0, "backend": "numpy", **sizes}
    return xprnn.Recurrent(DEFINITIONS[name], units, units, 2, **options), units


@pytest.mark.parametrize("N", [1, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_allocates_no_array(name: str, N: int) -> None:
    layer, units = sized(name, N)
    stepper, x = layer.stepper(N), np.ones((N, units))
    out, inputs = np.empty((N, units)), dict.fromkeys(layer._spec.cell.extra_inputs, np.ones(N))
    # NumPy's sums over columns allocate an iterator of 900 bytes; Python keeps some memory of the
    # first calls in a process
    assert min([peak(lambda: stepper.step(x, out=out, **inputs)) for _ in range(2)]) < BIG
    assert peak(lambda: stepper.step(x, **inputs)) >= BIG, "the result is counted"


@pytest.mark.parametrize("name", NAMES)
def test_replayed_steps_allocate_no_array(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, units = sized(name, 8)
    original, peaks = replay.replay, []

    def measured(*arguments: Any) -> None:
        tracemalloc.start()
        try:
            original(*arguments)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()

    x = np.ones((64, 8, units))
    inputs = dict.fromkeys(layer._spec.cell.extra_inputs, np.ones((64, 8)))
    output, _ = layer.train()(x, **inputs)
    layer.backward(output)  # everything is captured
    monkeypatch.setattr(replay, "replay", measured)
    layer(x, **inputs)
    layer.backward(output)
    assert len(peaks) == 4  # two layers, forward and backward
    # iterators and views of packed rows, as for built-in cells
    assert max(peaks) < 3 * 64 * SMALL // 8, peaks
