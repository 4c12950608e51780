"""A process in which one library computes: `python -m benchmarks.cpu.worker SIDE THREADS`.

It reads a request a line, as JSON, and answers each with a line; see `turns.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xprnn import use_kernels
from xprnn.bench import DisagreementError, PeerUnavailableError, agreement
from xprnn.bench.peers import ours
from xprnn.bench.task import Peer, Results, Setting, Task, make_task

from .problems import STEP, WORKS, Problem
from .sides import SIDES, STEPS

WARM = 5e-3  # seconds of calls before a sample: caches are filled, other processes' threads asleep
SAMPLE = 20e-3  # seconds of a sample, or a single call
PART = 200e-6  # seconds that are read off the clock at once: a sample is the median of them
Reply = dict[str, Any]


class Worker:
    """The calls of one library that are prepared, by the work that they do."""

    def __init__(self, side: str) -> None:
        self._side = side
        self._calls: dict[str, Callable[[], Any]] = {}

    def expect(self, problem: list[Any], work: str, path: str) -> Reply:
        """Write what xprnn's plain code finds, which every library has to find."""
        task = _task(Problem(*problem))
        with use_kernels("reference"):
            results = {"h": _stepped(task)} if work == STEP else ours(task).results
        np.savez(path, **results)
        return {}

    def prepare(self, problem: list[Any], work: str, path: str) -> Reply:
        """Build and compare, first; "wrong" or "absent" says why there is nothing to be timed."""
        self._calls.clear()
        task = _task(Problem(*problem))
        with np.load(path) as file:
            mine = Peer("xprnn", _nothing, None, dict(file), "")
        try:
            peer = _step_peer(self._side, task) if work == STEP else SIDES[self._side](task)
            agreed = agreement(task.setting, mine, peer) if peer.results else ""
        except PeerUnavailableError as error:
            return {"absent": str(error)}
        except DisagreementError as error:
            return {"wrong": str(error)}
        calls = zip(WORKS, (peer.forward, peer.both), strict=False)
        self._calls = {STEP: peer.forward} if work == STEP else {w: c for w, c in calls if c}
        return {"note": peer.note, "agreed": agreed, "works": [*self._calls]}

    def sample(self, work: str) -> Reply:
        """Seconds of one call in the steady state, and how many cores it kept busy."""
        call = self._calls[work]
        seconds = _warm(call)
        repeats = max(1, round(PART / seconds))
        found: list[float] = []
        start, busy = time.perf_counter(), time.process_time()
        while not found or time.perf_counter() - start < SAMPLE:
            before = time.perf_counter()
            for _ in range(repeats):
                call()
            found.append((time.perf_counter() - before) / repeats)
        cores = (time.process_time() - busy) / (time.perf_counter() - start)
        return {"seconds": statistics.median(found), "cores": cores}


def _warm(call: Callable[[], Any]) -> float:
    """Seconds of the last of the calls that are made for `WARM` seconds."""
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        if after - start > WARM:
            return after - before


def _nothing() -> None:
    """What a peer calls that stands for results alone."""


def _task(problem: Problem) -> Task:
    T, N, I, H = problem.shape  # noqa: E741
    return make_task(Setting(problem.cell, H, I, N, T))


def _stepped(task: Task) -> np.ndarray:
    """The state after one step of xprnn's layer, (N, H)."""
    states = tuple([state[None] for state in task.states])
    output, _ = task.layer(task.x[:1], states if len(states) > 1 else states[0])
    return output[0].copy()


def _step_peer(side: str, task: Task) -> Peer:
    step, result, note = STEPS[side](task)
    results: Results = {} if result is None else {"h": result()}
    return Peer(side, step, None, results, note)


def _hold(threads: int) -> None:
    """Keep this process on so many processors: XLA's threads obey no variable."""
    if hasattr(os, "sched_setaffinity"):  # not on every system
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def main() -> None:
    """Answer until nothing more is asked; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _hold(int(sys.argv[2]))
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    main()
