"""Sequence kernels on a GPU: many launches, from two threads, and from two processes at once.

Every call must give the bits of the first one; a kernel that hangs ends at its limit of polls.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.sequence import Function, install
from tests.support.implementations import SelectKernels
from xprnn.backend import Backend
from xprnn.diagnostics.verification.suite import LAYERS
from xprnn.kernels import has_sequence_kernels
from xprnn.kernels.cuda.plan import plan

on_a_gpu = pytest.mark.parametrize(
    "backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True
)
each_cell = pytest.mark.parametrize("cell", LAYERS)
LAUNCHES, TOGETHER = 10_000, 500
N, H, T = 9, 256, 12


@pytest.fixture(autouse=True)
def forced(select_kernels: SelectKernels) -> Iterator[None]:
    select_kernels("sequence")
    plan.cache_clear()
    yield
    plan.cache_clear()


def trainer(
    cell: str, backend: Backend, H: int = H, directions: int = 1, layers: int = 1
) -> Callable[[], list[Any]]:
    """A call and its backward: output, dx and the recurrent weights' gradient."""
    kind, options = LAYERS[cell]
    options = {**options, "bidirectional": directions == 2, "num_layers": layers}
    layer = kind(16, H, seed=0, backend=backend.name, **options)
    if not has_sequence_kernels(layer._spec.cell, backend):
        pytest.skip(f"{cell} has no sequence kernels")
    layer.train()
    rng = np.random.default_rng(0)
    x = backend.from_host(rng.standard_normal((T, N, 16), np.float32))
    doutput = backend.from_host(rng.standard_normal((T, N, directions * H), np.float32))

    def call() -> list[Any]:
        layer.zero_grad()
        output, _ = layer(x)
        dx = layer.backward(doutput)[0]
        return [output, dx, layer.grads["weight_hh_l0"]]

    return call


def repeat(call: Callable[[], list[Any]], backend: Backend, times: int) -> int:
    """The number of elements that differ from the first call's, over all calls."""
    first = [array.copy() for array in call()]
    wrong = sum((array != array).sum() for array in first)  # NaN
    for _ in range(times):
        wrong = wrong + sum((a != b).sum() for a, b in zip(call(), first, strict=True))
    return int(backend.to_host(wrong))


@on_a_gpu
@each_cell
def test_ten_thousand_launches_in_a_row(cell: str, backend: Backend) -> None:
    assert repeat(trainer(cell, backend), backend, LAUNCHES // 2) == 0


@on_a_gpu
@each_cell
def test_both_directions_in_a_row(cell: str, backend: Backend) -> None:
    assert repeat(trainer(cell, backend, directions=2), backend, TOGETHER) == 0


@pytest.mark.frozen
@on_a_gpu
@each_cell
def test_wavefronts_in_a_row(cell: str, backend: Backend, select_kernels: SelectKernels) -> None:
    select_kernels("wave")
    assert repeat(trainer(cell, backend, layers=3), backend, TOGETHER) == 0


@on_a_gpu
@each_cell
def test_two_streams_at_once(cell: str, backend: Backend) -> None:
    """Each thread has its own stream: neither starves, neither reads the other's arrays."""
    trainer(cell, backend)  # skips cells without sequence kernels
    counts: list[int] = []

    def run() -> None:
        with backend.activate(), backend.xp.cuda.Stream(non_blocking=True) as stream:
            counts.append(repeat(trainer(cell, backend), backend, TOGETHER))
            stream.synchronize()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [0, 0]


@on_a_gpu
@each_cell
def test_two_processes_at_once(cell: str, backend: Backend) -> None:
    trainer(cell, backend)  # skips cells without sequence kernels
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import xprnn; from tests.gpu import test_sequence as t\n"
        "backend = xprnn.get_backend('cupy')\n"
        f"print(t.repeat(t.trainer({cell!r}, backend), backend, t.TOGETHER))\n"
    )
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    try:
        printed = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [out.split() for out, _ in printed] == [["0"], ["0"]], printed


# -- the same on the emulator, with few calls


@pytest.fixture
def device(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Backend:
    install(monkeypatch)
    select_kernels("sequence")
    return fake_cupy


@needs_compiler
def test_calls_in_a_row_on_the_emulator(device: Backend) -> None:
    for directions in (1, 2):
        Function.launches.clear()
        assert repeat(trainer("gru", device, 24, directions), device, 3) == 0
        assert [grid[2] for _, grid in Function.launches] == [directions] * 2 * 4


@needs_compiler
def test_a_call_that_differs_is_counted(device: Backend) -> None:
    call = trainer("gru", device, H=24)
    calls = 0

    def now_and_then() -> list[Any]:
        nonlocal calls
        calls += 1
        output, *gradients = call()
        if calls == 3:
            output[1, 2, 3] = 9.0
        return [output, *gradients]

    assert repeat(now_and_then, device, 3) == 1
    assert repeat(lambda: [device.from_host(np.full(2, np.nan, np.float32))], device, 1) == 4
