"""The pool of threads among which a call divides its work.

The threads are kept between calls, and each call limits how many of them it uses. They run compiled
functions, which release the GIL. The pool has one caller at a time; a second caller meanwhile
runs on its own thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Self

from ...backend.floating_point import environment
from ...backend.processors import usable

Call = Callable[[], Any]
Results = SimpleQueue[BaseException | None]
_current_processor = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else None


class ThreadPool:
    """The threads of a call, `size` including the caller's; this class has only the caller's."""

    size = 1

    def __enter__(self) -> Self:
        """Hold the threads until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the threads."""

    def run(self, calls: Sequence[Call]) -> None:
        """Make all calls once, wait for them, and then raise the error of one, if any.

        Each thread takes the next call when it is free, so with several short calls per thread
        less time is lost to a thread that starts late. No reference to the calls is kept. May be
        called repeatedly.
        """
        for call in calls:
            call()


class _SharedPool(ThreadPool):
    """The caller's thread and worker threads, which wait for calls."""

    def __init__(self) -> None:
        self._idle = threading.Lock()
        self._tasks: SimpleQueue[tuple[deque[Call], Results]] = SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._affinity: set[int] = set()  # the processors on which the workers may run

    def __exit__(self, *error: object) -> None:
        self._idle.release()

    def acquire(self, size: int) -> bool:
        """Hold `size` threads until `__exit__`; False if that is not possible."""
        if not self._idle.acquire(blocking=False):
            return False
        self.size = size
        try:
            while len(self._workers) < size - 1:
                # daemons: they wait for tasks when the interpreter exits
                target = partial(_worker_loop, self._tasks)
                thread = threading.Thread(target=target, name="xprnn", daemon=True)
                thread.start()
                self._workers.append(thread)
                self._affinity = set()
        except RuntimeError:  # the system's limit, or the interpreter is shutting down
            self._idle.release()
            return False
        self._set_affinity()
        return True

    def _set_affinity(self) -> None:
        """Keep the workers off the processor on which the caller's thread runs.

        Otherwise the scheduler may wake them there, and they wait milliseconds for it while
        another processor is idle.
        """
        if _current_processor is None:
            return
        allowed = os.sched_getaffinity(0) - {_current_processor()}
        if not allowed or allowed == self._affinity:
            return
        self._affinity = allowed
        for thread in self._workers:
            with suppress(OSError):  # a container may forbid it; the affinity then stays unchanged
                os.sched_setaffinity(thread.native_id or 0, allowed)

    def run(self, calls: Sequence[Call]) -> None:
        queue: deque[Call] = deque(calls)
        results: Results = SimpleQueue()
        for _ in range(min(self.size, len(calls)) - 1):
            self._tasks.put((queue, results))
        _work(queue, results)
        errors = [results.get() for _ in calls]  # wait: the workers write to the same arrays
        for error in errors:
            if error is not None:
                raise error


def _worker_loop(tasks: SimpleQueue[tuple[deque[Call], Results]]) -> None:
    """Run the calls of each task, in a worker thread."""
    with environment():  # per thread, and this thread makes no other calls
        while True:
            queue, results = tasks.get()
            _work(queue, results)
            del queue, results


def _work(queue: deque[Call], results: Results) -> None:
    """Make calls until none is left in the queue; `results` receives the error of each, or None."""
    while queue:
        try:
            call = queue.popleft()
        except IndexError:  # another thread was faster
            return
        error = None
        try:
            call()
        except BaseException as raised:  # `run` raises it in the caller's thread
            error = raised
        del call  # with its references to arrays
        results.put(error)
        del error


_caller_only, _shared = ThreadPool(), _SharedPool()


def pool(most: int) -> ThreadPool:
    """Return up to `most` threads, only the caller's if the pool is busy; for a `with` block."""
    size = min(most, usable()) if most > 1 else 1
    return _shared if size > 1 and _shared.acquire(size) else _caller_only


def _reset_after_fork() -> None:
    """Replace the pool: a forked process has none of its parent's threads."""
    global _shared
    _shared = _SharedPool()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_reset_after_fork)
