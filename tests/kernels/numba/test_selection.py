"""Selection of the Numba kernels: explained, imported lazily, and what they allocate and copy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.implementations import SelectKernels
from tests.support.numba_cases import forced, needs_numba, python
from xprnn import kernels

X = np.random.default_rng(0).standard_normal((12, 4, 3)).astype(np.float32)


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Automatic selection with one thread of the BLAS."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    kernels.forget_plans()  # cached plans of "auto"
    yield
    kernels.forget_plans()


def explained(layer: xprnn.GRU, shape: tuple[int, ...] = (12, 4, 3)) -> list[str]:
    return layer.explain(shape).splitlines()


@needs_numba
def test_numba_kernels_are_selected(automatic: None) -> None:
    lines = explained(xprnn.GRU(3, 8, seed=0))
    assert lines[0].endswith("T=12 N=4: sequence")
    assert lines[1] == "  reason: the fastest that fits"
    assert lines[-1] == "  one call runs all steps of a direction of a layer"
    lines = explained(xprnn.GRU(3, 8, seed=0, reset_after=False))
    assert lines[0].endswith("T=12 N=4: sequence")


@needs_numba
def test_the_number_of_cached_plans_is_bounded(automatic: None) -> None:
    """The reason in a plan names the sizes of its call."""
    layer = xprnn.GRU(3, 4, seed=0)
    for N in range(1, 600):
        layer(np.zeros((1, N, 3), np.float32))
    assert len(layer._plans) < 300


@needs_numba
def test_unsuitable_sizes_select_the_pointwise_kernels(
    automatic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = xprnn.GRU(3, 256, seed=0)
    first, *_, last = explained(layer, (2, 3, 3))
    assert first.endswith(": pointwise")
    assert last == "  sequence: N=3 T=2: packing the weights takes longer than so few steps"
    assert explained(layer, (12, 64, 3))[0].endswith(": sequence")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    assert explained(layer, (12, 64, 3))[0].endswith(": sequence")


@needs_numba
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_stepper_equals_the_reference_code(kind: str, automatic: None) -> None:
    layer = getattr(xprnn, kind)(3, 8, num_layers=2, seed=0)
    expected, _ = forced("reference", layer, X)
    stepper = layer.stepper(4)
    actual = np.stack([stepper.step(x).copy() for x in X])
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@needs_numba
def test_low_precision_selects_the_reference_code(automatic: None) -> None:
    layer = xprnn.GRU(3, 8, seed=0, compute_dtype="float16")
    lines = explained(layer)
    assert lines[0].endswith(": reference")
    assert lines[-1].endswith("the CPU's kernels compute in float32 or float64, not in float16")
    assert np.isfinite(layer(X)[0]).all()


@pytest.mark.parametrize("forced_to", ["auto", "pointwise", "sequence"])
def test_without_numba_the_extra_is_named(
    forced_to: str, automatic: None, without_numba: None, select_kernels: SelectKernels
) -> None:
    select_kernels(forced_to)
    layer = xprnn.GRU(3, 8, seed=0)
    if forced_to == "auto":
        lines = explained(layer)
        assert lines[0].endswith(": reference")
        assert len([line for line in lines if line.endswith("pip install xprnn[numba]")]) == 2
    else:
        with pytest.raises(xprnn.KernelUnavailableError, match=r"pip install xprnn\[numba\]"):
            layer(X)


@needs_numba
def test_numba_is_imported_when_it_is_used() -> None:
    code = """
import sys, numpy as np, xprnn
def imported(): return "numba" in sys.modules
layer = xprnn.GRU(3, 8, seed=0)
x = np.ones((12, 4, 3), "f")
import os; os.environ["XPRNN_KERNELS"] = "reference"
layer(x); layer.explain((12, 4, 3)); print(imported())
os.environ["XPRNN_KERNELS"] = "auto"
layer(x); print(imported())
"""
    assert python(code).split() == ["False", "True"]


def unaligned(x: np.ndarray) -> np.ndarray:
    view = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


@needs_numba
@pytest.mark.parametrize("kernels", ["reference", "sequence"])
@pytest.mark.parametrize("lengths", [None, [12, 5, 0, 7]])
def test_x_may_have_any_memory_layout(kernels: str, lengths: Any) -> None:
    """An unrecorded call reads x without a copy, if compiled code can."""
    layer, as_is = xprnn.GRU(3, 8, num_layers=2, seed=0), X.copy()
    expected, _ = forced(kernels, lambda x: layer(x, lengths=lengths), as_is)
    for way in (unaligned, read_only, np.asfortranarray, lambda x: x[:, ::-1].copy()[:, ::-1]):
        actual, _ = forced(kernels, lambda x: layer(x, lengths=lengths), way(X))
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(as_is, X)
    as_is[...] = 0.0
    np.testing.assert_array_equal(actual, expected)


@needs_numba
def test_kernels_release_the_lock_of_the_interpreter() -> None:
    """While a kernel runs, another Python thread continues."""
    code = """
import threading, time, numpy as np, xprnn
layer = xprnn.GRU(256, 256, seed=0)
x = np.ones((400, 32, 256), "f")
layer(x)
from xprnn.kernels.numba.sequence import NumbaRunner
inside, seen = threading.Event(), []
original = NumbaRunner.forward
def forward(self, *arguments):
    inside.set()
    start = time.perf_counter()
    actual = original(self, *arguments)
    seen.append((start, time.perf_counter()))
    return actual
NumbaRunner.forward = forward
ticks = []
def tick():
    inside.wait()
    while not seen:
        ticks.append(time.perf_counter())
        time.sleep(0.001)
other = threading.Thread(target=tick)
other.start()
layer(x)
other.join()
start, stop = seen[0]
print(len([t for t in ticks if start + 0.1 * (stop - start) < t < stop - 0.1 * (stop - start)]))
"""
    assert int(python(code, XPRNN_KERNELS="sequence", OMP_NUM_THREADS="1")) > 5


@needs_numba
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_an_unrecorded_call_saves_no_gates(kind: str) -> None:
    """Besides states and outputs it allocates memory for some steps, not for all of them."""
    layer, other = (getattr(xprnn, kind)(8, 64, bidirectional=True, seed=0) for _ in range(2))
    x = np.ones((400, 32, 8), np.float32)
    forced("sequence", other, x)  # compiled
    tracemalloc.start()
    try:
        forced("sequence", layer, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    states = 2 * len(layer._spec.cell.state_names)
    # the states of both directions, the layer's output, the call's output, and the rest
    assert peak < (states + 2 + 2 + 1) * 400 * 32 * 64 * 4
