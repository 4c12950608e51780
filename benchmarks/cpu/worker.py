"""The process that runs one implementation.

    python -m benchmarks.cpu.worker IMPLEMENTATION THREADS

It reads one JSON request per line and writes one reply per line; see `rounds.py`.
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

from xprnn.tools.bench.peers import xprnn_peer
from xprnn.tools.bench.run import DisagreementError, PeerUnavailableError, agreement
from xprnn.tools.bench.task import Peer, Results, Setting, Task, make_task

from ..common import use_kernels
from .implementations import IMPLEMENTATIONS, STEPS
from .problems import STEP, WORKS, Problem

WARM = 5e-3  # seconds of calls before a sample, to fill caches and let other threads go to sleep
SAMPLE = 20e-3  # seconds of a sample, which has at least one call
PART = 200e-6  # seconds of calls between two clock readings; a sample is the median of these
Reply = dict[str, Any]


class Worker:
    """The prepared calls of one implementation, by kind of call."""

    def __init__(self, implementation: str) -> None:
        self._name = implementation
        self._calls: dict[str, Callable[[], Any]] = {}

    def expect(self, problem: list[Any], work: str, path: str) -> Reply:
        """Write the results of xprnn's plain code, with which all implementations are compared."""
        task = _task(Problem(*problem))
        with use_kernels("reference"):
            results = {"h": _stepped(task)} if work == STEP else xprnn_peer(task).results
        np.savez(path, **results)
        return {}

    def prepare(self, problem: list[Any], work: str, path: str) -> Reply:
        """Build the calls and compare results; "wrong" or "absent" is why nothing can be timed."""
        self._calls.clear()
        task = _task(Problem(*problem))
        with np.load(path) as file:
            mine = Peer("xprnn", _nothing, None, dict(file), "")
        try:
            build = _step_peer if work == STEP else _peer
            peer = build(self._name, task)
            agreed = agreement(task.setting, mine, peer) if peer.results else ""
        except PeerUnavailableError as error:
            return {"absent": str(error)}
        except DisagreementError as error:
            return {"wrong": str(error)}
        calls = zip(WORKS, (peer.forward, peer.both), strict=False)
        self._calls = {STEP: peer.forward} if work == STEP else {w: c for w, c in calls if c}
        return {"note": peer.note, "agreed": agreed, "works": [*self._calls]}

    def sample(self, work: str) -> Reply:
        """The seconds of one call in the steady state, and the average number of busy cores."""
        call = self._calls[work]
        seconds = _warm(call)
        repeats = max(1, round(PART / seconds))
        samples: list[float] = []
        start, busy = time.perf_counter(), time.process_time()
        while not samples or time.perf_counter() - start < SAMPLE:
            before = time.perf_counter()
            for _ in range(repeats):
                call()
            samples.append((time.perf_counter() - before) / repeats)
        cores = (time.process_time() - busy) / (time.perf_counter() - start)
        return {"seconds": statistics.median(samples), "cores": cores}


def _warm(call: Callable[[], Any]) -> float:
    """Call for `WARM` seconds; returns the seconds of the last call."""
    start = time.perf_counter()
    while True:
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        if after - start > WARM:
            return after - before


def _nothing() -> None:
    """The call of a `Peer` that only holds results."""


def _task(problem: Problem) -> Task:
    T, N, I, H = problem.shape  # noqa: E741
    return make_task(Setting(problem.cell, H, I, N, T))


def _stepped(task: Task) -> np.ndarray:
    """The state after one step of xprnn's layer, (N, H)."""
    states = tuple([state[None] for state in task.states])
    output, _ = task.layer(task.x[:1], states if len(states) > 1 else states[0])
    return output[0].copy()


def _peer(implementation: str, task: Task) -> Peer:
    return IMPLEMENTATIONS[implementation](task)


def _step_peer(implementation: str, task: Task) -> Peer:
    step, result, note = STEPS[implementation](task)
    results: Results = {} if result is None else {"h": result()}
    return Peer(implementation, step, None, results, note)


def _set_affinity(threads: int) -> None:
    """Bind this process to `threads` processors: no variable limits XLA's threads."""
    if hasattr(os, "sched_setaffinity"):  # not on every system
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def main() -> None:
    """Reply to requests until stdin ends; output of the libraries goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _set_affinity(int(sys.argv[2]))
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]
    main()
