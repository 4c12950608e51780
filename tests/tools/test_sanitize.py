"""`benchmarks/sanitize.py` with a fake compute-sanitizer, and what it launches."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.support import machine
from tests.support.pointwise_cases import draw, needs_dtype
from xprnn.kernels.cuda.pointwise import KERNELS, PointwiseKernel

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sanitize.py"
TOOLS = ["memcheck", "synccheck", "initcheck", "racecheck"]
TOOL = """#!/bin/sh
tool=$2
for what; do :; done  # the last argument: what is launched
echo "$@" >> {log}
case $tool:$what in
  {silent}:{silent}) echo "========= ERROR SUMMARY: 0 errors" ;;
  {alarmed}) echo "========= ERROR SUMMARY: 3 errors" ;;
  racecheck:kernels)
    echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" ;;
  *:kernels | *:waiting | *:frozen) echo "========= ERROR SUMMARY: 0 errors" ;;
  *) echo "========= ERROR SUMMARY: 1 error" ; exit 1 ;;
esac
"""


@pytest.fixture
def sanitize(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, on a simulated device."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(machine, "describe_device", lambda: {"name": "Fake", "driver": "1"})
    return module


def call(
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    silent: str = "none",
    alarmed: str = "none",
) -> int:
    """Run the script with a tool that misses one injected fault, or reports a correct kernel."""
    tool = folder / "compute-sanitizer"
    tool.write_text(TOOL.format(silent=silent, alarmed=alarmed, log=folder / "log"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--out", str(folder / "out")])
    status: int = sanitize.main()
    return status


def test_no_error_is_reported(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(sanitize, monkeypatch, tmp_path) == 0
    text = (tmp_path / "out" / "sanitizer.md").read_text()
    assert "| memcheck | kernels | SUMMARY: 0 errors |" in text
    hazards = "SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert f"| racecheck | kernels | {hazards} |" in text
    for tool in ("memcheck", "synccheck"):
        for what in ("waiting", "frozen"):
            assert f"| {tool} | {what} | SUMMARY: 0 errors |" in text
    assert "# compute-sanitizer on Fake, " in text and "Commit " in text
    log = (tmp_path / "log").read_text()
    for tool, launches in sanitize.TOOLS.items():  # the injected fault first, then the kernels
        lines = [rf"--tool {tool} .*--launch {what}\n" for what in (tool, *launches)]
        assert re.search("".join(lines), log)


@pytest.mark.parametrize("tool", TOOLS)
def test_an_error_is_reported(
    tool: str,
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    what = sanitize.TOOLS[tool][-1]
    assert call(sanitize, monkeypatch, tmp_path, alarmed=f"{tool}:{what}") == 1
    text = (tmp_path / "out" / "sanitizer.md").read_text()
    assert f"| {tool} | {what} | SUMMARY: 3 errors |" in text and text.count("3 errors") == 1
    assert "SUMMARY: 3 errors" in capsys.readouterr().out


@pytest.mark.parametrize("tool", TOOLS)
def test_the_results_of_a_tool_that_misses_its_fault_are_not_used(
    tool: str,
    sanitize: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The results of the others are written."""
    assert call(sanitize, monkeypatch, tmp_path, silent=tool) == 2
    assert f"{tool} did not report the fault injected for it" in capsys.readouterr().err
    rows = (tmp_path / "out" / "sanitizer.md").read_text().split("|---|---|---|\n")[1].splitlines()
    assert f"| {tool} | injected fault | not reported, results not used |" in rows
    assert sum(row.startswith(f"| {tool} |") for row in rows) == 1
    others = [
        what for name, launches in sanitize.TOOLS.items() if name != tool for what in launches
    ]
    assert len(rows) == 1 + len(others)


def test_a_run_that_is_stopped_keeps_its_results(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = sanitize.run

    def stopped(tool: str, name: str, what: str) -> object:
        if what == "frozen":
            raise KeyboardInterrupt
        return original(tool, name, what)

    monkeypatch.setattr(sanitize, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        call(sanitize, monkeypatch, tmp_path)
    text = (tmp_path / "out" / "sanitizer.md").read_text()
    assert "| memcheck | waiting | SUMMARY: 0 errors |" in text


def test_no_tool(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == 2
    assert "compute-sanitizer is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernels_are_launched_as_by_a_layer(kernel: PointwiseKernel, sanitize: ModuleType) -> None:
    """The same shapes and dtypes, and finite numbers wherever the kernel reads."""
    for dtype in sanitize.TYPES:
        needs_dtype(dtype)
        drawn = draw(kernel, dtype, 3, 43)
        for buffer in kernel.buffers:
            allocated = sanitize.allocate(np, kernel, buffer, dtype, 3, 43)
            expected = drawn[buffer.name]
            assert (allocated.shape, allocated.dtype) == (expected.shape, expected.dtype), (
                buffer.name
            )
            assert buffer.use == "out" or np.isfinite(allocated.astype(float)).all()
