"""What runs beside the device report on a GPU: the table of tilings, the script of all parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from host_kernels import needs_compiler
from strict_sequence import Function, install

import xprnn
from benchmarks.device import tuning
from benchmarks.device.problems import Problem, problems
from xprnn.backend import Backend
from xprnn.bench import clock
from xprnn.kernels.cuda.plan import KERNELS, Tiling, plan

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_first.sh"


# -- tilings


@needs_compiler
@pytest.mark.parametrize("work", tuning.WORKS)
def test_every_tiling_that_fits_is_timed(
    work: str, strict: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("xprnn.bench.clock.SAMPLE", 1e-9)
    monkeypatch.setattr(tuning, "BUDGET", 0.0)
    kernel = KERNELS["gru", work]
    chunks = 2 * kernel.reduction
    few = (Tiling(2, chunks, 1, 1), Tiling(2, chunks, 1, 2), Tiling(1, 1, 1, 1))
    mine = kernel._replace(tilings={"float32": few})
    monkeypatch.setitem(KERNELS, ("gru", work), mine)
    plan.cache_clear()
    try:
        found = tuning.lines(Problem("gru", "float32", 9, 40, 3), work, strict, clock._seconds)
    finally:
        plan.cache_clear()
    assert KERNELS["gru", work] is mine and "XPRNN_KERNELS" in os.environ
    assert len(found) == 2  # the third does not reach over H
    assert sum(line.endswith("| chosen |") for line in found) == 1
    times = [float(line.split("|")[8]) for line in found]
    assert times == sorted(times) and times[0] > 0
    forward = "xprnn::gru_backward" if work == "backward" else "xprnn::gru_forward"
    launched = {name for name, _ in Function.launches if name.startswith(forward)}
    assert len(launched) == 2
    assert tuning.HEAD[0].count("|") == found[0].count("|")


def test_a_cell_without_such_kernels_has_no_lines(strict: Backend) -> None:
    problem = Problem("gru_reset_before", "float32", 9, 40, 3)
    assert tuning.lines(problem, "forward", strict, clock._seconds) == []


@pytest.fixture
def no_gpu() -> None:
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError:
        return
    pytest.skip("there is a GPU here")


def test_tuning_needs_a_gpu(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuning.main() == 2
    assert capsys.readouterr().err.startswith("tuning: no GPU to measure on: ")


def test_the_grid() -> None:
    assert len(problems()) == 3 * (4 * 7 + 2 * 3)
    assert {p.directions for p in problems()[-18:]} == {2}
    assert [(p.N, p.H, p.T) for p in problems()[:7]] == [
        *[(1, 256, 512), (8, 512, 512), (32, 512, 512), (64, 1024, 256)],
        *[(256, 1024, 128), (1, 1024, 1024), (16, 768, 1024)],
    ]


# -- all parts


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = [bash, str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_script_wants_a_folder_and_parts_that_there_are(tmp_path: Path) -> None:
    bare = run()
    assert bare.returncode == 2 and "bash benchmarks/gpu_first.sh FOLDER [PART...]" in bare.stdout
    other = run(str(tmp_path / "out"), "suite", "speed")
    assert other.returncode == 2 and other.stderr.startswith("no part speed: suite sequence")
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_leave_their_evidence(no_gpu: None, tmp_path: Path) -> None:
    assert run(str(tmp_path), "tuning", "report").returncode == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"summary.txt", "evidence.tar.gz"}
    summary = (tmp_path / "summary.txt").read_text()
    last = [line.split()[:2] for line in summary.splitlines()[-2:]]
    assert last == [["report", "exit"], ["tuning", "exit"]]  # in the script's order
    with tarfile.open(tmp_path / "evidence.tar.gz") as tar:
        kept = {Path(name).name for name in tar.getnames()}
    assert kept == {"evidence", "summary.txt", "report.txt", "tuning.txt"}


def test_a_suite_that_skips_everything_is_no_success(no_gpu: None, tmp_path: Path) -> None:
    python = tmp_path / "python"  # whose suite passes, as one does that skips all its tests
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pytest*) ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    done = run(str(tmp_path / "out"), "suite", PYTHON=str(python))
    assert done.returncode == 1 and done.stderr.startswith("no usable GPU")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "nothing here counts" in summary and "suite     exit 0" in summary


def test_every_part_has_a_time_that_fits_the_headers() -> None:
    text = SCRIPT.read_text("utf-8")
    seconds = {
        words[1]: int(words[2])
        for words in (line.split() for line in text.splitlines() if line.startswith("step "))
    }
    parts = text.split("parts=(")[1].split(")")[0].split()
    assert list(seconds) == parts and sum(seconds.values()) <= 21 * 60
    assert "21 minutes at most" in text
    for together in (("suite", "sequence", "verify"), ("report",), ("sanitizer", "tuning")):
        assert sum(seconds[part] for part in together) < 9 * 60
        assert f"`{' '.join(together)}`" in text
    assert all(f"\n# {part} " in text for part in parts)
