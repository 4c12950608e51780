"""Workers, a process each, and the turns in which they are timed."""

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
LEAST = 3  # rounds, whatever they take
BUDGET = 3.0  # seconds after which no further round of a cell begins
# Seconds before a sample on several threads: those of the library before it wait for work without
# sleeping, OpenBLAS's for 2^28 cycles, and would take a processor from this one.
REST = 0.15
Row = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker ended; what it wrote is on stderr."""


class Client:
    """One library in a process of its own."""

    def __init__(self, side: str, threads: int) -> None:
        self.side, self.threads = side, threads
        command = [sys.executable, "-m", "benchmarks.cpu.worker", side, str(threads)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(side, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """What the worker answers; WorkerError if it is no more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise WorkerError(f"the process of {self.side} ended with status {status} in {do}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def missing(sides: Iterable[str]) -> dict[str, str]:
    """Why sides cannot be measured here."""
    absent = {s: NEEDS[s] for s in sides if s in NEEDS and find_spec(NEEDS[s]) is None}
    return {side: f"{package} is not installed" for side, package in absent.items()}


@contextmanager
def clients(sides: Sequence[str], threads: int) -> Iterator[list[Client]]:
    """A process of each side; they are ended afterwards."""
    found = [Client(side, threads) for side in sides]
    try:
        yield found
    finally:
        for client in found:
            client.close()


def timed(
    problem: Problem, works: Sequence[str], found: Sequence[Client], threads: int, rounds: int
) -> list[Row]:
    """A row of each work, after all have found what xprnn's plain code finds."""
    facts = _prepared(problem, STEP if STEP in works else "layer", found)
    not_timed = {side: said.get("absent") or said.get("wrong") for side, said in facts.items()}
    rows = []
    for work in works:
        able = [client for client in found if work in facts[client.side].get("works", ())]
        samples = _samples(work, able, rounds)
        row: Row = {**problem._asdict(), "work": work, "threads": threads}
        row["us"] = {s: [_rounded(1e6 * one["seconds"]) for one in f] for s, f in samples.items()}
        row["cores"] = {
            s: round(statistics.median([one["cores"] for one in f]), 2) for s, f in samples.items()
        }
        row["notes"] = {client.side: facts[client.side]["note"] for client in able}
        row["not_timed"] = {side: why for side, why in not_timed.items() if why}
        row["wrong"] = [side for side, said in facts.items() if said.get("wrong")]
        rows.append(row)
    return rows


def _prepared(problem: Problem, work: str, found: Sequence[Client]) -> dict[str, dict[str, Any]]:
    """What each worker says of itself after it has been compared."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"problem": [*problem], "work": work, "path": str(Path(folder) / "expected.npz")}
        found[0].ask("expect", **request)
        return {client.side: client.ask("prepare", **request) for client in found}


def _samples(work: str, able: Sequence[Client], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Samples of each side in turns, as many of each."""
    found: dict[str, list[dict[str, float]]] = {client.side: [] for client in able}
    end = time.monotonic() + BUDGET
    for done in range(rounds):
        if done >= LEAST and time.monotonic() > end:
            break
        for client in able:
            time.sleep(REST if client.threads > 1 else 0.0)
            found[client.side].append(client.ask("sample", work=work))
    return found


def _rounded(number: float) -> float:
    """To four digits: more are noise."""
    return float(f"{number:.4g}")
