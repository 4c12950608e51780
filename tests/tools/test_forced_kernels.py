"""The suite with the sequence kernels only: what runs, what is skipped, what fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFTEST = """
import os, pytest
from tests.support import forced_kernels as forced
from pathlib import Path
from tests.support.gpu_report import GpuReport

def describe():
    return {"name": "A device"}

def pytest_configure(config):
    config.pluginmanager.register(forced)
    folder = Path(__file__).parent / "results"
    config.pluginmanager.register(GpuReport(config, describe, folder, forced.NAME))

@pytest.fixture(params=[forced.NAME] if forced.NAME else ["reference", "pointwise"])
def implementation(request):
    return request.param
"""
SUITE = """
import os, pytest
from xprnn.kernels import KernelUnavailableError
pytestmark = pytest.mark.gpu

def test_each(implementation: str):
    assert implementation in WANTED
    assert "XPRNN_KERNELS" not in os.environ

def test_refused(implementation: str):
    raise KernelUnavailableError("XPRNN_KERNELS=sequence: training: float64")

def test_wrong(implementation: str):
    assert False

def test_another():
    assert False
"""


def run(folder: Path, forced: str, wanted: list[str]) -> str:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(f"WANTED = {wanted!r}\n{SUITE}")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a device\naddopts = -ra\n")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "XPRNN_KERNELS"},
        **({"XPRNN_KERNELS": forced} if forced else {}),
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    ).stdout


def test_the_sequence_kernels_alone(tmp_path: Path) -> None:
    output = run(tmp_path, "sequence", ["sequence"])
    assert "1 failed, 1 passed, 1 skipped, 1 deselected" in output
    assert "XPRNN_KERNELS=sequence: training: float64" in output  # the reason of the skip
    assert "FAILED test_it.py::test_wrong" in output
    (written,) = tmp_path.glob("results/a-device/*.md")
    assert written.stem.endswith("-sequence")  # beside the file of the whole suite
    assert "The whole suite, sequence kernels alone, in" in written.read_text()


def test_other_files_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "data").write_bytes(b"\xff")
    assert "1 failed, 1 passed, 1 skipped, 1 deselected" in run(tmp_path, "sequence", ["sequence"])
    assert "RuntimeError: imported" in run(tmp_path, "", [])


def test_every_implementation_otherwise(tmp_path: Path) -> None:
    output = run(tmp_path, "", ["reference", "pointwise"])
    assert "5 failed, 2 passed in" in output and "deselected" not in output
