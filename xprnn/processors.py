"""How many threads a call may use: the processors, the usual variables, threadpoolctl's limits."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

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
