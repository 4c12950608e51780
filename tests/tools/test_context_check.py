"""A CUDA context that refuses every call after a test, simulated with CuPy's own errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.context_check import ENDED
from tests.support.machine import context_error
from tests.tools.test_gpu_report import DEVICE, report_in

ROOT = Path(__file__).parents[2]
PERSISTENT = "cudaErrorIllegalAddress: an illegal memory access was encountered"
CONFTEST = f"""
import sys
from pathlib import Path
from types import SimpleNamespace
from cupy.cuda.runtime import CUDARuntimeError
from tests.support.context_check import ContextCheck
from tests.support.gpu_report import GpuReport

class Runtime:
    CUDARuntimeError = CUDARuntimeError
    def __init__(self): self.errors = []
    def deviceSynchronize(self):
        if self.errors:
            code, times = self.errors[0]
            self.errors[:1] = [(code, times - 1)] if times > 1 else []
            raise CUDARuntimeError(code)

sys.modules["cupy"] = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime()))

def pytest_configure(config):
    results = Path(__file__).parent / "results"
    config.pluginmanager.register(GpuReport(config, lambda: {DEVICE!r}, results))
    config.pluginmanager.register(ContextCheck(config))
"""
SUITE = """
import sys
import pytest

@pytest.fixture
def errors(): return sys.modules["cupy"].cuda.runtime.errors

@pytest.mark.gpu
def test_before(): pass

@pytest.mark.gpu
def test_once(errors): errors.append((1, 1))

@pytest.mark.gpu
def test_breaks(errors): errors.append((700, 10**6))

@pytest.mark.gpu
def test_after(errors): assert not errors

def test_on_the_cpu(): pass
"""


def run(folder: Path, *options: str, suite: str = SUITE) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a device\n")
    (folder / "test_all.py").write_text(suite)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )


def test_the_failing_test_is_named_and_the_process_ends(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == ENDED
    message = f"test_all.py::test_breaks left a CUDA context that refuses every call: {PERSISTENT}"
    assert f"Exit: {message}" in done.stdout
    assert "test_all.py::test_once PASSED" in done.stdout  # an error raised once does not persist
    assert "test_all.py::test_breaks ERROR" in done.stdout
    assert "test_after" not in done.stdout
    report = report_in(tmp_path, "-part")
    assert report["counts"] == {"passed": 3, "failed": 0, "skipped": 0, "errors": 1}
    assert report["failed_tests"] == ["test_all.py::test_breaks"]
    assert report["left_out"] == "it was interrupted" and report["device"] == DEVICE


def test_other_processes_continue(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    done = run(tmp_path, "-p", "xdist.plugin", "-n", "1")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "left a CUDA context that refuses every call" in done.stdout
    for name in ("before", "once", "breaks", "after", "on_the_cpu"):
        assert f"PASSED test_all.py::test_{name}" in done.stdout
    report = report_in(tmp_path)
    assert report["counts"] == {"passed": 4, "failed": 0, "skipped": 0, "errors": 1}
    assert report["failed_tests"] == ["test_all.py::test_breaks"]


def test_a_process_that_terminates_is_in_the_report(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    killed = SUITE.replace("errors.append((700, 10**6))", "__import__('os')._exit(11)")
    run(tmp_path, "-p", "xdist.plugin", "-n", "1", suite=killed)
    report = report_in(tmp_path)
    assert report["counts"] == {"passed": 3, "failed": 0, "skipped": 0, "errors": 1}
    assert report["failed_tests"] == ["test_all.py::test_breaks"]


def test_only_tests_that_ran_on_a_gpu_are_checked(tmp_path: Path) -> None:
    """A machine without a driver raises an error in every call, too."""
    broken = "__import__('sys').modules['cupy'].cuda.runtime.errors.append((35, 10**6))\n"
    suite = f"""
import pytest
{broken}
@pytest.fixture
def backend(): pytest.skip("no driver")

@pytest.mark.gpu
def test_skipped(backend): pass

@pytest.mark.gpu
def test_on_the_cpu_too(): pass

def test_on_the_cpu(): pass
"""
    done = run(tmp_path, suite=suite)
    assert done.returncode == 0 and "2 passed, 1 skipped" in done.stdout


@pytest.mark.parametrize(("times_raised", "persists"), [(0, False), (1, False), (2, True)])
def test_an_error_that_is_raised_twice_persists(times_raised: int, persists: bool) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    from cupy.cuda.runtime import CUDARuntimeError

    left = [700] * times_raised

    def synchronize() -> None:
        if left:
            raise CUDARuntimeError(left.pop())

    runtime = SimpleNamespace(CUDARuntimeError=CUDARuntimeError, deviceSynchronize=synchronize)
    error = context_error(SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    assert error == PERSISTENT * persists
