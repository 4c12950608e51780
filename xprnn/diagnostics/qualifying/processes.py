"""Worker processes: started on demand, asked with a time limit, killed and replaced."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple

from ...backend.processors import VARIABLES

START = 30.0  # seconds that a worker's first answer may take longer
COMMAND = (sys.executable, "-m", "xprnn.diagnostics.qualifying.worker")
ANSWERED, TIMED_OUT, ENDED, RAISED = "answered", "timed out", "ended its process", "raised"


class Request(NamedTuple):
    """What a worker is asked."""

    method: str  # of `worker.METHODS`
    arguments: tuple[Any, ...]
    seconds: float  # that the answer may take


class Answer(NamedTuple):
    """The answer of a worker, or what happened instead."""

    outcome: str
    value: Any
    detail: str  # why there is no value


class _Process:
    """A running worker; `events` receives its lines, and None at their end."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], events: Queue[Any]
    ) -> None:
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C in a terminal is for the caller, which ends the workers
        self._popen = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._last: deque[str] = deque(maxlen=20)  # lines of standard error
        self._errors = Thread(target=self._read_errors, daemon=True)
        self._errors.start()
        self._answers = Thread(target=self._read, args=(events,), daemon=True)
        self._answers.start()

    def _read(self, events: Queue[Any]) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            events.put((self, line))
        events.put((self, None))

    def _read_errors(self) -> None:
        assert self._popen.stderr is not None
        self._last.extend(line.strip() for line in self._popen.stderr if line.strip())

    def send(self, message: Mapping[str, Any]) -> None:
        assert self._popen.stdin is not None
        with suppress(OSError):  # it has ended, which `events` reports
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()

    def how_it_ended(self) -> str:
        """The signal or exit status, and the last line of standard error."""
        status = self._popen.wait()
        self._errors.join(1.0)
        text = f"exit status {status}"
        if status < 0:
            names = {number.value: number.name for number in signal.Signals}
            text = f"signal {names.get(-status, -status)}"
        return f"{text}: {self._last[-1]}" if self._last else text

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._errors.join(1.0)
        self._answers.join(1.0)
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            assert stream is not None
            with suppress(OSError):  # unsent requests
                stream.close()


class Lane(NamedTuple):
    """The place of one worker at a time."""

    implementation: str
    compares: bool = False  # rather than times, so that NumPy's BLAS needs only one thread
    number: int = 0  # of those that compare an implementation at the same time


class Workers:
    """The workers of lanes, to be used in a `with` block, which ends them."""

    def __init__(self, backend: str, command: Sequence[str] = COMMAND) -> None:
        self._backend, self._command = backend, command
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "XPRNN_QUALIFIED": "off",
        }
        self._environment.pop("XPRNN_KERNELS", None)
        # OpenBLAS's threads look for work for 2^20 cycles, less than a millisecond, and not for a
        # tenth of a second, in which they would take a processor from the next worker's turn
        self._environment.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
        # as long as workers compare at the same time, BLAS threads would wait for each other
        self._one_thread = {**self._environment, **dict.fromkeys(VARIABLES, "1")}
        self._running: dict[Lane, _Process] = {}
        self._events: Queue[tuple[_Process, str | None]] = Queue()

    def __enter__(self) -> Workers:
        """Workers are started when they are first asked."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all workers."""
        for lane in [*self._running]:
            self.end(lane)

    def end(self, lane: Lane) -> None:
        """End a lane's worker, if it has one."""
        if lane in self._running:
            self._running.pop(lane).kill()

    def ask(self, lane: Lane, request: Request) -> Answer:
        """Ask one worker."""
        ((_, _, answer),) = self.ask_all({lane: iter([request])})
        return answer

    def ask_all(
        self, requests: Mapping[Lane, Iterator[Request]], end: float | None = None
    ) -> Iterator[tuple[Lane, Request, Answer]]:
        """Ask workers at the same time, each one request after the other; yield the answers.

        A request of an iterator may depend on the answers before it. At the time `end` those
        without an answer are dropped, and their workers killed.
        """
        waiting: dict[Lane, tuple[Request, float]] = {}
        for lane, own in requests.items():
            self._next(lane, own, waiting)
        while waiting:
            now = time.monotonic()
            if end is not None and now >= end:
                for lane in waiting:
                    self.end(lane)
                return
            until = min(limit for _, limit in waiting.values())
            event = self._event(min(until, end or until) - now)
            for lane, (request, limit) in [*waiting.items()]:
                answer = self._answer(lane, request, limit, event)
                if answer is not None:
                    del waiting[lane]
                    yield lane, request, answer
                    self._next(lane, requests[lane], waiting)

    def _next(
        self, lane: Lane, requests: Iterator[Request], waiting: dict[Lane, tuple[Request, float]]
    ) -> None:
        request = next(requests, None)
        if request is None:
            return
        limit = time.monotonic() + request.seconds
        if lane not in self._running:
            environment = self._one_thread if lane.compares else self._environment
            self._running[lane] = _Process(self._command, environment, self._events)
            limit += START
        message = {
            "backend": self._backend,
            "implementation": lane.implementation,
            "variables": {name: os.environ.get(name) for name in VARIABLES},
        }
        self._running[lane].send({**message, "method": request.method, "with": request.arguments})
        waiting[lane] = request, limit

    def _event(self, seconds: float) -> tuple[_Process, str | None] | None:
        try:
            return self._events.get(timeout=max(seconds, 0.0))
        except Empty:
            return None

    def _answer(
        self, lane: Lane, request: Request, limit: float, event: tuple[_Process, str | None] | None
    ) -> Answer | None:
        """The answer of a worker if the event is one, or if its time is over."""
        process = self._running[lane]
        if event is not None and event[0] is process:
            line = event[1]
            if line is None or not line.endswith("\n"):
                detail = process.how_it_ended()
                self.end(lane)
                return Answer(ENDED, None, detail)
            answer = json.loads(line)
            if "raised" in answer:
                self.end(lane)  # after an error of CUDA all later calls fail
                return Answer(RAISED, None, answer["raised"])
            return Answer(ANSWERED, answer["value"], "")
        if time.monotonic() >= limit:
            self.end(lane)
            return Answer(TIMED_OUT, None, f"no answer within {request.seconds:.0f} s")
        return None
