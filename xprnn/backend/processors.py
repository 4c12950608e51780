"""The number of threads a call may use: processors, cgroup quota, variables, threadpoolctl."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from . import optional

VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def usable() -> int:
    """Return the number of threads a call may use: `processors`, or a lower limit.

    Limits are one of `VARIABLES`, the first that is set, and threadpoolctl's.
    """
    most = processors()
    for name in VARIABLES:
        first = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP allows one per level
        if first.isdecimal() and int(first):  # a BLAS ignores 0
            most = min(most, int(first))
            break
    if "threadpoolctl" in sys.modules:  # otherwise it has set no limit
        most = min([most, *(library.num_threads or most for library in _libraries())])
    return max(most, 1)


def processors() -> int:
    """Return the number of processors that this process may use, by affinity and cgroup quota.

    The affinity is read at each call, the quota once per second.
    """
    if hasattr(os, "sched_getaffinity"):  # not on every system
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return min(allowed, _quota_within(int(time.monotonic())) or allowed)


@lru_cache(1)
def _quota_within(second: int) -> int | None:
    return quota() if sys.platform == "linux" else None


@cache
def processor_name() -> str:
    """The model of the processor, or its architecture where the system does not name it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return " ".join(value.split())
    return platform.processor() or platform.machine()


def quota(root: Path = Path("/")) -> int | None:
    """Return the CPU quota of this process's cgroups in processors, rounded up; None: no limit.

    It is the smallest quota of the process's cgroup and its ancestors, as far as they are visible.
    An unreadable or invalid quota counts as no limit.
    https://docs.kernel.org/admin-guide/cgroup-v2.html

    :param root: the folder that contains proc/self/cgroup and sys/fs/cgroup.
    """
    mounts = root / "sys/fs/cgroup"
    quotas: list[int] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # version 2, alone or beside version 1
            for folder in _ancestors([mounts, mounts / "unified"], path):
                most, _, period = _read(folder / "cpu.max").partition(" ")
                quotas += _processors_for(most, period)
        elif "cpu" in controllers.split(","):
            for folder in _ancestors([mounts / "cpu", mounts / controllers], path):
                times = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
                quotas += _processors_for(*times)
    return min(quotas, default=None)


def _ancestors(mounts: list[Path], path: str) -> Iterator[Path]:
    """Yield the folders of a cgroup and of its ancestors, under each mount point."""
    group = PurePosixPath(path.lstrip("/"))
    if ".." not in group.parts:  # otherwise it is outside this process's cgroup namespace
        for mount in mounts:
            yield from [mount / part for part in (group, *group.parents)]


def _processors_for(microseconds: str, period: str) -> list[int]:
    """Return [quota / period, rounded up], or [] for no limit."""
    numbers = [text.strip() for text in (microseconds, period)]
    if not all(text.isdecimal() and text.isascii() and len(text) < 20 for text in numbers):
        return []  # "max", -1, or no such file
    quota_us, period_us = map(int, numbers)
    return [-(-quota_us // period_us)] if quota_us and period_us else []


def _read(path: Path) -> str:
    """Return the text of a small file, or "" if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(65536).decode("ascii", "replace")
    except (OSError, ValueError):  # a path with a NUL is a ValueError
        return ""


@cache
def _libraries() -> list[Any]:
    """Return threadpoolctl's controllers of the loaded BLAS libraries, NumPy's among them."""
    try:
        threadpoolctl = optional.load("threadpoolctl")
    except optional.OptionalPackageError:  # then it has set no limit
        return []
    if not hasattr(threadpoolctl, "ThreadpoolController"):  # before version 3
        return []
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    libraries: list[Any] = controller.lib_controllers
    return libraries
