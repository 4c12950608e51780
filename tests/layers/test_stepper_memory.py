"""A stepper follows the layer's parameters, allocates nothing in a step, and runs in threads."""

from __future__ import annotations

import pickle
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import LAYERS, Case, draw, move
from tests.support.failing_memory import FakeMemory
from tests.support.implementations import Pool
from tests.support.streaming import assert_same, make, on_host, sides, stream
from tests.support.targets import normal
from tests.unit.test_parameters import WAYS
from xprnn.backend import Backend
from xprnn.engine.step import StepExecutor

# -- the parameters


# on "numba": tests/kernels/numba/test_stepper.py
pytestmark = pytest.mark.usefixtures("reference")


@pytest.mark.parametrize("compute_dtype", [None, "float16"])
@pytest.mark.parametrize("way", [*WAYS, "an optimiser", "a frozen layer's other parameters"])
@pytest.mark.parametrize("cell", LAYERS)
def test_written_parameters_take_effect_at_the_next_step(
    cell: str, way: str, compute_dtype: str | None, any_backend: Backend
) -> None:
    dtype = "float32" if compute_dtype else "float64"
    case = Case(cell, layers=2, dtype=dtype, compute_dtype=compute_dtype)
    layer, x = make(case, any_backend.name), draw(case).x
    stepper = layer.stepper(4)
    stale = stream(stepper, x[:3])
    state = stepper.state()
    write(layer, way, any_backend)
    fresh = layer.stepper(4)
    fresh.load(state)
    outputs = stream(stepper, x[3:])
    np.testing.assert_array_equal(outputs, stream(fresh, x[3:]))
    other = make(case, any_backend.name).stepper(4)
    other.load(state)
    assert not np.array_equal(outputs, stream(other, x[3:])), "the parameters have changed"
    assert stale.shape == outputs.shape


def write(layer: Any, way: str, any_backend: Backend) -> None:
    if way in WAYS:
        values = {
            n: move(any_backend, normal(k, *p.shape).astype(layer.dtype))
            for k, (n, p) in enumerate(layer.parameters.items())
        }
        WAYS[way](layer, values)
        return
    with any_backend.activate():
        layer.grads.flat[...] = 0.25
    if way != "an optimiser":
        layer.freeze("weight_ih_l0")
    xprnn.optim.SGD([layer], lr=0.5).step()


def test_stale_weights_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: a stepper that copies the parameters only once."""
    follow = StepExecutor.follow
    monkeypatch.setattr(
        StepExecutor,
        "follow",
        lambda self, *args: follow(self, *args) if self._version < 0 else None,
    )
    for compute_dtype in (None, "float16"):
        with pytest.raises(AssertionError):
            test_written_parameters_take_effect_at_the_next_step(
                "gru", "writable", compute_dtype, xprnn.get_backend("numpy")
            )


def test_a_step_inside_a_writable_block_is_refused() -> None:
    case = Case("gru", layers=2)
    layer, x = make(case), draw(case).x
    stepper = layer.stepper(4)
    stepper.step(x[0])
    before = sides(stepper)
    with (
        layer.writable() as flat,
        pytest.raises(RuntimeError, match=r"step: not inside a writable\(\) block"),
    ):
        flat *= 0.5
        stepper.step(x[1])
    assert_same(sides(stepper), before)
    stepper.step(x[1])


def test_a_moved_layer_needs_a_new_stepper(fake_cupy: Backend) -> None:
    case = Case("gru", layers=2)
    layer, x = make(case), draw(case).x
    stepper, other = layer.stepper(4), layer.stepper(4)
    stepper.step(x[0])
    other.step(x[0])
    layer.to("numpy")  # new parameters of the same values on the same backend
    with layer.writable() as flat:
        flat *= 0.5
    fresh = layer.stepper(4)
    fresh.load(stepper.state())
    np.testing.assert_array_equal(stepper.step(x[1]), fresh.step(x[1]))
    for target in ({"backend": "fake_cupy"}, {"backend": "numpy", "dtype": "float32"}):
        layer.to(**target)
        for call in (lambda: other.step(x[1]), lambda: pickle.dumps(other)):
            with pytest.raises(ValueError, match="stepper: made on numpy in float64, the layer is"):
                call()
    layer.to("numpy", dtype="float64")
    other.step(x[1])


# -- memory and threads

BIG, SMALL = 2048, 1536  # bytes: the least of an array below, and the most of all other objects


def peak(call: Callable[[], Any]) -> int:
    """The peak of the bytes that a thousand calls allocate."""
    tracemalloc.start()
    try:
        for _ in range(50):
            call()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(1000):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("N", [1, 8])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_allocates_no_array(cell: str, N: int) -> None:
    units = BIG // 8 // N
    kind, options = LAYERS[cell]
    layer = kind(units, units, 2, **options, dtype="float64", seed=0)
    stepper, x = layer.stepper(N), normal(0, N, units)
    out, rows = np.empty((N, units)), np.arange(N) % 2 == 0
    assert peak(lambda: stepper.step(x, out=out)) < SMALL
    assert peak(lambda: stepper.step(x, out=out, rows=rows)) < SMALL + 64
    assert peak(lambda: stepper.step(x)) >= BIG, "the result is counted"
    assert peak(lambda: stepper.reset(rows)) < SMALL


def test_an_allocated_array_is_detected() -> None:
    stepper, x = xprnn.GRU(32, 32, seed=0, dtype="float64").stepper(8), normal(0, 8, 32)
    out = np.empty((8, 32))
    for calls in stepper._steps._calls:
        calls.append(lambda: np.add(x, x))
    assert peak(lambda: stepper.step(x, out=out)) >= BIG


def test_out_is_written_and_returned_and_results_are_copies(any_backend: Backend) -> None:
    case = Case("lstm", layers=2)
    layer, x = make(case, any_backend.name), draw(case).x
    one, other, out = layer.stepper(4), layer.stepper(4), move(any_backend, np.ones((4, 5)))
    for x_t in x:
        y = one.step(move(any_backend, x_t))
        assert y.flags.c_contiguous
        assert other.step(move(any_backend, x_t), out=out) is out
        assert_same(on_host(one, y), on_host(one, out))
        for result in (y, *one.state()):
            result[...] = 7.0  # it belongs to the caller
    assert_same(sides(one), sides(other))
    strided = np.zeros((5, 8)).T[::2]
    if any_backend.name == "numpy":
        assert one.step(x[0], out=strided) is strided
        np.testing.assert_array_equal(strided, other.step(x[0]))


def test_an_out_of_memory_error_names_the_module(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("lstm", layers=2)
    layer, x = make(case, fake_cupy.name), move(fake_cupy, draw(case).x[0])
    stepper, memory = layer.stepper(4), FakeMemory(fake_cupy, monkeypatch)
    for call in (lambda: layer.stepper(4), lambda: stepper.step(x), stepper.state):
        call()
        before, held = sides(stepper), memory.held()
        with (
            memory.failing(1),
            pytest.raises(
                MemoryError, match=r"(Stepper|LSTM) on fake_cupy: Out of memory"
            ) as caught,
        ):
            call()
        assert memory.held() <= held, caught
        assert_same(sides(stepper), before)


@pytest.fixture
def switch_threads_often() -> Iterator[None]:
    """Switch threads as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("cell", LAYERS)
def test_steppers_of_one_layer_run_in_different_threads(
    cell: str, switch_threads_often: None
) -> None:
    case, threads, rounds = Case(cell, layers=2), 4, 20
    layer, x = make(case), draw(case).x
    inputs = [x * (1 + k) for k in range(threads)]
    expected = [stream(layer.stepper(4), own) for own in inputs]
    start = Barrier(threads)

    def run_one(k: int) -> list[np.ndarray]:
        stepper, outputs = layer.stepper(4), []
        start.wait()
        for _ in range(rounds):
            outputs.append(stream(stepper, inputs[k]))
            stepper.reset()
        return outputs

    with Pool(threads) as pool:
        for k, outputs in enumerate(pool.map(run_one, range(threads))):
            for y in outputs:
                np.testing.assert_array_equal(y, expected[k])
