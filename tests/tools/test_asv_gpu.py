"""What the asv suite measures on a GPU: the time between events, and launches."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.common import EventClock
from xprnn.backend import Backend

on_a_gpu = pytest.mark.parametrize(
    "backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True
)
SIZE = "N=8 H=64 T=128"


class Events:
    """A device with events at preset milliseconds, and a log of recording and waiting."""

    def __init__(self, *times: float) -> None:
        self._times = iter(times)
        self.log: list[str] = []

    def backend(self) -> Any:
        device = self

        class Event:
            def record(self) -> None:
                self.at = next(device._times)
                device.log.append("record")

            def synchronize(self) -> None:
                device.log.append("wait")

        class Active:
            def __enter__(self) -> None:
                device.log.append("enter")

            def __exit__(self, *_: object) -> None:
                device.log.append("leave")

        def elapsed(start: Event, stop: Event) -> float:
            return stop.at - start.at

        cuda = SimpleNamespace(Event=Event, get_elapsed_time=elapsed)
        return SimpleNamespace(xp=SimpleNamespace(cuda=cuda), activate=Active)


def test_the_clock_waits_for_its_event_on_the_backends_device() -> None:
    device = Events(5.0, 7.5, 8.0)
    clock = EventClock(device.backend())
    assert (clock(), clock()) == (0.0025, 0.003)
    assert device.log == 3 * ["enter", "record", "wait", "leave"]


@on_a_gpu
def test_the_clock_measures_time_on_the_device(backend: Backend) -> None:
    clock = EventClock(backend)
    a = backend.xp.ones((2048, 2048), "float32")
    a @ a
    started, begin = time.perf_counter(), clock()
    for _ in range(50):
        a @ a
    seconds, wall = clock() - begin, time.perf_counter() - started
    assert 0.2 * wall < seconds < wall  # the device had work nearly all the time


@on_a_gpu
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "lstm", "rnn_tanh"])
def test_launches_are_as_many_as_explain_states(
    backend: Backend, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch counts the launches")
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__}, which counts the launches, has no CUDA device")
    monkeypatch.setenv("XPRNN_KERNELS", "pointwise")  # restored at the end
    benchmark = gpu.Launches()
    combination = (cell, "xprnn-cupy-pointwise", "float32", SIZE)
    benchmark.setup(*combination)
    stated = {"gru_reset_before": 4}.get(cell, 2)
    counted = benchmark.track_launches_per_step(*combination)
    assert stated <= counted <= stated + 0.1  # the input product and the like, once for 128 steps
