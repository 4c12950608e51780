"""A lock for any number of readers or one writer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident
from weakref import WeakSet

WRITER = 0  # in the set of readers; no thread has this identifier
POLL_SECONDS = 1.0  # an interrupt may have kept a reader from notifying a waiting writer


class ReadersWriterLock:
    """`with lock:` is held by any number of readers; `with lock.writing():` excludes other threads.

    A waiting writer has priority over readers that arrive later, and readers that wait while a
    thread writes have priority over the next writer. The writing thread may acquire the lock
    again inside, for reading or for writing; otherwise reading is not reentrant. After a fork only
    the forking thread still holds the lock in the child.
    """

    __slots__ = (
        *("__weakref__", "_active_writer", "_changed", "_depth"),
        *("_readers_first", "_waiting_readers", "_writers", "readers"),
    )

    def __init__(self) -> None:
        _locks.add(self)
        self._changed = Condition()
        # The identifiers of reading threads, and WRITER while a thread writes or waits to. Reading
        # takes no mutex: a reader adds itself before it checks for WRITER, a writer adds WRITER
        # before it checks for readers, and set operations are atomic: one of them sees the other.
        self.readers: set[int] = set()
        self._waiting_readers = 0
        self._readers_first = 0  # waiting readers that precede the next writer
        self._writers: list[int] = []  # threads that write or wait to write
        self._active_writer: int | None = None  # its thread
        self._depth = 0  # of the writer's nested blocks

    def acquire_read(self) -> int:
        """Wait until no other thread writes or waits to write; the argument of `release_read`.

        `with lock:` does the same, but its overhead is noticeable in a step of a small layer.
        """
        thread = get_ident()
        try:
            self.readers.add(thread)
            if WRITER in self.readers:
                self.wait_for_writers(thread)
        except BaseException:
            self.release_read(thread)
            raise
        return thread

    def wait_for_writers(self, thread: int) -> None:
        """Wait until no other thread writes or waits to write; `thread` is in `readers`."""
        if self._active_writer != thread:
            self._wait_to_read(thread)

    def release_read(self, thread: int) -> None:
        """Stop reading.

        An interrupt may arrive before the first line of a Python function. Where that matters the
        caller discards `thread` from `readers` itself, and calls `notify_writers` if WRITER is in
        that set.
        """
        self.readers.discard(thread)
        if WRITER in self.readers:
            self.notify_writers()

    def notify_writers(self) -> None:
        """Wake a waiting writer after a thread has stopped reading."""
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> None:
        """As `acquire_read`."""
        self.acquire_read()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """As `release_read`."""
        self.release_read(get_ident())

    def _wait_to_read(self, thread: int) -> None:
        with self._changed:
            self.readers.discard(thread)
            self._changed.notify_all()
            self._waiting_readers += 1
            try:
                # not for its own write: a signal handler may read while its thread waits to write
                while any(w != thread for w in self._writers) and not self._readers_first:
                    self._changed.wait()
                self.readers.add(thread)
                self._readers_first -= self._readers_first > 0
            finally:
                self._waiting_readers -= 1
                self._readers_first = min(self._readers_first, self._waiting_readers)

    def reset_after_fork(self) -> None:
        """Remove all other threads, which do not exist in the child of a fork."""
        writing = self.held_for_writing
        self._changed = Condition()
        self.readers &= {get_ident(), *([WRITER] if writing else ())}
        self._waiting_readers = self._readers_first = 0
        self._writers = [get_ident()] if writing else []
        if not writing:
            self._active_writer, self._depth = None, 0

    def __reduce__(self) -> tuple[type[ReadersWriterLock], tuple[()]]:
        """A copy, of parameters for example, has a lock of its own."""
        return ReadersWriterLock, ()

    @property
    def held_for_writing(self) -> bool:
        """Whether the calling thread holds the lock for writing."""
        return self._active_writer == get_ident()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other thread holds the lock, and exclude them until the block ends."""
        outer_depth = self._depth if self.held_for_writing else 0
        try:
            with self._changed:
                if not self.held_for_writing:
                    self._wait_to_write(get_ident())
                self._depth += 1
            yield
        finally:
            with self._changed:
                if self.held_for_writing:
                    self._depth = outer_depth
                    if not outer_depth:
                        self._active_writer, self._readers_first = None, self._waiting_readers
                        self._remove_writer()

    def _wait_to_write(self, thread: int) -> None:
        try:
            self._writers.append(thread)
            self.readers.add(WRITER)
            while (
                self._active_writer is not None
                or self._readers_first
                or self.readers - {WRITER, thread}
            ):
                self._changed.wait(POLL_SECONDS)
            self._active_writer = thread
        except BaseException:  # interrupted
            self._remove_writer()
            raise

    def _remove_writer(self) -> None:
        thread = get_ident()
        if thread in self._writers:
            self._writers.remove(thread)
        if not self._writers:
            self.readers.discard(WRITER)
        self._changed.notify_all()


_locks: WeakSet[ReadersWriterLock] = WeakSet()


def _after_fork() -> None:
    for lock in [*_locks]:
        lock.reset_after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)
