"""Persistent kernels: serialized launches on a device, and reports of timeouts."""

from __future__ import annotations

import inspect
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy.cuda import LOG
from tests.support.fake_cupy.launch import Gpu, Stream, times_out
from tests.support.operations import PARTS, Case
from tests.support.targets import arguments, arrays, assert_same, forward, make, run
from xprnn.backend import Backend
from xprnn.backend.cooperative import CooperativeKernels, LaunchShape
from xprnn.backend.cupy import CupyBackend

SEEDS = range(50)
SHAPE = LaunchShape((3, 2), 256, 100_000)  # the device holds 8 blocks: no two launches at once


def launches(gpu: Gpu, count: int) -> None:
    """`count` launches from each of two threads, on two streams, in any order."""
    kernels = CooperativeKernels(gpu.cupy, 0)
    kernel, streams = gpu.kernel(), [Stream(gpu) for _ in range(2)]

    def submit(stream: Stream) -> None:
        with stream:
            for _ in range(count):
                kernels.launch("k", kernel, SHAPE, (np.int32(5),))

    threads = [threading.Thread(target=submit, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_launches_of_two_streams_are_serialized() -> None:
    for seed in SEEDS:
        gpu = Gpu(processors=8)
        launches(gpu, 5)
        assert sum(len(stream.queue) for stream in gpu.streams) == 2 * 5 * 3 - 1
        gpu.run(seed)


def starves(gpu: Gpu) -> bool:
    try:
        gpu.run(seed=0)
    except AssertionError:
        return True
    return False


def test_launches_that_are_not_serialized_starve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected faults: no wait, then no record."""
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "wait_event", lambda self, event: None)
        gpu = Gpu(processors=8)
        launches(gpu, 5)
        assert starves(gpu)
    gpu = Gpu(processors=8)
    monkeypatch.setattr(gpu.cupy.cuda.Event, "record", lambda self, stream: None)
    launches(gpu, 5)
    assert starves(gpu)


@pytest.mark.parametrize("locked", [True, False])
def test_the_lock_is_needed(locked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for the same previous launch would run concurrently."""
    gpu = Gpu(processors=8)
    kernels, streams = CooperativeKernels(gpu.cupy, 0), [Stream(gpu) for _ in range(2)]
    kernel, barrier = gpu.kernel(), threading.Barrier(2)
    if not locked:
        monkeypatch.setattr(kernels, "_lock", nullcontext())
    with streams[0]:
        kernels.launch("k", kernel, SHAPE, ())
    wait = Stream.wait_event

    def wait_for_the_other(self: Stream, event: Any) -> None:
        wait(self, event)
        try:
            barrier.wait(0.2 if locked else None)
        except threading.BrokenBarrierError:
            assert locked  # the other thread may not have arrived yet

    monkeypatch.setattr(Stream, "wait_event", wait_for_the_other)

    def submit(stream: Stream) -> None:
        with stream:
            kernels.launch("k", kernel, SHAPE, ())

    threads = [threading.Thread(target=submit, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert starves(gpu) is not locked


def test_a_kernel_that_does_not_fit_is_not_launched() -> None:
    gpu = Gpu(processors=8)
    kernels = CooperativeKernels(gpu.cupy, 0)
    message = "kernel k: 9 blocks of 256 threads and 100000 bytes .* the device holds 8"
    for grid in ((9, 1), (1, 9), (3, 3)):
        with Stream(gpu) as stream, pytest.raises(RuntimeError, match=message):
            kernels.launch("k", gpu.kernel(), SHAPE._replace(grid=grid), ())
        assert not stream.queue
    with stream:  # two of them on each multiprocessor
        CooperativeKernels(Gpu(processors=8, each=2).cupy, 0).launch(
            "k", gpu.kernel(), SHAPE._replace(grid=(4, 4)), ()
        )
    assert stream.queue


def test_shared_memory_of_one_launch_does_not_limit_the_next() -> None:
    gpu = Gpu(processors=8)
    kernels, kernel = CooperativeKernels(gpu.cupy, 0), gpu.kernel()
    with Stream(gpu):
        for shared in (200_000, 1000, 200_000, 0, 232_432):
            kernels.launch("k", kernel, SHAPE._replace(shared=shared), ())
        with pytest.raises(RuntimeError, match="INVALID_VALUE"):
            kernels.launch("k", kernel, SHAPE._replace(shared=232_448), ())
        kernels.launch("k", kernel, SHAPE, ())  # the lock is free
    gpu.run(seed=0)


# -- reports


@pytest.fixture
def stopped(fake_cupy: Backend) -> Any:
    """Let a kernel time out at a step, on the backend "fake_cupy"."""
    gpu = Gpu(processors=8)
    fake_cupy.cooperative = CooperativeKernels(gpu.cupy, 0)
    stream = Stream(gpu)

    def stop(name: str = "gru_forward", step: int = 17) -> None:
        with stream:
            fake_cupy.cooperative.launch("other", gpu.kernel(), SHAPE, ())
            fake_cupy.cooperative.launch(name, gpu.kernel(times_out(step)), SHAPE, (np.int32(5),))
        gpu.run(seed=0)

    return stop


REPORT = "kernel {} timed out at step {}: .* NaN"


@pytest.mark.parametrize("step", [0, 17, 2**24 - 1])
@pytest.mark.parametrize("name", ["gru_forward", "other"])
def test_the_next_call_names_kernel_and_step(
    name: str, step: int, stopped: Any, fake_cupy: Backend
) -> None:
    for wait in (
        fake_cupy.synchronize,
        xprnn.synchronize,
        lambda: make("gru", backend="fake_cupy"),
    ):
        stopped(name, step)
        with pytest.raises(xprnn.KernelStoppedError, match=REPORT.format(name, step)):
            wait()
        wait()


def test_a_kernel_that_completes_reports_nothing(fake_cupy: Backend) -> None:
    gpu = Gpu(processors=8)
    fake_cupy.cooperative = CooperativeKernels(gpu.cupy, 0)
    with Stream(gpu):
        fake_cupy.cooperative.launch("k", gpu.kernel(), SHAPE, ())
    xprnn.synchronize()
    gpu.run(seed=0)
    xprnn.synchronize()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_operation_reports_before_it_changes_anything(
    part: Any, stopped: Any, fake_cupy: Backend, tmp_path: Path
) -> None:
    case: Case = part(fake_cupy, tmp_path)
    module, calls = case
    for name, call in calls.items():
        before = [fake_cupy.to_host(a) for a in (module.parameters.flat, module.grads.flat)]
        stopped()
        LOG.clear()
        with pytest.raises(xprnn.KernelStoppedError):
            call()
        assert not LOG.launches and not LOG.memory, name
        after = [fake_cupy.to_host(a) for a in (module.parameters.flat, module.grads.flat)]
        assert_same(after, before, name)
    for call in calls.values():
        call()


def test_a_started_operation_completes(stopped: Any, fake_cupy: Backend) -> None:
    """The timeout that happened meanwhile is reported by the next operation."""
    layer = make("gru", backend="fake_cupy")
    inputs = {name: fake_cupy.from_host(array) for name, array in arguments(layer).items()}
    expected = arrays(run(layer, inputs))
    with fake_cupy.activate():
        stopped()
        actual = arrays(run(layer, inputs))
        fake_cupy.synchronize()
    with pytest.raises(xprnn.KernelStoppedError):
        forward(layer, inputs)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(fake_cupy.to_host(one), fake_cupy.to_host(other))


def test_a_timeout_during_a_wait_is_reported(
    stopped: Any, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_cupy.xp.cuda.Device, "synchronize", lambda self: stopped())
    slow = SimpleNamespace(get=stopped)  # an array whose `get` waits
    for wait in (fake_cupy.synchronize, lambda: CupyBackend.to_host(fake_cupy, slow)):
        with pytest.raises(xprnn.KernelStoppedError):
            wait()


def test_a_timeout_is_reported_to_one_thread_only(stopped: Any, fake_cupy: Backend) -> None:
    stopped()
    start, raised = threading.Barrier(8), []

    def check() -> None:
        start.wait()
        try:
            fake_cupy.cooperative.check()
        except xprnn.KernelStoppedError as error:
            raised.append(error)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(raised) == 1


# -- the real CuPy, if it is installed; this needs no GPU


def test_cupy_has_what_launches_need() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    cuda = cupy.cuda
    assert "disable_timing" in inspect.signature(cuda.Event.__init__).parameters
    assert list(inspect.signature(cuda.PinnedMemory.__init__).parameters)[1] == "size"
    assert callable(cuda.Stream.wait_event) and callable(cuda.Event.record)
    assert callable(cuda.PinnedMemoryPointer) and callable(cuda.runtime.getDeviceProperties)
    assert callable(cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor)
    kernel = cupy.RawKernel("", "k", enable_cooperative_groups=True)
    assert kernel.enable_cooperative_groups
    for name in ("kernel", "shared_size_bytes", "max_dynamic_shared_size_bytes"):
        assert hasattr(type(kernel), name), name
