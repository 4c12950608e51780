"""How many threads a call may use: what limits them, and how it is read."""

from __future__ import annotations

import os

import pytest
from numba_parts import python

from xprnn import processors


def test_variables_processors_and_threadpoolctl_limit_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    for name in processors.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processors, "processors", lambda: 8)
    with threadpoolctl.threadpool_limits(5, "blas"):
        assert processors.usable() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert processors.usable() == 3
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")  # goes before, as in OpenBLAS
        assert processors.usable() == 4
        with threadpoolctl.threadpool_limits(1):
            assert processors.usable() == 1
        monkeypatch.setattr(processors, "processors", lambda: 2)
        assert processors.usable() == 2


@pytest.mark.parametrize(("text", "count"), [("2,4", 2), (" 3 ", 3), ("0", 8), ("many", 8)])
def test_a_variable_is_read_as_a_blas_reads_it(
    text: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processors.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processors, "processors", lambda: 8)
    monkeypatch.setattr(processors, "_libraries", list)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert processors.usable() == count


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_held_to_one_processor_takes_one_thread() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from xprnn import processors
print(processors.usable())
"""
    assert python(code, OMP_NUM_THREADS="8", OPENBLAS_NUM_THREADS="8") == "1\n"
