"""How many threads a call may use: the processors, a quota, variables, threadpoolctl."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from . import optional

VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def usable() -> int:
    """How many threads a call may use: `processors`, or fewer by a variable or threadpoolctl."""
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
    """The processors that this process may use: by its affinity, and by its control group's quota.

    The affinity is that of now, the quota one that was read within the last second.
    """
    if hasattr(os, "sched_getaffinity"):  # not on every system
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return min(allowed, _quota_within(int(time.monotonic())) or allowed)


@lru_cache(1)
def _quota_within(second: int) -> int | None:
    return quota() if sys.platform == "linux" else None


def quota(root: Path = Path("/")) -> int | None:
    """How many processors' time this process's control groups get, rounded up; None: no limit.

    The least of its group's and all groups' above it, as far as they can be seen from here. What
    cannot be read, or makes no sense, is no limit. https://docs.kernel.org/admin-guide/cgroup-v2.html

    :param root: the folder in which proc/self/cgroup and sys/fs/cgroup are.
    """
    mounts = root / "sys/fs/cgroup"
    found: list[int] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            for folder in _upwards([mounts, mounts / "unified"], path):
                most, _, period = _read(folder / "cpu.max").partition(" ")
                found += _processors_for(most, period)
        elif "cpu" in controllers.split(","):
            for folder in _upwards([mounts / "cpu", mounts / controllers], path):
                times = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                found += _processors_for(*times)
    return min(found, default=None)


def _upwards(mounts: list[Path], path: str) -> Iterator[Path]:
    """The folder of a group at each place where it may be, and those of the groups above it."""
    group = PurePosixPath(path.lstrip("/"))
    if ".." not in group.parts:  # else it lies outside of what this process may see
        for mount in mounts:
            yield from [mount / part for part in (group, *group.parents)]


def _processors_for(microseconds: str, period: str) -> list[int]:
    """The processors that give so much time in a period; none: it is no limit."""
    numbers = [text.strip() for text in (microseconds, period)]
    if not all(text.isdecimal() and text.isascii() and len(text) < 20 for text in numbers):
        return []  # "max", -1, or no such file
    given, of = map(int, numbers)
    return [-(-given // of)] if given and of else []


def _read(path: Path) -> str:
    """What a small file says; "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(65536).decode("ascii", "replace")
    except (OSError, ValueError):  # a path with a NUL is a ValueError
        return ""


@cache
def _libraries() -> list[Any]:
    """The BLAS libraries that are loaded, NumPy's among them, as threadpoolctl knows them."""
    try:
        known = optional.load("threadpoolctl")
    except optional.OptionalPackageError:  # then it has set no limit
        return []
    if not hasattr(known, "ThreadpoolController"):  # before its version 3
        return []
    libraries: list[Any] = known.ThreadpoolController().select(user_api="blas").lib_controllers
    return libraries
