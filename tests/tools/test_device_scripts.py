"""The GPU's other measurements: the table of tilings, and the script that runs all parts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import xprnn
from benchmarks.device import tuning
from benchmarks.device.problems import Problem, problems
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.sequence import Function, install
from xprnn.backend import Backend
from xprnn.diagnostics.qualifying.run import PLANS
from xprnn.kernels.cuda.plan import KERNELS, Tiling, plan
from xprnn.kernels.request import requested
from xprnn.tools.bench import clock

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_first.sh"


# -- tilings


@needs_compiler
@pytest.mark.parametrize("work", tuning.WORKS)
def test_every_tiling_that_fits_is_timed(
    work: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)
    monkeypatch.setattr(tuning, "BUDGET", 0.0)
    kernel = KERNELS["gru", work]
    chunks = 2 * kernel.reduction
    few = (Tiling(2, chunks, 1, 1), Tiling(2, chunks, 1, 2), Tiling(1, 1, 1, 1))
    custom = kernel._replace(tilings={"float32": few})
    monkeypatch.setitem(KERNELS, ("gru", work), custom)
    plan.cache_clear()
    try:
        lines = tuning.lines(Problem("gru", "float32", 9, 40, 3), work, fake_cupy, clock._seconds)
    finally:
        plan.cache_clear()
    assert KERNELS["gru", work] is custom and requested().name == "reference"
    assert len(lines) == 2  # the third does not cover H
    assert sum(line.endswith("| chosen |") for line in lines) == 1
    times = [float(line.split("|")[8]) for line in lines]
    assert times == sorted(times) and times[0] > 0
    forward = "xprnn::gru_backward" if work == "backward" else "xprnn::gru_forward"
    launched = {name for name, _ in Function.launches if name.startswith(forward)}
    assert len(launched) == 2
    assert tuning.HEAD[0].count("|") == lines[0].count("|")


def test_a_cell_without_such_kernels_has_no_lines(fake_cupy: Backend) -> None:
    problem = Problem("gru_reset_before", "float32", 9, 40, 3)
    assert tuning.lines(problem, "forward", fake_cupy, clock._seconds) == []


@pytest.fixture
def no_gpu() -> None:
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError:
        return
    pytest.skip("this machine has a GPU")


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


def run(
    *arguments: str, script: Path = SCRIPT, **variables: str
) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = [bash, str(script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_script_requires_a_folder_and_known_parts(tmp_path: Path) -> None:
    usage = run()
    assert usage.returncode == 2 and "bash benchmarks/gpu_first.sh FOLDER [PART...]" in usage.stdout
    other = run(str(tmp_path / "out"), "suite", "speed")
    assert other.returncode == 2 and other.stderr.startswith(
        "no part speed: qualify warm smoke sequence verify report suite"
    )
    assert list((tmp_path / "out").iterdir()) == []


def test_parts_store_their_output(no_gpu: None, tmp_path: Path) -> None:
    assert run(str(tmp_path), "tuning", "report").returncode == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"summary.txt", "evidence.tar.gz"}
    summary = (tmp_path / "summary.txt").read_text()
    last = [line.split()[:2] for line in summary.splitlines()[-2:]]
    assert last == [["report", "exit"], ["tuning", "exit"]]  # in the script's order
    assert archived(tmp_path) == {"evidence", "summary.txt", "report.txt", "tuning.txt"}


def test_a_suite_that_skips_everything_is_not_a_success(no_gpu: None, tmp_path: Path) -> None:
    python = tmp_path / "python"  # its suite passes, as if it skipped all tests
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *pytest*) ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    done = run(str(tmp_path / "out"), "suite", PYTHON=str(python))
    assert done.returncode == 1 and done.stderr.startswith("no usable GPU")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "the results do not count" in summary and "suite     exit 0" in summary


def test_the_output_of_earlier_calls_is_kept(no_gpu: None, tmp_path: Path) -> None:
    assert run(str(tmp_path), "tuning").returncode == 1
    assert run(str(tmp_path), "report").returncode == 1
    ends = re.findall(r"^(\w+) +exit 2 ", (tmp_path / "summary.txt").read_text(), re.MULTILINE)
    assert ends == ["tuning", "report"]
    assert {"tuning.txt", "report.txt"} < archived(tmp_path)


def archived(folder: Path) -> set[str]:
    with tarfile.open(folder / "evidence.tar.gz") as tar:
        return {Path(name).name for name in tar.getnames()}


# -- with a fake Python that runs no part


PYTHON = """#!/bin/sh
case "$*" in
    -c*) exec {python} "$@" ;;
    *"{part}"*) echo begun; {does} ;;
esac
echo "ran $*"
"""
ENDS = re.compile(r"^(\w+) +exit (\d+) +\d+ of +(\d+) s  ", re.MULTILINE)  # name, status, limit


def fake_python(folder: Path, part: str = "no part", does: str = "") -> Path:
    python = folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, part=part, does=does))
    python.chmod(0o755)
    return python


@pytest.mark.parametrize(
    ("call", "parts", "minutes"),
    [
        ("first", "qualify warm smoke sequence verify report", 10),
        ("second", "warm suite", 9),
        ("third", "warm full", 10),
        ("fourth", "warm frozen sanitizer tuning", 10),
        ("", "qualify warm smoke sequence verify report suite full frozen sanitizer tuning", 33),
    ],
)
def test_parts_called_together_fit_their_time(
    call: str, parts: str, minutes: int, tmp_path: Path
) -> None:
    """Including the ten seconds in which a part that hangs may still end by itself."""
    python = fake_python(tmp_path)
    run(str(tmp_path / "out"), *call.split(), PYTHON=str(python))
    lines = ENDS.findall((tmp_path / "out" / "summary.txt").read_text())
    assert [(name, status) for name, status, _ in lines] == [(part, "0") for part in parts.split()]
    assert sum(int(limit) + 10 for *_, limit in lines) <= 60 * minutes
    text = SCRIPT.read_text("utf-8")
    message = (
        rf"\n# {call} +{parts}: {minutes} minutes\n"
        if call
        else rf"takes {minutes} minutes at most"
    )
    assert re.search(message, text)
    assert all(re.search(rf"\n# {part} +\w", text) for part in parts.split())


def test_a_qualification_comes_first_and_its_file_is_archived(tmp_path: Path) -> None:
    """Also if it ends with a failed kernel; the other parts do not read any file."""
    writes = 'echo "$XPRNN_QUALIFIED" > "${7%/*}/variable.txt"; echo "{}" > "$7"; exit 1'
    python = fake_python(tmp_path, "xprnn qualify", writes)
    variables = {"PYTHON": str(python), "XPRNN_QUALIFIED": "another.json"}
    assert run(str(tmp_path / "out"), "verify", "qualify", **variables).returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [end[:2] for end in ENDS.findall(summary)] == [("qualify", "1"), ("verify", "0")]
    assert "-m xprnn qualify --backend cupy -o " in summary
    with tarfile.open(tmp_path / "out" / "evidence.tar.gz") as tar:
        for name, content in (("qualified.json", b"{}\n"), ("variable.txt", b"off\n")):
            file = tar.extractfile(f"evidence/{name}")
            assert file is not None and file.read() == content


def test_a_qualification_has_time_to_end_by_itself() -> None:
    limit = re.search(r"^step qualify (\d+) ", SCRIPT.read_text("utf-8"), re.MULTILINE)
    assert limit and int(limit[1]) >= PLANS[True, False][1].total + 15


def test_a_part_that_hangs_does_not_stop_the_others(tmp_path: Path) -> None:
    """Its status is that of a timeout, and its output is archived."""
    python = fake_python(tmp_path, "xprnn verify", "sleep 60")
    benchmarks = tmp_path / "copy" / "benchmarks"
    (benchmarks / "results").mkdir(parents=True)
    script = benchmarks / "gpu_first.sh"
    script.write_text(SCRIPT.read_text("utf-8").replace("step verify 40 ", "step verify 1 "))
    done = run(str(tmp_path / "out"), "verify", "tuning", script=script, PYTHON=str(python))
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert ENDS.findall(summary)[0] == ("verify", "124", "1")
    assert ENDS.findall(summary)[1][:2] == ("tuning", "0")
    with tarfile.open(tmp_path / "out" / "evidence.tar.gz") as tar:
        text = tar.extractfile("evidence/verify.txt")
        assert text is not None and text.read() == b"begun\n"


def test_a_script_that_is_killed_keeps_its_output(tmp_path: Path) -> None:
    """The results of earlier parts, and the output of the one that ran."""
    python, out = fake_python(tmp_path, "device.tuning", "sleep 30"), tmp_path / "out"
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    command = [bash, str(SCRIPT), str(out), "verify", "tuning"]
    environment = {**os.environ, "PYTHON": str(python)}
    with (tmp_path / "printed").open("w") as file:
        script = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        running = out / "running.txt"
        deadline = time.monotonic() + 120
        while not (running.exists() and "begun" in running.read_text()):
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        script.kill()
        script.wait()
    assert running.read_text() == "begun\n"
    assert [end[0] for end in ENDS.findall((out / "summary.txt").read_text())] == ["verify"]
    assert archived(out) == {"evidence", "summary.txt", "verify.txt"}


def test_a_missing_package_is_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name in ('torch', 'pytest') else find(name, *a)"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    python = fake_python(tmp_path)
    done = run(str(tmp_path / "out"), "verify", PYTHON=str(python), PYTHONPATH=path)
    message = "not installed, parts that need it will fail: pytest torch"
    assert done.returncode == 1 and done.stderr.startswith(message)
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.index(message) < summary.index("verify    exit 0")
