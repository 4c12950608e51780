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
from queue import Empty, Queue
from threading import Thread
from typing import Any, NamedTuple

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
        Thread(target=self._read, args=(events,), daemon=True).start()

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
        try:
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()
        except OSError:  # it has ended, which `events` reports
            pass

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
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            assert stream is not None
            if stream is self._popen.stdin:
                try:
                    stream.close()
                except OSError:
                    pass


class Workers:
    """One worker for each implementation, to be used in a `with` block, which ends them."""

    def __init__(
        self, backend: str, implementations: Sequence[str], command: Sequence[str] = COMMAND
    ) -> None:
        self._backend, self._command = backend, command
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "XPRNN_QUALIFIED": "off",
        }
        self._environment.pop("XPRNN_KERNELS", None)
        self._running: dict[str, _Process | None] = dict.fromkeys(implementations)
        self._events: Queue[tuple[_Process, str | None]] = Queue()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for name in self._running:
            self._end(name)

    def _end(self, name: str) -> None:
        process, self._running[name] = self._running[name], None
        if process is not None:
            process.kill()

    def ask(self, name: str, request: Request) -> Answer:
        """Ask one worker."""
        return next(answer for _, _, answer in self.ask_all({name: iter([request])}))

    def ask_all(
        self, requests: Mapping[str, Iterator[Request]], end: float | None = None
    ) -> Iterator[tuple[str, Request, Answer]]:
        """Ask workers at the same time, each one request after the other; yield the answers.

        A request of an iterator may depend on the answers before it. At the time `end` those
        without an answer are dropped, and their workers killed.
        """
        waiting: dict[str, tuple[Request, float]] = {}
        for name, own in requests.items():
            self._next(name, own, waiting)
        while waiting:
            now = time.monotonic()
            if end is not None and now >= end:
                for name in waiting:
                    self._end(name)
                return
            until = min(limit for _, limit in waiting.values())
            event = self._event(min(until, end or until) - now)
            for name, (request, limit) in [*waiting.items()]:
                answer = self._answer(name, request, limit, event)
                if answer is not None:
                    del waiting[name]
                    yield name, request, answer
                    self._next(name, requests[name], waiting)

    def _next(
        self, name: str, requests: Iterator[Request], waiting: dict[str, tuple[Request, float]]
    ) -> None:
        request = next(requests, None)
        if request is None:
            return
        process = self._running[name]
        if process is None:
            process = _Process(self._command, self._environment, self._events)
            self._running[name] = process
        message = {"backend": self._backend, "implementation": name, "method": request.method}
        process.send({**message, "with": request.arguments})
        waiting[name] = request, time.monotonic() + request.seconds

    def _event(self, seconds: float) -> tuple[_Process, str | None] | None:
        try:
            return self._events.get(timeout=max(seconds, 0.0))
        except Empty:
            return None

    def _answer(
        self, name: str, request: Request, limit: float, event: tuple[_Process, str | None] | None
    ) -> Answer | None:
        """The answer of a worker if the event is one, or if its time is over."""
        process = self._running[name]
        assert process is not None
        if event is not None and event[0] is process:
            line = event[1]
            if line is None:
                detail = process.how_it_ended()
                self._end(name)
                return Answer(ENDED, None, detail)
            answer = json.loads(line)
            if "raised" in answer:
                return Answer(RAISED, None, answer["raised"])
            return Answer(ANSWERED, answer["value"], "")
        if time.monotonic() >= limit:
            self._end(name)
            return Answer(TIMED_OUT, None, f"no answer within {request.seconds:.0f} s")
        return None
