"""The threads among which a call divides its work: few, kept, and no more than may be used.

They make calls of compiled functions, which run without Python's lock. One caller at a time has
them; one that comes meanwhile works alone.
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

from ...floating_point import environment
from ...processors import usable

Call = Callable[[], Any]
Ends = SimpleQueue[BaseException | None]
_this_processor = ctypes.CDLL(None).sched_getcpu if sys.platform == "linux" else None


class Crew:
    """A call's threads, the caller's among them: `size` in all."""

    size = 1

    def __enter__(self) -> Self:
        """Have the threads until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back."""

    def run(self, calls: Sequence[Call]) -> None:
        """Make all calls, each once, and wait for them; raise an error of one when all have ended.

        Whichever thread is free takes the next call, so several a thread, of which none is long,
        wait less for one that comes late. Nothing of them is kept. May be called again.
        """
        for call in calls:
            call()


class _Several(Crew):
    """The caller's thread and others that wait for it."""

    def __init__(self) -> None:
        self._idle = threading.Lock()
        self._shared: SimpleQueue[tuple[deque[Call], Ends]] = SimpleQueue()
        self._others: list[threading.Thread] = []
        self._beside: set[int] = set()  # the processors on which the others may run

    def __exit__(self, *error: object) -> None:
        self._idle.release()

    def take(self, size: int) -> bool:
        """Whether they could be had, `size` of them, until `__exit__`."""
        if not self._idle.acquire(blocking=False):
            return False
        self.size = size
        try:
            while len(self._others) < size - 1:
                # daemons: they wait for work when the interpreter ends
                work = partial(_serve, self._shared)
                thread = threading.Thread(target=work, name="xprnn", daemon=True)
                thread.start()
                self._others.append(thread)
                self._beside = set()
        except RuntimeError:  # the system gives no more, or the interpreter is ending
            self._idle.release()
            return False
        self._place()
        return True

    def _place(self) -> None:
        """Keep the others off the processor on which the caller's thread runs.

        A scheduler may wake them there, and have them wait for a turn of milliseconds while
        another processor idles.
        """
        if _this_processor is None:
            return
        beside = os.sched_getaffinity(0) - {_this_processor()}
        if not beside or beside == self._beside:
            return
        self._beside = beside
        for thread in self._others:
            with suppress(OSError):  # a container may forbid it: then they are where they are
                os.sched_setaffinity(thread.native_id or 0, beside)

    def run(self, calls: Sequence[Call]) -> None:
        left: deque[Call] = deque(calls)
        ends: Ends = SimpleQueue()
        for _ in range(min(self.size, len(calls)) - 1):
            self._shared.put((left, ends))
        _work(left, ends)
        errors = [ends.get() for _ in calls]  # the others work on the same arrays
        for error in errors:
            if error is not None:
                raise error


def _serve(shared: SimpleQueue[tuple[deque[Call], Ends]]) -> None:
    """What another thread does: it takes its share of what there is, and waits for more."""
    with environment():  # a thread does not have its caller's, and this one makes no other calls
        while True:
            left, ends = shared.get()
            _work(left, ends)
            del left, ends


def _work(left: deque[Call], ends: Ends) -> None:
    """Make the calls that no other thread has taken; `ends` gets each one's error, or None."""
    while left:
        try:
            call = left.popleft()
        except IndexError:  # another thread was faster
            return
        error = None
        try:
            call()
        except BaseException as raised:  # for whoever waits
            error = raised
        del call  # and with it arrays
        ends.put(error)
        del error


_alone, _several = Crew(), _Several()


def crew(most: int) -> Crew:
    """Up to `most` threads, the caller's alone if the others are busy; for a `with` block."""
    size = min(most, usable()) if most > 1 else 1
    return _several if size > 1 and _several.take(size) else _alone


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _several
    _several = _Several()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_forget)
