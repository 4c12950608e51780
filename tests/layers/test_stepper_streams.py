"""Many streams in one stepper: they start, wait and end independently; errors change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import LAYERS, Case, draw, move
from tests.support.streaming import assert_same, assert_streams_apart, make, on_host, sides, stream
from tests.support.targets import normal
from xprnn.backend import Backend
from xprnn.core.checks import check_rows
from xprnn.nn.stepper import Stepper

# on "numba": tests/kernels/numba/test_stepper.py
pytestmark = pytest.mark.usefixtures("reference")
CASES = [
    Case(cell, layers=2, dtype=dtype, compute_dtype=compute_dtype)
    for cell in LAYERS
    for dtype, compute_dtype in (("float64", None), ("float32", "float16"))
]


# -- streams that come and go


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_stream_equals_its_own_sequence(case: Case, any_backend: Backend) -> None:
    assert_streams_apart(case, make(case, any_backend.name))


@pytest.mark.parametrize("fault", ["no row waits", "no row is reset", "another row is reset"])
def test_mixed_up_streams_are_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step, reset = Stepper.step, Stepper.reset
    if fault == "no row waits":
        monkeypatch.setattr(Stepper, "step", lambda self, x, rows=None: step(self, np.tanh(x)))
    elif fault == "no row is reset":
        monkeypatch.setattr(Stepper, "reset", lambda self, rows: None)
    else:
        monkeypatch.setattr(Stepper, "reset", lambda self, rows: reset(self, [1 - rows[0]]))
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        assert_streams_apart(CASES[4], make(CASES[4]))


ROWS = {
    "a mask": np.array([True, False, True, False]),
    "a list of bools": [True, False, True, False],
    "integers": np.array([2, 0]),
    "unsigned integers, some twice": np.array([0, 2, 2], np.uint8),
    "a list": [0, 2],
    "a tuple": (2, 0),
    "a slice": slice(None, None, 2),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("cell", LAYERS)
def test_waiting_rows_keep_their_bits(cell: str, rows: Any, any_backend: Backend) -> None:
    case = Case(cell, layers=2)
    layer, x = make(case, any_backend.name), draw(case).x
    some, every = layer.stepper(4), layer.stepper(4)
    for stepper in (some, every):
        stream(stepper, x[:3])
    before = sides(some)
    last = on_host(some, some.state())[0][-1]
    y = on_host(some, some.step(move(any_backend, x[3]), rows=rows))[0]
    y_every = on_host(every, every.step(move(any_backend, x[3])))[0]
    for old, new, moved in zip(before, sides(some), sides(every), strict=True):
        np.testing.assert_array_equal(new[:, 1::2], old[:, 1::2])
        np.testing.assert_array_equal(new[:, ::2], moved[:, ::2])
        assert (new[:, ::2] != old[:, ::2]).any()
    np.testing.assert_array_equal(y[1::2], last[1::2])
    np.testing.assert_array_equal(y[::2], y_every[::2])

    some.reset(rows)
    for old, new in zip(before, sides(some), strict=True):
        np.testing.assert_array_equal(new[:, 1::2], old[:, 1::2])
        assert not new[:, ::2].any()
    some.reset()
    assert not any(new.any() for new in sides(some))


@pytest.mark.parametrize("nothing", [[], np.zeros(4, bool), slice(0), np.array([], int)])
def test_an_empty_selection_changes_nothing(nothing: Any, any_backend: Backend) -> None:
    case = Case("lstm", layers=2)
    stepper, x = make(case, any_backend.name).stepper(4), draw(case).x
    stream(stepper, x)
    before = sides(stepper)
    stepper.reset(nothing)
    y = stepper.step(move(any_backend, x[0]), rows=nothing)
    assert_same(sides(stepper), before)
    np.testing.assert_array_equal(on_host(stepper, y)[0], before[0][-1])


def test_reset_clears_nan_from_a_row() -> None:
    case = Case("gru", layers=2)
    stepper, x = make(case).stepper(4), draw(case).x
    with_nan = x[0].copy()
    with_nan[1] = np.nan
    y = stepper.step(with_nan)
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2, 3]]).all()
    stepper.reset([1])
    assert np.isfinite(stepper.step(x[1])).all()


# -- invalid arguments: no state advances


Wrong = tuple[Callable[[Stepper, Any, Any], Any], type[Exception], str]

WRONG: dict[str, Wrong] = {  # a call with a valid x and h, and what it raises
    "x of one stream": (lambda s, x, h: s.step(x[0]), ValueError, r"x: expected shape \(4, 3\)"),
    "x of a sequence": (lambda s, x, h: s.step(x[None]), ValueError, r"x: expected shape \(4, 3\)"),
    "x of other rows": (lambda s, x, h: s.step(x[:3]), ValueError, r"x: expected shape \(4, 3\)"),
    "x narrow": (lambda s, x, h: s.step(x.astype("f4")), TypeError, "x: expected dtype float64"),
    "x a list": (lambda s, x, h: s.step([[0.0] * 3] * 4), TypeError, "x: expected a float64"),
    "out": (lambda s, x, h: s.step(x, out=x), ValueError, r"out: expected shape \(4, 5\)"),
    "rows floats": (lambda s, x, h: s.step(x, rows=[0.0]), TypeError, "rows: expected integers or"),
    "rows beyond": (
        lambda s, x, h: s.step(x, rows=[4]),
        ValueError,
        "rows: expected 0 to 3",
    ),
    "rows below": (lambda s, x, h: s.reset([-1]), ValueError, "rows: expected 0 to 3"),
    "rows a number": (lambda s, x, h: s.reset(1), TypeError, "rows: expected a list or NumPy"),
    "rows 2-D": (lambda s, x, h: s.reset([[0]]), ValueError, "rows: expected one dimension"),
    "a short mask": (lambda s, x, h: s.reset([True]), ValueError, r"rows: expected a mask \(4,\)"),
    "a slice of words": (lambda s, x, h: s.reset(slice("a")), TypeError, "rows: slice indices"),
    "a slice of step 0": (lambda s, x, h: s.reset(slice(0, 1, 0)), ValueError, "rows: slice step"),
    "a ragged list": (lambda s, x, h: s.reset([[0], [1, 2]]), ValueError, "rows: expected a list"),
    "no state": (lambda s, x, h: s.load(None), TypeError, "state: expected h and c, got None"),
    "half a state": (lambda s, x, h: s.load(h), TypeError, r"h, c: expected a tuple \(h, c\)"),
    "a wrong h": (lambda s, x, h: s.load((h[:1], h)), ValueError, r"h: expected shape \(2, 4, 5\)"),
    "a wrong c": (lambda s, x, h: s.load((h, h[:, :2])), ValueError, r"c: expected shape \(2, 4"),
    "an unknown type": (lambda s, x, h: s.load((h, "c")), TypeError, "c: expected a float64 array"),
}
host = normal(0, 4, 3)
OTHER_BACKEND: dict[str, Wrong] = {
    "x": (lambda s, x, h: s.step(host), TypeError, "x: expected a float64 array"),
    "rows": (lambda s, x, h: s.step(x, rows=x[0]), TypeError, "rows: expected host integers"),
    "out": (lambda s, x, h: s.step(x, out=normal(0, 4, 5)), TypeError, "out: expected a float64"),
    "state": (lambda s, x, h: s.load((h, normal(0, 2, 4, 5))), TypeError, "c: expected a float64"),
}


def assert_refused(any_backend: Backend, wrong: Wrong) -> None:
    case = Case("lstm", layers=2)
    stepper = make(case, any_backend.name).stepper(4)
    stream(stepper, draw(case).x)
    before, side = sides(stepper), stepper._side
    call, error, message = wrong
    with pytest.raises(error, match=message):
        call(stepper, move(any_backend, host), move(any_backend, normal(1, 2, 4, 5)))
    assert stepper._side == side
    assert_same(sides(stepper), before)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_invalid_arguments_change_nothing(wrong: Wrong, any_backend: Backend) -> None:
    assert_refused(any_backend, wrong)


@pytest.mark.parametrize("wrong", OTHER_BACKEND.values(), ids=OTHER_BACKEND.keys())
def test_arrays_of_another_backend_are_refused(wrong: Wrong, fake_cupy: Backend) -> None:
    assert_refused(fake_cupy, wrong)


def test_a_read_only_out_is_refused() -> None:
    stepper, out = make(Case("gru")).stepper(4), np.zeros((4, 5))
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected an array that can be written"):
        stepper.step(normal(0, 4, 3), out=out)
    assert not stepper.state().any()


@pytest.mark.parametrize("batch", [0, -1, 1.0, True, None])
def test_a_wrong_batch_is_refused(batch: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="batch: expected"):
        xprnn.GRU(3, 4).stepper(batch)


def test_a_bidirectional_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="stepper: expected a layer of one direction"):
        xprnn.GRU(3, 4, bidirectional=True).stepper(1)


def test_a_failed_step_does_not_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("lstm", layers=3)
    layer, x = make(case), draw(case).x
    stepper, other = layer.stepper(4), layer.stepper(4)
    stream(stepper, x[:3])
    stream(other, x[:3])

    def fail() -> None:
        raise KeyboardInterrupt

    for calls in stepper._steps._calls:
        calls.insert(len(calls) // 2, fail)
    with pytest.raises(KeyboardInterrupt):
        stepper.step(x[3])
    for calls in stepper._steps._calls:
        calls.remove(fail)
    np.testing.assert_array_equal(stream(stepper, x[3:]), stream(other, x[3:]))


def test_check_rows_returns_a_copy() -> None:
    mask = np.array([True, False])
    check_rows(mask, 2)[1] = True
    assert mask.tolist() == [True, False]
