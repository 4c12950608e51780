"""A lock that calls share and that a write has alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from weakref import WeakSet

WRITER = 0  # no thread's identifier
LOST = 1.0  # seconds: an interrupt may have kept a thread from saying that it has left


class ReadersWriterLock:
    """`with lock:` is shared by any number of threads; in `with lock.alone():` there is no other.

    A thread that waits to be alone comes before those that come to share later, and those that
    wait to share before the next one that is alone. A thread that is alone may share, and be
    alone, inside; to share is not nested otherwise. In the child of a fork only the thread that
    forked is left, and only it is in the lock.
    """

    __slots__ = (
        *("__weakref__", "_admitted", "_alone", "_changed"),
        *("_depth", "_queued", "present", "_writers"),
    )

    def __init__(self) -> None:
        _locks.add(self)
        self._changed = Condition()
        # The threads that share, and WRITER while one is alone or waits to be. To share takes no
        # lock: one adds itself before it looks for WRITER, a writer adds WRITER before it looks
        # for others, and each operation on a set is atomic, so that one of the two sees the other.
        self.present: set[int] = set()
        self._queued = 0  # threads that wait to share
        self._admitted = 0  # those of them that come before the next one that is alone
        self._writers: list[int] = []  # threads that are alone or wait to be
        self._alone: int | None = None  # the thread
        self._depth = 0  # of its blocks

    def share(self) -> int:
        """Wait until no other thread is alone or waits to be; what `leave` is called with.

        `with` does it too, but takes longer than the arithmetic of a small step should wait.
        """
        me = get_ident()
        try:
            self.present.add(me)
            if WRITER in self.present:
                self.admit(me)
        except BaseException:
            self.leave(me)
            raise
        return me

    def admit(self, me: int) -> None:
        """Wait until no other thread is alone or waits to be; `me` is in `present`."""
        if self._alone != me:
            self._wait_to_share(me)

    def leave(self, me: int) -> None:
        """Share no longer.

        An interrupt may come before the first line of a Python function. So where it matters the
        caller discards `me` from `present` itself, and then calls `left` if `WRITER` is in it.
        """
        self.present.discard(me)
        if WRITER in self.present:
            self.left()

    def left(self) -> None:
        """Say that a thread shares no longer, where one waits to be alone."""
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> None:
        """As `share`."""
        self.share()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """As `leave`."""
        self.leave(get_ident())

    def _wait_to_share(self, me: int) -> None:
        with self._changed:
            self.present.discard(me)
            self._changed.notify_all()
            self._queued += 1
            try:
                # not for itself: a signal handler may read while its thread waits to write
                while any(w != me for w in self._writers) and not self._admitted:
                    self._changed.wait()
                self.present.add(me)
                self._admitted -= self._admitted > 0
            finally:
                self._queued -= 1
                self._admitted = min(self._admitted, self._queued)

    def leave_to_this_thread(self) -> None:
        """Forget the other threads, which a fork has not taken along."""
        mine = self.is_mine
        self._changed = Condition()
        self.present &= {get_ident(), *([WRITER] if mine else ())}
        self._queued = self._admitted = 0
        self._writers = [get_ident()] if mine else []
        if not mine:
            self._alone, self._depth = None, 0

    def __reduce__(self) -> tuple[type[ReadersWriterLock], tuple[()]]:
        """A copy, of parameters for example, has a lock of its own."""
        return ReadersWriterLock, ()

    @property
    def is_mine(self) -> bool:
        """Whether this thread is alone in it."""
        return self._alone == get_ident()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other thread shares it or is alone; those that come wait for the end."""
        before = self._depth if self.is_mine else 0
        try:
            with self._changed:
                if not self.is_mine:
                    self._wait_to_be_alone(get_ident())
                self._depth += 1
            yield
        finally:
            with self._changed:
                if self.is_mine:
                    self._depth = before
                    if not before:
                        self._alone, self._admitted = None, self._queued
                        self._end()

    def _wait_to_be_alone(self, me: int) -> None:
        try:
            self._writers.append(me)
            self.present.add(WRITER)
            while self._alone is not None or self._admitted or self.present - {WRITER, me}:
                self._changed.wait(LOST)
            self._alone = me
        except BaseException:  # interrupted
            self._end()
            raise

    def _end(self) -> None:
        me = get_ident()
        if me in self._writers:
            self._writers.remove(me)
        if not self._writers:
            self.present.discard(WRITER)
        self._changed.notify_all()


_locks: WeakSet[ReadersWriterLock] = WeakSet()


def _after_fork() -> None:
    for lock in [*_locks]:
        lock.leave_to_this_thread()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
