"""What a device can do at most, measured in the same run as what is held against it."""

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
from xprnn.bench.clock import Function, Timer, measure, timer
from xprnn.bench.peers import torch_for
from xprnn.bench.task import Setting, make_task
from xprnn.kernels.cuda import loading
from xprnn.kernels.cuda.plan import DeviceProperties

from .graphs import NotCapturedError, captured

BUDGET, SHORT = 0.2, 0.02  # seconds for a ceiling, and for a launch of each problem
SIDE = 8192  # of the matrices
COPIED = 2**31  # bytes
ROUNDS = 2000  # of a word to and fro: a millisecond or two
PLACES, APART = 9, 1 << 20  # words between the two that are handed over: other parts of L2
MAX_POLLS = 1 << 20  # polls: half a second
SWEEPS = 200  # readings of some megabytes: a millisecond or so
WARP = 32  # threads of a block


class Ceilings(NamedTuple):
    """What the floors are computed from."""

    bandwidth: float  # bytes / s, read and written, of a large copy on the device
    rates: dict[str, float]  # operations / s of a large product, by what it reads
    latency: float | None = None  # seconds from a store to the poll in another block that sees it
    look: float | None = None  # seconds of a poll that finds its word
    launch: float | None = None  # seconds from launch to launch of a kernel that does nothing

    def rate(self, dtype: str) -> float:
        """Operations / s with the accuracy of `dtype`: three tf32 products make a float32 one."""
        return max(self.rates[dtype], self.rates.get("tf32", 0.0) / 3 * (dtype == "float32"))


def measure_ceilings(
    backend: Backend, dtypes: tuple[str, ...], side: int = SIDE, copied: int = COPIED
) -> Ceilings:
    """Copy `copied` bytes and multiply matrices of `side` rows, by torch; hand a word over.

    Where a block gives up waiting for the word, that is printed, and nothing is known of waits.
    """
    clock = timer(backend)
    rates = {}
    for dtype in dtypes:
        torch, device, kind = torch_for(make_task(Setting("gru", 1, 1, 1, 1, dtype, backend.name)))
        a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
        product = partial(torch.matmul, a, b, out=torch.empty_like(a))
        rates[dtype] = 2 * side**3 / _least(product, clock)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _least(lambda: target.copy_(source), clock)
    if not isinstance(backend, CupyBackend):
        return Ceilings(bandwidth, rates)
    try:
        waits = *handover(backend, clock), launching(backend, clock)
    except KernelStoppedError as error:
        print(f"no latency: {error}", flush=True)
        return Ceilings(bandwidth, rates)
    return Ceilings(bandwidth, rates, *waits)


def _least(function: Function, clock: Timer, budget: float = BUDGET) -> float:
    """The seconds of the fastest call: what is computed from a ceiling is to be out of reach."""
    (seconds,) = measure([function], clock, budget)
    return min(seconds)


# -- a word from block to block


def handover(
    backend: CupyBackend, clock: Timer, rounds: int = ROUNDS, places: int = PLACES
) -> tuple[float, float]:
    """The latency and the look of `Ceilings`: medians over places in L2.

    :raises KernelStoppedError: a block waited too long for the other one.
    """
    relay = loading.kernel(backend.xp, source(), "xprnn::relay")
    look = independent(backend, "look")
    words = backend.xp.zeros(places * APART + 1, "uint32")
    count = np.uint32(rounds)

    def there_and_back(apart: int) -> None:
        words[:1] = 0
        words[apart : apart + 1] = 0
        arguments = words, np.uint32(apart), count, np.uint32(MAX_POLLS)
        backend.cooperative.launch("relay", relay, LaunchShape((2, 1), WARP, 0), arguments)

    def at(place: int) -> float:
        return _least(partial(there_and_back, place * APART), clock) / (2 * rounds)

    latency = statistics.median([at(place) for place in range(1, places + 1)])
    words[:1] = 0
    alone = _least(lambda: look((1,), (WARP,), (words, count)), clock) / rounds
    backend.synchronize()  # raises if a wait was given up
    return latency, alone


def independent(backend: CupyBackend, name: str) -> Any:
    """A kernel of `relay.cu` none of whose blocks waits for another: it is not cooperative.

    CuPy shrinks a cooperative grid that does not fit to one that does, also a grid of (blocks, 1),
    and only warns. `cooperative.launch` refuses it, and launches those whose blocks wait.
    """
    return loading.kernel(backend.xp, source(), f"xprnn::{name}", False)


def source() -> str:
    """The text of `relay.cu`, behind all that it stands on."""
    own = (Path(__file__).parent / "relay.cu").read_text("utf-8")
    return loading.text("common.h", "device.h") + own


# -- what a step of a stack takes at least


def launching(backend: CupyBackend, clock: Timer) -> float:
    """The `launch` of `Ceilings`, by CuPy's own call or by that of a graph: the faster."""
    look = independent(backend, "look")
    word = backend.xp.zeros(1, "uint32")
    calls = [lambda: look((1,), (WARP,), (word, np.uint32(0)))]
    calls[0]()  # compiles
    try:
        calls.append(captured(backend, calls[0]).launch)
    except NotCapturedError as error:
        print(f"no graph of a launch: {error}", flush=True)
    return min(_least(call, clock) for call in calls)


@cache
def reading(backend: CupyBackend, nbytes: int, rounds: int = SWEEPS) -> float:
    """The seconds in which all of the device reads so many bytes, which it has just read.

    :param nbytes: a multiple of 16.
    """
    xp = backend.xp
    sweep = independent(backend, "sweep")
    blocks = DeviceProperties.of(xp, backend.device).processors
    data, total = xp.zeros(nbytes // 4, "uint32"), xp.zeros(1, "uint32")
    sizes = np.uint32(nbytes // 16), np.uint32(rounds), np.uint32(blocks)
    call = partial(sweep, (blocks,), (1024,), (data, *sizes, total))
    return _least(call, timer(backend)) / rounds


# -- a step without waiting


def unpolled(call: Callable[[], object], backend: CupyBackend) -> float:
    """The seconds that the sequence kernels of a call take where they find every word at once.

    Each is launched again on the arrays of the call, while they are there: their mailbox is full,
    so it takes the same steps and waits for nobody. What it computes then has no meaning.
    """
    found: list[float] = []
    genuine, clock = backend.cooperative.launch, timer(backend)

    def launch(*arguments: Any, **options: Any) -> None:
        genuine(*arguments, **options)
        found.append(_least(partial(genuine, *arguments, **options), clock, SHORT))

    backend.cooperative.launch = launch  # type: ignore[method-assign]
    try:
        call()
    finally:
        del backend.cooperative.launch
    return sum(found)
