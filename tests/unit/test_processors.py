"""The number of threads that a call may use: its limits, and how they are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.numba_cases import python
from xprnn.backend import processors


def test_variables_processors_and_threadpoolctl_limit_the_threads(
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
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")  # takes precedence, as in OpenBLAS
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
def test_a_process_limited_to_one_processor_uses_one_thread() -> None:
    code = """
import os
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from xprnn.backend import processors
print(processors.usable())
"""
    assert python(code, OMP_NUM_THREADS="8", OPENBLAS_NUM_THREADS="8") == "1\n"


# -- quotas of control groups, as files


def group(root: Path, lines: str, files: dict[str, str]) -> Path:
    """A root folder of a process that is in the groups of `lines`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines, "utf-8")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, "utf-8")
    return root


V1 = {"quota": "cpu.cfs_quota_us", "period": "cpu.cfs_period_us"}
QUOTAS: dict[str, tuple[str, dict[str, str], int | None]] = {
    "none": ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    "two": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "rounded up": ("0::/a\n", {"a/cpu.max": "150000 100000\n"}, 2),
    "less than one": ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 1),
    "the group above has less": (
        "0::/a/b/c\n",
        {
            "a/b/c/cpu.max": "max 100000",
            "a/b/cpu.max": "800000 100000",
            "a/cpu.max": "300000 100000",
        },
        3,
    ),
    "another group": ("0::/a\n", {"b/cpu.max": "100000 100000\n"}, None),
    "a namespace": ("0::/docker/1f2e\n", {"cpu.max": "400000 100000\n"}, 4),
    "version 1": (
        "12:memory:/x\n4:cpu,cpuacct:/a\n",
        {f"cpu,cpuacct/a/{V1['quota']}": "250000\n", f"cpu,cpuacct/a/{V1['period']}": "100000\n"},
        3,
    ),
    "version 1 without": (
        "4:cpu:/a\n",
        {f"cpu/a/{V1['quota']}": "-1\n", f"cpu/a/{V1['period']}": "100000\n"},
        None,
    ),
    "both versions": (
        "4:cpu:/a\n0::/a\n",
        {
            f"cpu/{V1['quota']}": "500000\n",
            f"cpu/{V1['period']}": "100000\n",
            "unified/a/cpu.max": "700000 100000",
        },
        5,
    ),
    "outside": ("0::/../a\n", {"cpu.max": "100000 100000", "a/cpu.max": "100000 100000"}, None),
    "no number": ("0::/\n", {"cpu.max": "many 100000\n"}, None),
    "zero": ("0::/\n", {"cpu.max": "100000 0\n"}, None),
    "nothing given": ("0::/\n", {"cpu.max": "0 100000\n"}, None),
    "negative": ("0::/\n", {"cpu.max": "-5 100000\n"}, None),
    "too long": ("0::/\n", {"cpu.max": "9" * 10_000 + " 1\n"}, None),
    "other digits": ("0::/\n", {"cpu.max": "٣ ١\n"}, None),
    "a folder": ("0::/\n", {"cpu.max/deeper": "100000 100000\n"}, None),
    "no path": ("0::\n", {"cpu.max": "100000 100000\n"}, 1),
    "no groups": ("", {"cpu.max": "100000 100000\n"}, None),
    "nonsense": ("::\n:\n\0\n0::/\0/a\n", {}, None),
}


@pytest.mark.parametrize(("lines", "files", "expected"), QUOTAS.values(), ids=QUOTAS.keys())
def test_a_quota_is_read(
    lines: str, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    assert processors.quota(group(tmp_path, lines, files)) == expected


def test_a_system_without_groups_has_no_quota(tmp_path: Path) -> None:
    assert processors.quota(tmp_path) is None


def test_a_quota_limits_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "_quota_within", lambda second: None)
    allowed = processors.processors()
    for most, expected in ((1, 1), (allowed, allowed), (allowed + 5, allowed)):
        monkeypatch.setattr(processors, "_quota_within", lambda second, most=most: most)
        assert processors.processors() == expected
