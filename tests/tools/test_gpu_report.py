"""The report of the GPU suite, written by tiny suites on a simulated device."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support import gpu_report, machine
from xprnn.backend import Backend

ROOT = Path(__file__).parents[2]

CONFTEST = """
from pathlib import Path
from tests.support.gpu_report import GpuReport

def describe():
    return DEVICE

def pytest_configure(config):
    config.pluginmanager.register(GpuReport(config, describe, Path(__file__).parent / "results"))
"""
DEVICE = {"name": "Fake B/1000", "compute_capability": "9.0", "driver": "1.2.3"}
HEAD = """
import numpy as np, pytest
from tests.support.tolerances import assert_close
pytestmark = pytest.mark.gpu

def close(error, dtype):
    assert_close((np.ones(3) + error).astype(dtype), np.ones(3), dtype, "h_n")
"""
PASSING = """
def test_good():
    close(0, "float64")
    close(2e-7, "float32")
    close(0, "float32")

def test_expected_failure():
    with pytest.raises(AssertionError): close(1.0, "float32")
"""
FAILING = """
def test_bad():
    close(3e-3, "float32")
"""
OTHERS = """
def test_skipped(): pytest.skip("one device only")

@pytest.fixture
def broken(): raise RuntimeError

def test_error(broken): pass

@pytest.mark.parametrize("name", ["reference", "pointwise"])
def test_implementation(name, record_property): record_property("implementation", name)
"""
WARNING = """
def test_warns():
    import warnings
    warnings.warn("of another version\\nand more")
"""
CPU = """
import numpy as np
from tests.support.tolerances import assert_close

def test_on_the_cpu(): assert_close(np.ones(1) + 9e-11, np.ones(1), "float64", "not of a GPU")
"""
NAME = f"gpu-suite-*py{sys.version_info.major}.{sys.version_info.minor}"


def run(folder: Path, *options: str, device: Any = DEVICE, **modules: str) -> str:
    """Run pytest on modules in `folder`; what it prints."""
    (folder / "conftest.py").write_text(CONFTEST.replace("DEVICE", repr(device)))
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu: needs a device\nfilterwarnings = error\n"
    )
    for name, text in modules.items():
        (folder / f"test_{name}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
    )
    return done.stdout + done.stderr


def report_in(folder: Path, suffix: str = "") -> dict[str, Any]:
    (path,) = folder.glob(f"results/fake-b-1000/{NAME}{suffix}.json")
    return json.loads(path.read_text())


SUITE = {"a": HEAD + PASSING + OTHERS + WARNING, "b": HEAD + FAILING, "c": CPU + WARNING}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a complete suite ran."""
    folder = tmp_path_factory.mktemp("complete")
    assert "GPU report: written to fake-b-1000/gpu-suite-" in run(folder, **SUITE)
    return folder


def check_complete(report: dict[str, Any]) -> None:
    assert report["counts"] == {"passed": 5, "failed": 1, "skipped": 1, "errors": 1}
    assert report["failed_tests"] == ["test_a.py::test_error", "test_b.py::test_bad"]
    assert report["skipped_because"] == {"one device only": 1}
    assert report["warnings"] == {"UserWarning: of another version": 1}  # an error on the CPU
    assert report["tests_by_implementation"] == {"pointwise": 1, "reference": 1}
    assert report["whole_suite"] and report["device"] == DEVICE and report["seconds"] > 0
    assert report["versions"]["numpy"] == np.__version__
    worst = report["worst_error"]
    assert worst.keys() == {"float32", "float64"}
    assert worst["float64"]["error"] == 0.0  # not that of a test on the CPU
    assert worst["float32"]["error"] == pytest.approx(3e-3, rel=1e-3)
    assert worst["float32"]["test"] == "test_b.py::test_bad" and worst["float32"]["what"] == "h_n"
    assert worst["float32"]["error"] > worst["float32"]["tolerance"]


def test_the_contents_of_a_report(complete: Path) -> None:
    check_complete(report_in(complete))
    (path,) = complete.glob(f"results/*/{NAME}.md")
    text = path.read_text()
    assert "5 passed, 1 failed, 1 skipped, 1 errors" in text
    assert "**failed**: `test_b.py::test_bad`" in text
    assert "| float32 | 3.00e-03 |" in text


def test_under_xdist(tmp_path: Path) -> None:
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    run(tmp_path, "-p", "xdist", "-n", "2", **SUITE)
    check_complete(report_in(tmp_path))


def test_the_worst_error_of_several_tests(tmp_path: Path) -> None:
    later = FAILING.replace("bad", "less_bad").replace("3e-3", "2e-3")
    run(tmp_path, a=HEAD + FAILING + later + PASSING)
    assert report_in(tmp_path)["worst_error"]["float32"]["test"] == "test_a.py::test_bad"


def test_an_error_that_is_infinite(tmp_path: Path) -> None:
    """JSON has no infinity."""
    run(tmp_path, a=HEAD + 'def test(): assert_close(np.ones(1), np.zeros(1), "float64")')
    assert report_in(tmp_path)["worst_error"]["float64"]["error"] == "inf"


def test_no_report_without_a_test_on_a_device(tmp_path: Path) -> None:
    skipped = HEAD + "def test(): pytest.skip('no device')"
    assert "GPU report" not in run(tmp_path, a=skipped, b=CPU)
    printed = run(tmp_path, a=HEAD + PASSING, device=None)
    assert "nothing written: tests marked gpu ran, but there is no device" in printed
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-k", "good"), "by --keyword"),
        (("-m", "gpu and not slow"), "by -m"),
        (("test_a.py",), "by names on the command line"),
        (("-x",), "it was interrupted"),
    ],
    ids=["-k", "-m", "names", "-x"],
)
def test_a_partial_report_does_not_replace_the_complete_one(
    complete: Path, options: tuple[str, ...], reason: str
) -> None:
    before = report_in(complete)
    assert "-part.json" in run(complete, *options, **SUITE)
    part = report_in(complete, "-part")
    assert not part["whole_suite"] and part["left_out"] == reason
    assert report_in(complete) == before


def test_an_interrupted_run_is_partial(tmp_path: Path) -> None:
    run(tmp_path, a=HEAD + PASSING, b=HEAD + "def test(): raise KeyboardInterrupt")
    part = report_in(tmp_path, "-part")
    assert part["left_out"] == "it was interrupted" and part["counts"]["passed"] == 2


def test_no_paths_and_no_host(complete: Path) -> None:
    for path in complete.glob("results/*/*"):
        text = path.read_text()
        for private in (str(complete), str(ROOT), str(Path.home()), socket.gethostname()):
            assert private not in text, path.name


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file instead of a folder")
    assert "GPU report: not written: " in run(tmp_path, a=HEAD + PASSING)


def test_files_are_written_atomically(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, folder = report_in(complete), complete / "results"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(self: Path, *arguments: Any) -> None:
        self.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        gpu_report.write({**report, "seconds": 0.0}, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert machine.commit(tmp_path) == "unknown"
    git("init", "-q")
    assert machine.commit(tmp_path) == "unknown"  # no commit yet
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "a").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    assert machine.commit(tmp_path / "inside") == "unknown"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "b").write_text("evidence")
    assert machine.commit(tmp_path) == head
    (tmp_path / "inside" / "a").write_text("2")
    assert machine.commit(tmp_path) == f"{head}+changes"


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    seen = set()
    for name, text in (("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("c.h", ""), ("d.txt", "")):
        (tmp_path / name).write_text(text)
        seen.add(machine.digest(tmp_path))
    assert len(seen) == 4  # a text file is not a source
    assert machine.digest(ROOT / "xprnn") not in seen


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's properties under CuPy's names."""
    properties = {"name": b"NVIDIA H200", "major": 9, "minor": 0}
    properties |= {"multiProcessorCount": 132, "totalGlobalMem": 2**37}
    runtime = SimpleNamespace(
        getDeviceProperties=lambda device: properties,
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 12090,
    )
    backend = Backend("cupy:0")
    backend.xp = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    backend.device = 0
    monkeypatch.setattr(xprnn, "get_backend", lambda name: backend)
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    assert machine.describe_device() == {
        "name": "NVIDIA H200",
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_GiB": 128.0,
        "devices": 1,
        "driver": "580.1",
        "cuda_driver": "13.0",
        "cuda_runtime": "12.9",
    }


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str) -> Backend:
        raise xprnn.BackendUnavailableError("no driver")

    monkeypatch.setattr(xprnn, "get_backend", unavailable)
    assert machine.describe_device() is None
    monkeypatch.setenv("PATH", "")
    assert machine.driver() == "unknown"
