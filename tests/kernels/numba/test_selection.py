"""Numba in use: chosen, explained, imported late, kept on disk, in threads and after a fork."""

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
    """One thread."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    kernels.forget_plans()  # what "auto" took
    yield
    kernels.forget_plans()


def explained(layer: xprnn.GRU, shape: tuple[int, ...] = (12, 4, 3)) -> list[str]:
    return layer.explain(shape).splitlines()


@needs_numba
def test_the_table_chooses_them(automatic: None) -> None:
    lines = explained(xprnn.GRU(3, 8, seed=0))
    assert lines[0].endswith("T=12 N=4: sequence")
    assert lines[1] == "  reason: the fastest that fits"
    assert lines[-1] == "  one call runs all steps of a direction of a layer"
    lines = explained(xprnn.GRU(3, 8, seed=0, reset_after=False))
    assert lines[0].endswith(": pointwise")
    assert lines[-1] == "  sequence: forward: no sequence kernel for cell 'gru_reset_before'"


@needs_numba
def test_calls_of_many_sizes_leave_no_engines_behind(automatic: None) -> None:
    """Each reason names the sizes that it is for."""
    layer = xprnn.GRU(3, 4, seed=0)
    for N in range(1, 600):
        layer(np.zeros((1, N, 3), np.float32))
    assert len(layer._plans) < 300


@needs_numba
def test_what_they_are_not_made_for_is_left_to_the_parts(
    automatic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = xprnn.GRU(3, 256, seed=0)
    first, *_, last = explained(layer, (2, 3, 3))
    assert first.endswith(": pointwise")
    assert last == "  sequence: N=3 T=2: to pack the weights takes longer than so few steps"
    assert explained(layer, (12, 64, 3))[0].endswith(": sequence")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "8")
    assert explained(layer, (12, 64, 3))[0].endswith(": sequence")


@needs_numba
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_stepper_is_left_to_the_plain_code(kind: str, automatic: None) -> None:
    layer = getattr(xprnn, kind)(3, 8, num_layers=2, seed=0)
    expected, _ = forced("reference", layer, X)
    stepper = layer.stepper(4)
    found = np.stack([stepper.step(x).copy() for x in X])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@needs_numba
def test_narrow_types_are_left_to_the_plain_code(automatic: None) -> None:
    layer = xprnn.GRU(3, 8, seed=0, compute_dtype="float16")
    lines = explained(layer)
    assert lines[0].endswith(": reference")
    assert lines[-1].endswith("the CPU's kernels compute in float32 or float64, not in float16")
    assert np.isfinite(layer(X)[0]).all()


@pytest.mark.parametrize("forced_to", ["auto", "pointwise", "sequence"])
def test_without_numba_it_is_said_what_would_help(
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
def there(): return "numba" in sys.modules
layer = xprnn.GRU(3, 8, seed=0)
x = np.ones((12, 4, 3), "f")
import os; os.environ["XPRNN_KERNELS"] = "reference"
layer(x); layer.explain((12, 4, 3)); print(there())
os.environ["XPRNN_KERNELS"] = "auto"
layer(x); print(there())
"""
    assert python(code).split() == ["False", "True"]


def unaligned(x: np.ndarray) -> np.ndarray:
    place = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    place[...] = x
    assert not place.flags.aligned
    return place


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


@needs_numba
@pytest.mark.parametrize("kernels", ["reference", "sequence"])
@pytest.mark.parametrize("lengths", [None, [12, 5, 0, 7]])
def test_x_may_stand_as_it_likes(kernels: str, lengths: Any) -> None:
    """Where nothing is recorded it is read where it stands, if compiled code can."""
    layer, as_is = xprnn.GRU(3, 8, num_layers=2, seed=0), X.copy()
    expected, _ = forced(kernels, lambda x: layer(x, lengths=lengths), as_is)
    for way in (unaligned, read_only, np.asfortranarray, lambda x: x[:, ::-1].copy()[:, ::-1]):
        found, _ = forced(kernels, lambda x: layer(x, lengths=lengths), way(X))
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(as_is, X)
    as_is[...] = 0.0
    np.testing.assert_array_equal(found, expected)


@needs_numba
def test_they_let_other_threads_run() -> None:
    """While a kernel works, another thread counts on: it does not hold Python's lock."""
    code = """
import threading, time, numpy as np, xprnn
layer = xprnn.GRU(256, 256, seed=0)
x = np.ones((400, 32, 256), "f")
layer(x)
from xprnn.kernels.numba.sequence import NumbaRunner
inside, seen = threading.Event(), []
genuine = NumbaRunner.forward
def forward(self, *arguments):
    inside.set()
    start = time.perf_counter()
    found = genuine(self, *arguments)
    seen.append((start, time.perf_counter()))
    return found
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
def test_an_unrecorded_call_has_no_gates(kind: str) -> None:
    """Beside states and outputs it takes what some steps need, not what all of them would."""
    layer, other = (getattr(xprnn, kind)(8, 64, bidirectional=True, seed=0) for _ in range(2))
    x = np.ones((400, 32, 8), np.float32)
    forced("sequence", other, x)  # compiled
    tracemalloc.start()
    try:
        forced("sequence", layer, x)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    states = 2 * len(layer._stack.cell.state_names)
    # the directions' states, what the layer hands up, the output, and all else
    assert peak < (states + 2 + 2 + 1) * 400 * 32 * 64 * 4
