"""The device report on the fake CuPy: emulated sequence kernels, compared and without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import xprnn
from benchmarks.device import peaks, rows
from benchmarks.device.problems import BOTH, FORWARD, Problem
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run
from tests.support.fake_cupy import sequence as fake_sequence
from tests.support.fake_cupy.sequence import Function, install
from tests.support.implementations import SelectKernels
from xprnn.backend import Backend
from xprnn.kernels.cuda import cells, sequence
from xprnn.kernels.cuda.plan import plan
from xprnn.tools.bench import clock


@pytest.fixture
def device(fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The fake CuPy on a current device, with the host's clock."""
    install(monkeypatch)
    monkeypatch.setattr(peaks, "timer", lambda backend: clock._seconds)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)
    monkeypatch.setattr(peaks, "SHORT", 0.0)
    allocators: list[Any] = []

    @contextmanager
    def using(allocate: Any) -> Iterator[None]:
        allocators.append(allocate)
        yield

    cuda = fake_cupy.xp.cuda
    monkeypatch.setattr(cuda, "using_allocator", using, False)
    monkeypatch.setattr(cuda, "get_allocator", lambda: "the one in use", False)
    plan.cache_clear()
    yield fake_cupy
    plan.cache_clear()
    assert all(allocate.args == ("the one in use",) for allocate in allocators)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16"])
def test_both_kernels_are_compared(dtype: str, device: Backend) -> None:
    results, absent = rows.compared(Problem("gru", dtype, 2, 32, 9), device)
    names = [(row["kernels"], row["pass"]) for row in results]
    assert names == [(k, p) for k in ("sequence", "pointwise") for p in (FORWARD, BOTH)]
    assert not absent and not any(row["wrong"] for row in results)
    assert all(0 < row["error"] <= row["limit"] for row in results)
    assert {name.partition("<")[0] for name, _ in Function.launches} == {
        "xprnn::gru_forward",
        "xprnn::gru_backward",
    }


@needs_compiler
def test_both_directions_are_compared_in_one_launch(device: Backend) -> None:
    results, _ = rows.compared(Problem("lstm", "float32", 2, 32, 9, directions=2), device)
    assert {row["direction"] for row in results} == {"both"}
    assert not any(row["wrong"] for row in results)
    assert {grid[2] for _, grid in Function.launches} == {2}


@needs_compiler
def test_a_wrong_sign_in_one_kernel_is_reported_in_its_rows(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = ("n = tanh_of(gx_n + r * gh_n)", "n = tanh_of(gx_n - r * gh_n)")
    faulty = partial(fake_sequence.launch, faults=(sign,))
    monkeypatch.setattr(fake_sequence, "launch", faulty)
    results, _ = rows.compared(Problem("gru", "float32", 2, 32, 9), device)
    assert [bool(row["wrong"]) for row in results] == [True, True, False, False]


@needs_compiler
def test_kernels_that_do_not_fit_are_reported(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, multiProcessorCount=1)
    plan.cache_clear()
    results, (absent,) = rows.compared(Problem("gru", "float32", 2, 32, 9), device)
    assert {row["kernels"] for row in results} == {"pointwise"}
    assert absent["kernels"] == "sequence" and "2 blocks must run at once" in absent["reason"]


@needs_compiler
def test_results_that_no_kernel_writes_are_wrong(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that is not launched leaves the NaN of new memory."""
    monkeypatch.setattr(cells, "launch", lambda xp, name, *rest: None)
    results, _ = rows.compared(Problem("gru", "float32", 2, 32, 9), device)
    wrong = {(row["kernels"], row["pass"]): row["wrong"] for row in results}
    assert not wrong["sequence", FORWARD] and not wrong["sequence", BOTH]
    assert "is not finite" in wrong["pointwise", FORWARD]
    assert all(row["error"] is None for row in results if row["kernels"] == "pointwise")


@needs_compiler
@pytest.mark.parametrize("training", [False, True])
def test_steps_without_waiting_wait_for_no_block(
    training: bool, device: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    """With one resident block, waiting for another block would never end."""
    select_kernels("sequence")
    layer = xprnn.GRU(32, 32, seed=0, backend=device.name)
    x = device.from_host(np.random.default_rng(0).standard_normal((5, 3, 32), np.float32))

    def call() -> None:
        output, _ = (layer.train() if training else layer)(x)
        if training:
            layer.backward(output)

    original = peaks.measure

    def alone(functions: Any, *rest: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Function, "run", Run(resident=1))
            return original(functions, *rest)

    monkeypatch.setattr(peaks, "measure", alone)
    monkeypatch.setattr(sequence, "MAX_POLLS", 50)
    assert peaks.without_waiting(call, device) > 0
    assert len({name for name, _ in Function.launches}) == 1 + training
    device.synchronize()  # no kernel timed out
    assert "launch" not in vars(device.cooperative)
    monkeypatch.setattr(Function, "run", Run(resident=1))
    with pytest.raises((xprnn.KernelStoppedError, RuntimeError)):  # the control
        call()
        device.synchronize()


# -- new memory


def test_new_memory_is_filled() -> None:
    memory = bytearray(8)

    def memset_async(value: int, nbytes: int) -> None:
        memory[:nbytes] = bytes([value]) * nbytes

    allocate = partial(rows.filled, lambda nbytes: SimpleNamespace(memset_async=memset_async))
    allocate(8)
    for dtype in ("float16", "float32", "float64"):
        assert np.isnan(np.frombuffer(memory, dtype)).all()


@pytest.mark.parametrize("backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_memory_is_poisoned_on_a_gpu(backend: Backend) -> None:
    with rows.poisoned(backend):
        assert bool(backend.xp.isnan(backend.xp.empty(1000, "float32")).all())
