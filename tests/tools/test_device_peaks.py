"""The inputs of the device report's bounds: latency, clocks, operations and bytes."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import xprnn
from benchmarks.device import bounds, peaks
from benchmarks.device.peaks import Peaks
from benchmarks.device.problems import BOTH, FORWARD, Problem
from tests.support.emulator.build import OUTCOMES, compiled, emulator_source
from tests.support.emulator.elementwise import COMPILER, needs_compiler
from tests.support.fake_cupy import sequence as fake_sequence
from tests.support.fake_cupy.array import FakeModule
from tests.support.fake_cupy.devices import H200
from xprnn.backend import Backend
from xprnn.kernels.cuda import loading
from xprnn.tools.bench import clock

on_a_gpu = pytest.mark.parametrize(
    "backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True
)
APART, ROUNDS, TAG = 64, 20, 5 << 24
PING_PONG = Path(peaks.__file__).parent / "ping_pong.cu"


# -- ping_pong, emulated


@pytest.fixture(scope="module")
def ping_pong() -> Callable[..., Any]:
    """`ping_pong.cu` compiled for the host: (outcome, words, report) of a run."""
    if COMPILER is None:
        pytest.skip("g++ is not installed, which compiles the kernels for the host")

    def build(*faults: tuple[str, str]) -> Any:
        code = f"""{emulator_source(("common.h", "device.h", PING_PONG), faults)}
extern "C" int run(unsigned* words, unsigned apart, unsigned rounds, unsigned max_polls,
                   unsigned* report, unsigned tag, unsigned seed, int resident) {{
  return emulator::launch({{2, 1, 1}}, 32, 0, seed, resident,
                        [=] {{ xprnn::ping_pong(words, apart, rounds, max_polls, report, tag); }});
}}
"""
        return compiled("ping_pong", code)

    def run(library: Any, seed: int = 0, resident: int = 0, max_polls: int = 1 << 30) -> Any:
        words, report = np.zeros(APART + 1, np.uint32), np.zeros(1, np.uint32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (words, report)]
        sizes = map(ctypes.c_uint, (APART, ROUNDS, max_polls))
        rest = ctypes.c_uint(TAG), ctypes.c_uint(seed), resident
        outcome = OUTCOMES[library.run(pointers[0], *sizes, pointers[1], *rest)]
        return outcome, words, int(report[0])

    return lambda *faults, **how: run(build(*faults), **how)


@needs_compiler
@pytest.mark.parametrize("seed", range(6))
def test_words_are_exchanged(seed: int, ping_pong: Callable[..., Any]) -> None:
    outcome, words, report = ping_pong(seed=seed)
    assert (outcome, report) == ("fine", 0)
    assert words[0] == words[APART] == ROUNDS and words.sum() == 2 * ROUNDS


@needs_compiler
def test_a_block_that_is_alone_times_out(ping_pong: Callable[..., Any]) -> None:
    """It reports this; a removed wait and a word that is never sent have other results."""
    assert ping_pong(resident=1, max_polls=50)[2] > TAG
    assert ping_pong(("poll(other) != k", "poll(other) == ~k"), resident=1, max_polls=50)[2] == 0
    assert ping_pong(("if (!first) publish(mine, k);", ""), max_polls=50)[2] > TAG


# -- the sweep, emulated


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_byte_is_read(blocks: int) -> None:
    """Whatever the position of the only word that is not zero."""

    def swept(count: int, at: int | None, *faults: tuple[str, str]) -> int:
        code = f"""{emulator_source(("common.h", "device.h", PING_PONG), faults)}
extern "C" int run(void* data, unsigned count, unsigned rounds, unsigned* sum, int blocks) {{
  return emulator::launch({{blocks, 1, 1}}, 1024, 0, 0, 0,
                        [=] {{ xprnn::sweep((uint4*)data, count, rounds, blocks, sum); }});
}}
"""
        data, total = np.zeros(4 * count, np.uint32), np.zeros(1, np.uint32)
        if at is not None:
            data[at] = 1 << 31
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (data, total)]
        sizes = ctypes.c_uint(count), ctypes.c_uint(1)
        outcome = compiled("sweep", code).run(pointers[0], *sizes, pointers[1], blocks)
        assert OUTCOMES[outcome] == "fine"
        return int(total[0])

    count = 1024 * blocks + 5
    positions = 0, 1, 2, 3, 4 * 1024 - 1, 4 * count - 4, 4 * count - 1
    assert [swept(count, at) for at in positions] == [1] * len(positions)
    assert swept(count, None) == 0
    assert swept(count, 4 * count - 1, ("(count + blocks - 1) / blocks", "count / blocks")) == (
        count % blocks == 0
    )
    assert swept(count, 3, ("v.x | v.y | v.z | v.w", "v.x | v.y | v.z")) == 0


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_the_ping_pong_compiles(architecture: str) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    from cupy.cuda import compiler

    from tests.support.nvrtc import compile_sources

    results = compile_sources([peaks.source()], architecture)
    assert len(results) == 3 and not any(used.stack or used.spilled for used in results.values())
    names = ("xprnn::ping_pong", "xprnn::poll_words", "xprnn::sweep")  # as RawModule asks for them
    program = compiler._NVRTCProgram(
        peaks.source(), "ping_pong.cu", name_expressions=names, method="ptx"
    )
    code, mapping = program.compile((f"-arch=compute_{architecture}", "--std=c++17"))
    assert mapping.keys() == {*names}
    text = code.decode()
    assert text.count("ld.relaxed.gpu.global.u32") >= 2 and "st.relaxed.gpu.global.u32" in text


# -- launches


class Launched:
    """Like `cupy.RawKernel`: a one-dimensional cooperative grid is cut to what the device holds."""

    held = 66  # blocks
    blocks: ClassVar[list[int]] = []  # of each launch

    def __init__(self, cooperative: bool) -> None:
        self.cooperative = cooperative

    def __call__(
        self, grid: tuple[int, ...], block: Any, args: Any, *, shared_mem: int = 0
    ) -> None:
        blocks = math.prod(grid)
        if self.cooperative and blocks > self.held:
            assert math.prod(grid[1:]) == 1, "the specified grid size exceeds the limit"
            blocks = self.held
        self.blocks.append(blocks)


def test_timed_kernels_are_launched_with_all_of_their_blocks(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the device holds only half of the grid at once, as with another process on it."""

    class RawModule:
        def __init__(self, *, enable_cooperative_groups: bool, **_: Any) -> None:
            self.function = Launched(enable_cooperative_groups)

        def get_function(self, name: str) -> Launched:
            return self.function

    fake_sequence.install(monkeypatch)
    monkeypatch.setattr(FakeModule, "RawModule", RawModule)
    monkeypatch.setattr(Launched, "blocks", [])
    monkeypatch.setattr(peaks, "timer", lambda backend: clock._seconds)
    monkeypatch.setattr(peaks, "BUDGET", 0.0)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)
    loading.kernel.cache_clear()
    try:
        peaks.measure_read.__wrapped__(fake_cupy, 1 << 12)
    finally:
        loading.kernel.cache_clear()
    assert {*Launched.blocks} == {H200["multiProcessorCount"]}


def test_a_word_that_does_not_arrive_does_not_end_the_report(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def stopped(*arguments: Any) -> Any:
        raise xprnn.KernelStoppedError("kernel ping_pong timed out at step 3")

    monkeypatch.setattr(peaks, "measure_latency", stopped)
    monkeypatch.setattr(
        peaks, "torch_for", lambda task: (torch, torch.device("cpu"), torch.float32)
    )
    monkeypatch.setattr(peaks, "timer", lambda backend: clock._seconds)
    monkeypatch.setattr(peaks, "BUDGET", 0.0)
    results = peaks.measure_peaks(fake_cupy, ("float32",), side=32, copied=1 << 16)
    assert results.bandwidth > 0 < results.rate("float32") and results[2:] == (None, None, None)
    assert capsys.readouterr().out == "latency not measured: kernel ping_pong timed out at step 3\n"


# -- clocks


class Queue:
    """A stream on which work takes time, and events that have a time once they are waited for."""

    def __init__(self) -> None:
        self.now, self.waiting = 0.0, []

    def work(self, milliseconds: float) -> None:
        self.waiting.append(lambda: setattr(self, "now", self.now + milliseconds))

    def drain(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def cuda(self) -> Any:
        queue = self

        class Event:
            at = None

            def record(self) -> None:
                queue.waiting.append(lambda: setattr(self, "at", queue.now))

            def synchronize(self) -> None:
                queue.drain()

        def elapsed(start: Event, stop: Event) -> float:
            if start.at is None or stop.at is None:
                raise RuntimeError("cudaErrorNotReady: device not ready")
            return stop.at - start.at

        return SimpleNamespace(Event=Event, get_elapsed_time=elapsed)


def test_the_clock_waits_for_the_device(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts the device's time of the calls only; without the wait the events are not ready."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    queue = Queue()
    cuda = queue.cuda()
    monkeypatch.setattr(cupy, "cuda", cuda)
    monkeypatch.setattr(fake_cupy, "synchronize", queue.drain)
    seconds = clock.timer(fake_cupy)
    queue.work(1000.0)  # earlier work
    assert seconds(lambda: queue.work(2.5), 4) == pytest.approx(0.01)
    monkeypatch.setattr(cuda.Event, "synchronize", lambda self: None)
    with pytest.raises(RuntimeError, match="not ready"):
        seconds(lambda: queue.work(2.5), 4)


# -- bounds


MEASURED = Peaks(4e12, {"float32": 5e13, "tf32": 4e14, "bfloat16": 8e14}, 6e-7, 2e-7)


def test_bounds() -> None:
    small, large = Problem("gru", "bfloat16", 1, 256, 512), Problem("lstm", "tf32", 256, 1024, 128)
    assert bounds.operations(small, FORWARD) == 2 * 3 * 256 * 512 * 512
    assert bounds.bytes_moved(small, FORWARD) == 2 * (2 * 512 * 256 + 2 * 3 * 256 * 256)
    assert bounds.operations(large, BOTH) == 3 * 2 * 4 * 1024 * 2048 * 256 * 128
    assert bounds.bytes_moved(large, BOTH) == 4 * (6 * 128 * 256 * 1024 + 3 * 8 * 1024 * 1024)
    assert bounds.call_bound(small, FORWARD, MEASURED, None) == (pytest.approx(512 * 6e-7), "steps")
    both = bounds.call_bound(small, BOTH, MEASURED, 3e-4)  # which includes a poll
    assert both == (pytest.approx(2 * 512 * 4e-7 + 3e-4), "steps")
    least = bounds.operations(large, BOTH) / 4e14
    assert bounds.call_bound(large, BOTH, MEASURED, None) == (pytest.approx(least), "operations")
    pair = large._replace(directions=2)
    assert bounds.operations(pair, BOTH) == 2 * bounds.operations(large, BOTH)
    assert bounds.bytes_moved(pair, FORWARD) == 4 * (3 * 128 * 256 * 1024 + 2 * 8 * 1024 * 1024)
    steps = bounds.call_bound(small._replace(directions=2), FORWARD, MEASURED, None)
    assert steps == (pytest.approx(512 * 6e-7), "steps")
    slow = MEASURED._replace(bandwidth=1e9)
    assert bounds.call_bound(large, FORWARD, slow, None)[1] == "bytes"


def test_three_tf32_products_are_one_of_float32() -> None:
    assert MEASURED.rate("float32") == pytest.approx(4e14 / 3)
    assert MEASURED._replace(rates={"float32": 5e13}).rate("float32") == 5e13
    assert MEASURED.rate("bfloat16") == 8e14


# -- on a GPU


@on_a_gpu
def test_a_launch_and_a_read_have_plausible_times(backend: Backend) -> None:
    assert 2e-7 < peaks.measure_launch(backend, clock.timer(backend)) < 1e-4
    small, large = (peaks.measure_read(backend, nbytes, rounds=20) for nbytes in (1 << 22, 1 << 29))
    assert small > 1e-7 and 30 * small < large < 1e-2  # data larger than L2 take longer still


@on_a_gpu
def test_a_handover_takes_longer_than_a_poll(backend: Backend) -> None:
    started = time.perf_counter()
    latency, poll = peaks.measure_latency(backend, clock.timer(backend), rounds=500, places=3)
    assert 1e-8 < poll < latency < 1e-4 and time.perf_counter() - started < 30
