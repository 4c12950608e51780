"""Worker processes, one for each implementation, timed in interleaved rounds."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .problems import NEEDS, STEP, Problem, environment

ROOT = Path(__file__).resolve().parents[2]
LEAST = 3  # rounds, however long they take
BUDGET = 3.0  # seconds after which no new round of a cell begins
# Seconds before a sample on several threads: idle threads of the library timed before it busy-wait
# (OpenBLAS's for 2^28 cycles) and would occupy a processor.
REST = 0.15
Row = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker process ended; its output is on stderr."""


class Client:
    """One implementation in its own process."""

    def __init__(self, implementation: str, threads: int) -> None:
        self.implementation, self.threads = implementation, threads
        command = [sys.executable, "-m", "benchmarks.cpu.worker", implementation, str(threads)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(implementation, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def send(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the worker's reply; WorkerError if it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(
                f"the process of {self.implementation} ended with status {status} in {do}"
            )
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def missing(implementations: Iterable[str]) -> dict[str, str]:
    """The reason for each implementation that cannot be measured here."""
    absent = {s: NEEDS[s] for s in implementations if s in NEEDS and find_spec(NEEDS[s]) is None}
    return {name: f"{package} is not installed" for name, package in absent.items()}


@contextmanager
def clients(implementations: Sequence[str], threads: int) -> Iterator[list[Client]]:
    """One process for each implementation; they end with the context."""
    started = [Client(implementation, threads) for implementation in implementations]
    try:
        yield started
    finally:
        for client in started:
            client.close()


def timed(
    problem: Problem, works: Sequence[str], started: Sequence[Client], threads: int, rounds: int
) -> list[Row]:
    """A row for each kind of call, after all results have been compared with xprnn's plain code."""
    replies = _prepared(problem, STEP if STEP in works else "layer", started)
    not_timed = {name: reply.get("absent") or reply.get("wrong") for name, reply in replies.items()}
    rows = []
    for work in works:
        able = [c for c in started if work in replies[c.implementation].get("works", ())]
        samples = _samples(work, able, rounds)
        row: Row = {**problem._asdict(), "work": work, "threads": threads}
        row["us"] = {s: [_rounded(1e6 * one["seconds"]) for one in f] for s, f in samples.items()}
        row["cores"] = {
            s: round(statistics.median([one["cores"] for one in f]), 2) for s, f in samples.items()
        }
        row["notes"] = {c.implementation: replies[c.implementation]["note"] for c in able}
        row["not_timed"] = {name: reason for name, reason in not_timed.items() if reason}
        row["wrong"] = [name for name, reply in replies.items() if reply.get("wrong")]
        rows.append(row)
    return rows


def _prepared(problem: Problem, work: str, started: Sequence[Client]) -> dict[str, dict[str, Any]]:
    """Each worker's reply after its results have been compared."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"problem": [*problem], "work": work, "path": str(Path(folder) / "expected.npz")}
        started[0].send("expect", **request)
        return {client.implementation: client.send("prepare", **request) for client in started}


def _samples(work: str, able: Sequence[Client], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Samples of each implementation from interleaved rounds, equally many of each."""
    samples: dict[str, list[dict[str, float]]] = {client.implementation: [] for client in able}
    end = time.monotonic() + BUDGET
    for done in range(rounds):
        if done >= LEAST and time.monotonic() > end:
            break
        for client in able:
            time.sleep(REST if client.threads > 1 else 0.0)
            samples[client.implementation].append(client.send("sample", work=work))
    return samples


def _rounded(number: float) -> float:
    """To four digits; further ones are noise."""
    return float(f"{number:.4g}")
