"""The threads among which a call divides its work: few, kept, and no more than may be used.

They wait for compiled functions, which run without Python's lock. One call at a time has them;
one that comes meanwhile works alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from queue import SimpleQueue
from typing import Any, Self

Call = Callable[[], Any]
VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def usable() -> int:
    """How many threads a call may use: the processors, or fewer by a variable or threadpoolctl."""
    most = processors()
    for name in VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP's may be one a level
        if first.isdecimal() and int(first):  # to a BLAS 0 says nothing
            most = min(most, int(first))
            break
    if "threadpoolctl" in sys.modules:  # else nobody has set a limit with it
        most = min([most, *(library.num_threads or most for library in _libraries())])
    return max(most, 1)


def processors() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _libraries() -> list[Any]:
    """The BLAS libraries that are loaded, NumPy's among them, as threadpoolctl knows them."""
    from threadpoolctl import ThreadpoolController

    libraries: list[Any] = ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries


class Crew:
    """A call's threads, the caller's among them: `size` in all."""

    size = 1

    def __enter__(self) -> Self:
        """Have the threads until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Give them back."""

    def run(self, calls: Sequence[Call]) -> None:
        """Make all calls, and wait for them."""
        for call in calls:
            call()


class _Several(Crew):
    """The caller's thread and others that wait for it."""

    def __init__(self) -> None:
        self._idle = threading.Lock()
        self._calls: SimpleQueue[tuple[Call, SimpleQueue[Any]]] = SimpleQueue()
        self._started = 0

    def __exit__(self, *error: object) -> None:
        self._idle.release()

    def take(self, size: int) -> bool:
        """Whether they could be had, `size` of them, until `__exit__`."""
        if not self._idle.acquire(blocking=False):
            return False
        self.size = size
        try:
            while self._started < size - 1:
                # daemons: they wait for work when the interpreter ends
                work = partial(_serve, self._calls)
                threading.Thread(target=work, name="xprnn", daemon=True).start()
                self._started += 1
        except RuntimeError:  # the system gives no more, or the interpreter is ending
            self._idle.release()
            return False
        return True

    def run(self, calls: Sequence[Call]) -> None:
        ends: SimpleQueue[BaseException | None] = SimpleQueue()
        first, *others = calls
        for call in others:
            self._calls.put((call, ends))
        try:
            first()
        finally:  # the others work on the same arrays
            errors = [ends.get() for _ in others]
        for error in errors:
            if error is not None:
                raise error


def _serve(calls: SimpleQueue[tuple[Call, SimpleQueue[Any]]]) -> None:
    """What a thread does: one call after the other."""
    while True:
        call, ends = calls.get()
        error = None
        try:
            call()
        except BaseException as raised:  # for whoever waits
            error = raised
        del call  # and with it arrays
        ends.put(error)
        del ends, error


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
