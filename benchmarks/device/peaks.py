"""A device's measured peaks, from the same run as the times that are compared with them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xprnn.backend import Backend
from xprnn.backend.cooperative import KernelStoppedError, LaunchShape
from xprnn.backend.cupy import CupyBackend
from xprnn.kernels.cuda import loading
from xprnn.kernels.cuda.plan import DeviceProperties
from xprnn.tools.bench.clock import Function, Timer, measure, timer
from xprnn.tools.bench.peers import torch_for
from xprnn.tools.bench.task import Setting, make_task

from .graphs import NotCapturedError, captured

BUDGET, SHORT = 0.2, 0.02  # seconds for a peak, and for a launch of each problem
SIDE = 8192  # of the matrices
COPIED = 2**31  # bytes
ROUNDS = 2000  # exchanges of a word: a millisecond or two
PLACES, APART = 9, 1 << 20  # distances of the two exchanged words: different slices of L2
MAX_POLLS = 1 << 20  # half a second
SWEEPS = 200  # reads of some megabytes: a millisecond or so
WARP = 32  # threads of a block


class Peaks(NamedTuple):
    """The measurements from which the roofline bounds are computed."""

    bandwidth: float  # bytes / s, read and written, of a large copy on the device
    rates: dict[str, float]  # operations / s of a large product, by operand type
    latency: float | None = None  # seconds from a store until a poll in another block sees it
    poll: float | None = None  # seconds of a poll that succeeds
    launch: float | None = None  # seconds between launches of an empty kernel

    def rate(self, dtype: str) -> float:
        """Operations / s with the accuracy of `dtype`: three tf32 products make a float32 one."""
        return max(self.rates[dtype], self.rates.get("tf32", 0.0) / 3 * (dtype == "float32"))

    def as_json(self) -> dict[str, Any]:
        """The fields by their names in report.json."""
        return {{"poll": "look"}.get(name, name): value for name, value in self._asdict().items()}


def measure_peaks(
    backend: Backend, dtypes: tuple[str, ...], side: int = SIDE, copied: int = COPIED
) -> Peaks:
    """Copy `copied` bytes, multiply matrices of `side` rows with torch, measure latencies.

    If a block times out in the ping-pong kernel, that is printed, and latencies are None.
    """
    clock = timer(backend)
    rates = {}
    for dtype in dtypes:
        torch, device, kind = torch_for(make_task(Setting("gru", 1, 1, 1, 1, dtype, backend.name)))
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        product = partial(torch.matmul, a, b, out=torch.empty_like(a))
        rates[dtype] = 2 * side**3 / _fastest(product, clock)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _fastest(lambda: target.copy_(source), clock)
    if not isinstance(backend, CupyBackend):
        return Peaks(bandwidth, rates)
    try:
        latencies = *measure_latency(backend, clock), measure_launch(backend, clock)
    except KernelStoppedError as error:
        print(f"latency not measured: {error}", flush=True)
        return Peaks(bandwidth, rates)
    return Peaks(bandwidth, rates, *latencies)


def _fastest(function: Function, clock: Timer, budget: float = BUDGET) -> float:
    """The seconds of the fastest call, so that bounds computed from a peak are lower bounds."""
    (seconds,) = measure([function], clock, budget)
    return min(seconds)


# -- ping-pong latency between blocks


def measure_latency(
    backend: CupyBackend, clock: Timer, rounds: int = ROUNDS, places: int = PLACES
) -> tuple[float, float]:
    """`Peaks.latency` and `Peaks.poll`: medians over places in L2.

    :raises KernelStoppedError: a block timed out waiting for the other.
    """
    ping_pong = loading.kernel(backend.xp, source(), "xprnn::ping_pong")
    poll_words = plain_kernel(backend, "poll_words")
    words = backend.xp.zeros(places * APART + 1, "uint32")
    count = np.uint32(rounds)

    def exchange(apart: int) -> None:
        words[:1] = 0
        words[apart : apart + 1] = 0
        arguments = words, np.uint32(apart), count, np.uint32(MAX_POLLS)
        backend.cooperative.launch("ping_pong", ping_pong, LaunchShape((2, 1), WARP, 0), arguments)

    def latency_at(place: int) -> float:
        return _fastest(partial(exchange, place * APART), clock) / (2 * rounds)

    latency = statistics.median([latency_at(place) for place in range(1, places + 1)])
    words[:1] = 0
    poll = _fastest(lambda: poll_words((1,), (WARP,), (words, count)), clock) / rounds
    backend.synchronize()  # raises if a block timed out
    return latency, poll


def plain_kernel(backend: CupyBackend, name: str) -> Any:
    """A kernel of `ping_pong.cu` whose blocks do not wait for each other: not cooperative.

    CuPy shrinks a cooperative grid that does not fit to one that does, also a grid of (blocks, 1),
    and only warns. `cooperative.launch`, which launches kernels whose blocks wait, raises instead.
    """
    return loading.kernel(backend.xp, source(), f"xprnn::{name}", False)


def source() -> str:
    """The source of `ping_pong.cu` with the headers that it requires."""
    own = (Path(__file__).parent / "ping_pong.cu").read_text("utf-8")
    return loading.text("common.h", "device.h") + own


# -- launches and reads, for the bound of a stack's step


def measure_launch(backend: CupyBackend, clock: Timer) -> float:
    """`Peaks.launch`: the faster of CuPy's call and of a CUDA graph."""
    poll_words = plain_kernel(backend, "poll_words")
    word = backend.xp.zeros(1, "uint32")
    calls = [lambda: poll_words((1,), (WARP,), (word, np.uint32(0)))]
    calls[0]()  # compile
    try:
        calls.append(captured(backend, calls[0]).launch)
    except NotCapturedError as error:
        print(f"no graph of a launch: {error}", flush=True)
    return min(_fastest(call, clock) for call in calls)


@cache
def measure_read(backend: CupyBackend, nbytes: int, rounds: int = SWEEPS) -> float:
    """The seconds in which the whole device reads `nbytes`, which it has read before.

    :param nbytes: a multiple of 16.
    """
    xp = backend.xp
    sweep = plain_kernel(backend, "sweep")
    blocks = DeviceProperties.of(xp, backend.device).processors
    data, total = xp.zeros(nbytes // 4, "uint32"), xp.zeros(1, "uint32")
    sizes = np.uint32(nbytes // 16), np.uint32(rounds), np.uint32(blocks)
    call = partial(sweep, (blocks,), (1024,), (data, *sizes, total))
    return _fastest(call, timer(backend)) / rounds


# -- steps without waiting


def without_waiting(call: Callable[[], object], backend: CupyBackend) -> float:
    """The seconds of a call's sequence kernels if no poll has to wait.

    Each kernel is launched again on the arrays of the call: their exchange buffers are filled, so
    it runs the same steps without waiting. Its results are meaningless.
    """
    seconds: list[float] = []
    original, clock = backend.cooperative.launch, timer(backend)

    def launch(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        seconds.append(_fastest(partial(original, *arguments, **options), clock, SHORT))

    backend.cooperative.launch = launch  # type: ignore[method-assign]
    try:
        call()
    finally:
        del backend.cooperative.launch
    return sum(seconds)
