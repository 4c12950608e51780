"""A call's floating-point environment neither depends on the caller's nor changes it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support import control_bits
from tests.support.control_bits import (
    callers_environment,
    control,
    flushing,
    in_a_thread,
    is_flushing,
    needs_flushing,
)
from tests.support.numba_cases import forced, needs_numba, several
from tests.support.public_calls import CALLS
from tests.support.targets import assert_same
from xprnn.backend import floating_point
from xprnn.backend.floating_point import environment

TINY = float(np.finfo(np.float32).tiny)
SIZES = (1.0, 100.0, 1000.0, 2.5 * TINY)  # of inputs, states and gradients


def without_environment(name: str, size: float) -> list[np.ndarray]:
    """What a call computes in the environment of its caller."""
    with callers_environment(), np.errstate(all="ignore"):
        return CALLS[name](size)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_neither_depends_on_nor_changes_the_callers_environment(
    name: str, implementation: str
) -> None:
    def handler(*error: object) -> None:
        raise AssertionError(error)

    def caller() -> None:
        np.seterrcall(handler)
        with np.errstate(all="raise"):
            before = control(), np.geterr(), np.geterrcall(), np.getbufsize()
            for size in SIZES:
                CALLS[name](size)
                assert (control(), np.geterr(), np.geterrcall(), np.getbufsize()) == before
        with np.errstate(all="call"):
            CALLS[name](1000.0)
            assert set(np.geterr().values()) == {"call"}
        assert not control_bits.subnormals_are_lost()

    in_a_thread(caller)
    assert np.geterrcall() is None
    CALLS[name](1.0)
    assert not control_bits.subnormals_are_lost()


@needs_flushing
@pytest.mark.parametrize("name", CALLS)
def test_a_call_keeps_the_flushing_of_its_caller(name: str) -> None:
    with flushing():
        before = control()
        CALLS[name](1.0)
        assert is_flushing() and control() == before
        assert control_bits.subnormals_are_lost()
    assert not is_flushing()


@needs_flushing
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"conversions", "diagnostics", "verify"}))
def test_no_result_is_subnormal(name: str, implementation: str) -> None:
    """Steps, products, losses and moments are zero, but would not be without the environment."""
    size = 2.5 * TINY
    # of the plain code, as a compiled step flushes by itself
    assert control_bits.subnormals(forced("reference", without_environment, name, size)) > 0
    assert control_bits.subnormals(CALLS[name](size)) == 0


@pytest.mark.parametrize("name", CALLS)
def test_ordinary_numbers_keep_their_bits(name: str, implementation: str) -> None:
    assert_same(CALLS[name](1.0), without_environment(name, 1.0))


# -- how a call ends


class StopError(Exception):
    """An error that ends a call half way."""


@pytest.mark.parametrize("raised", [MemoryError, KeyboardInterrupt, StopError])
def test_an_error_leaves_the_callers_environment(
    raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the error was raised, the environment of the call was in effect."""
    seen = []

    def fail(*arguments: Any) -> None:
        seen.append((is_flushing(), np.geterr()["over"]))
        raise raised

    monkeypatch.setattr(xprnn.engine.stack, "forward", fail)
    before, errors = control(), np.geterr()
    with pytest.raises(raised):
        xprnn.GRU(3, 4, seed=0)(np.ones((2, 1, 3), np.float32))
    assert seen == [(environment.flushes, "ignore")]
    assert (control(), np.geterr()) == (before, errors)


def test_a_refused_step_leaves_the_callers_environment() -> None:
    layer = xprnn.LSTM(3, 4, seed=0)
    stepper, before = layer.stepper(1), control()
    with np.errstate(all="raise"), layer.writable():
        with pytest.raises(RuntimeError, match="writable"):
            stepper.step(np.ones((1, 3), np.float32))
        assert control() == before and np.geterr()["under"] == "raise"


# -- numbers that are not finite


def test_infinity_and_nan_are_ordinary_results(implementation: str) -> None:
    """They give no error and no warning, whatever the caller has set."""
    with np.errstate(all="raise"):
        for bad in (np.nan, np.inf):
            x = np.ones((9, 2, 3), np.float32)
            x[4, 1, 0] = bad
            layer = xprnn.RNN(3, 4, nonlinearity="relu", seed=0).train()
            output, h_n = layer(x)
            assert np.isfinite(output[:, 0]).all() and not np.isfinite(output[4:, 1]).all()
            dx, _ = layer.backward(None, np.full_like(h_n, bad))
            assert np.isnan(dx).any()
        with xprnn.RNN(1, 1, nonlinearity="relu", bias=False, seed=0).writable() as flat:
            flat[...] = 1.0
        large = np.full((3, 2), 3e38, np.float32)
        loss, dlarge = xprnn.mse_loss(large, -large)
        assert np.isinf(loss) and np.isinf(dlarge).all()
        loss, _ = xprnn.softmax_cross_entropy(np.full((1, 2), np.inf, np.float32), [0])
        assert np.isnan(loss)


def test_an_overflowing_conversion_behaves_as_in_numpy() -> None:
    large, small = np.full(3, 1e300), np.full(3, 1e-42)
    with np.errstate(all="raise"):
        with pytest.raises(FloatingPointError, match="overflow"):
            xprnn.asarray(large, dtype="float32")
        converted = xprnn.asarray(small, dtype="float32")
    np.testing.assert_array_equal(converted, small.astype(np.float32))
    assert (converted > 0).all()
    with np.errstate(over="ignore"):
        assert np.isinf(xprnn.asarray(large, dtype="float32")).all()


def test_moved_parameters_keep_subnormal_numbers() -> None:
    small = np.full((3, 4), 3e-42, np.float32)
    linear = xprnn.Linear(4, 3, bias=False, seed=0)
    linear.load_state_dict({"weight": small})
    np.testing.assert_array_equal(linear.state_dict()["weight"], small)
    linear.to(dtype="float64")
    np.testing.assert_array_equal(linear.state_dict()["weight"], small.astype(np.float64))
    linear.to(dtype="float32").parameters["weight"] = small
    np.testing.assert_array_equal(linear.parameters["weight"], small)
    stepper = xprnn.RNN(2, 4, seed=0).stepper(1)
    stepper.load(small[None, :1])
    np.testing.assert_array_equal(stepper.state(), small[None, :1])


# -- the environment itself


@needs_flushing
def test_environments_nest_and_keep_other_control_bits() -> None:
    flush = control_bits.FENV_LAYOUT[2]
    for bits in (0, control_bits.UPWARD, flush & -flush):
        with control_bits.with_bits(bits):
            before = control()
            with environment():
                inside = control()
                with environment():
                    assert control() == inside
                assert control() == inside == before | control_bits.FENV_LAYOUT[2]
            assert control() == before
    assert control() != inside


@needs_numba
@needs_flushing
def test_the_threads_of_a_call_flush() -> None:
    from xprnn.kernels.numba import threads

    both, seen = Barrier(2, timeout=60), []

    def look() -> None:
        both.wait()
        seen.append(is_flushing())

    with several(2), threads.pool(2) as pool, environment():
        pool.run([look, look])
    assert seen == [True, True]


@pytest.mark.parametrize("lacking", ["machine", "library", "symbol"])
def test_a_system_without_control_bits_has_the_error_state(
    lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_library(name: str) -> Any:
        raise OSError(name)

    if lacking == "machine":
        monkeypatch.setattr(floating_point.platform, "machine", lambda: "riscv64")
    else:
        load = no_library if lacking == "library" else lambda name: object()
        monkeypatch.setattr(ctypes, "PyDLL", load)
    kind = floating_point._flushing_environment()
    assert not kind.flushes
    before = control()
    with np.errstate(all="raise"):
        with kind():
            assert control() == before
            assert np.isinf(np.float32(3e38) * np.full(1, 10, np.float32)).all()
        with pytest.raises(FloatingPointError):
            np.full(1, 1e38, np.float32) * np.float32(1e38)


def test_a_numpy_that_keeps_its_error_state_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(floating_point, "copy_context", dict)  # an empty context
        state, settings = floating_point._find_error_state()
    monkeypatch.setattr(floating_point, "_error_state", state)
    monkeypatch.setattr(floating_point, "_ignoring", settings)
    with np.errstate(all="raise"):
        before = np.geterr()
        with environment(), environment():
            assert set(np.geterr().values()) == {"ignore"}
        assert np.geterr() == before


STRICT = """
import sys; sys.path.insert(0, {folder!r})
import numpy as np
np.seterr(all="raise")
from tests.support.public_calls import CALLS
for call in CALLS.values():
    for size in (1.0, 1000.0, 3e-38):
        call(size)
from xprnn.backend.floating_point import environment
with environment():
    np.finfo(np.float16), np.finfo(np.float32), np.finfo(np.float64), np.finfo(np.longdouble)
least = [np.finfo(t).smallest_subnormal for t in (np.float16, np.float32, np.float64)]
print([float(number) for number in least], set(np.geterr().values()))
"""


@pytest.mark.parametrize("kernels_option", ["reference", pytest.param("auto", marks=needs_numba)])
def test_a_strict_process(kernels_option: str) -> None:
    """With warnings as errors, without assertions and with every error raised."""
    code = STRICT.format(folder=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-O", "-c", code],
        env={**os.environ, "XPRNN_KERNELS": kernels_option},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[5.960464477539063e-08, 1.401298464324817e-45, 5e-324] {'raise'}\n"
