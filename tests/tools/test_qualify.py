"""`xprnn qualify`: measurement on the CPU, faults of kernels, the file, and what "auto" selects."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.qualifying import GRID, LIMITS, WRONG, stopping, worker
from tests.tools.test_cli import assert_one_line_error, xprnn_command
from xprnn import kernels
from xprnn.diagnostics.qualifying import comparing
from xprnn.diagnostics.qualifying import run as qualifying
from xprnn.diagnostics.qualifying.grid import Case
from xprnn.diagnostics.qualifying.processes import Lane, Request, Workers
from xprnn.diagnostics.qualifying.report import QualifyReport, microseconds
from xprnn.diagnostics.qualifying.run import impersonal, measure, shares, write
from xprnn.diagnostics.qualifying.timing import call_of
from xprnn.diagnostics.verification.equations import unrecorded_results
from xprnn.kernels import qualification

sequence = pytest.importorskip(
    "xprnn.kernels.numba.sequence", reason="Numba is not installed: pip install xprnn[numba]"
)
TINY = """
from tests.support.qualifying import GRID, LIMITS
from xprnn.diagnostics.qualifying import run
run.PLANS = dict.fromkeys(run.PLANS, (GRID, LIMITS))
"""
SIZES = [(kind, H) for H in (5, 6) for kind in ("forward", "training", "step")]


def qualified(code: str = "", **limits: float) -> QualifyReport:
    return measure(
        "numpy",
        ["gru"],
        grid=GRID,
        limits=replace(LIMITS, **limits),
        command=worker(code),
    )


def outcomes(report: QualifyReport, implementation: str) -> dict[tuple[str, int], str]:
    assert report.qualification is not None
    rows = report.qualification.rows
    return {(r.kind, r.H): r.outcome for r in rows if r.implementation == implementation}


def selected(
    report: QualifyReport, H: int, path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> str:
    """The first lines of `explain` where "auto" reads the report's file."""
    write(report, path)
    with monkeypatch.context() as patch:
        patch.setenv("XPRNN_QUALIFIED", str(path))
        kernels.forget_plans()
        layer = xprnn.GRU(H, H, seed=0)
        text = (layer.train() if training else layer.eval()).explain((3, 4, H))
    kernels.forget_plans()
    return text


@pytest.fixture(scope="module")
def right() -> QualifyReport:
    return qualified()


def test_right_kernels_are_qualified(right: QualifyReport) -> None:
    assert right.ok and not right.missed and not right.why_not
    assert outcomes(right, "reference") == dict.fromkeys(SIZES, "right")
    assert outcomes(right, "sequence") == dict.fromkeys(SIZES, "right")
    steps = {("step", 5), ("step", 6)}
    expected = {size: "unsupported" if size in steps else "right" for size in SIZES}
    assert outcomes(right, "pointwise") == expected
    for row in right.qualification.rows:
        if row.outcome == "right":
            assert 0 <= row.error <= 1 and row.microseconds > 0 and row.bound > 0
    assert {line.default for line in right.lines} == {"sequence"}


def test_its_file_is_what_the_reader_takes(right: QualifyReport, tmp_path: Path) -> None:
    written = write(right, tmp_path / "q.json")
    assert written.path == tmp_path / "q.json"
    assert qualification.parse(written.path.read_bytes()) == right.qualification
    package = kernels.package_of(xprnn.get_backend("numpy"))
    assert right.qualification.identity == package.identity(xprnn.get_backend("numpy"))
    assert [path.name for path in tmp_path.iterdir()] == ["q.json"]


def test_a_wrong_kernel_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = qualified(WRONG)
    assert not report.ok
    of_sequence = outcomes(report, "sequence")
    assert {of_sequence[kind, H] for kind in ("forward", "training") for H in (5, 6)} == {"wrong"}
    assert of_sequence["step", 5] == "right"  # another kernel
    assert {*outcomes(report, "reference").values()} == {"right"}
    assert {row.implementation for row in report.failed} == {"sequence"}
    assert "FAILED: gru float32 forward N=4 H=5 T=3 sequence: wrong" in str(report).replace(
        "\n", " "
    )
    for training in (False, True):
        text = selected(report, 5, tmp_path / "q.json", monkeypatch, training)
        assert not text.splitlines()[0].endswith(": sequence")
        assert "sequence was not right there" in text.splitlines()[1]


@pytest.mark.parametrize(
    ("action", "outcome", "detail"),
    [
        ("raise RuntimeError('a fault')", "raised", "RuntimeError: a fault"),
        ("print('last words', file=__import__('sys').stderr, flush=True); os._exit(3)",
         "ended its process", "exit status 3: last words"),
        ("os.kill(os.getpid(), 11)", "ended its process", "signal SIGSEGV"),
    ],
)  # fmt: skip
def test_a_kernel_that_stops_costs_its_rows(
    action: str, outcome: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = qualified(stopping(action))
    found = outcomes(report, "sequence")
    assert {found["forward", 6], found["training", 6]} == {outcome}
    assert {found[kind, 5] for kind in ("forward", "training", "step")} == {"right"}
    assert {*outcomes(report, "reference").values()} == {"right"}
    assert all(detail in row.detail for row in report.failed)
    text = selected(report, 6, tmp_path / "q.json", monkeypatch, False)
    assert not text.splitlines()[0].endswith(": sequence")


def test_a_kernel_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = qualified(stopping("time.sleep(1000)", "backward"), compare=15.0)
    found = outcomes(report, "sequence")
    assert found["training", 6] == "timed out"
    assert found["forward", 6] == found["training", 5] == "right"
    (row,) = report.failed
    assert row.detail == "no answer within 15 s"
    text = selected(report, 6, tmp_path / "q.json", monkeypatch, True)
    assert not text.splitlines()[0].endswith(": sequence")


def test_no_worker_remains(tmp_path: Path) -> None:
    """After an interrupt there is neither a process nor a file."""
    hang = f"open({str(tmp_path / 'pid')!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(1000)"
    code = (
        f"{TINY}\nfrom tests.support.qualifying import stopping, worker\n"
        f"run.measure.__kwdefaults__['command'] = worker(stopping({hang!r}))\n"
        "import sys; from xprnn.tools import cli\n"
        "sys.exit(cli.main(['qualify', '--cell', 'gru', '-o', 'q.json']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "xprnn: interrupted\n")
    for pid in (tmp_path / "pid").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


# -- the command


def command(*arguments: str, cwd: Path, code: str = TINY, **environment: str) -> Any:
    script = f"{code}\nimport sys; from xprnn.tools import cli\nsys.exit(cli.main(sys.argv[1:]))"
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", script, "qualify", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_the_command_writes_to_the_cache_folder(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    done = command("--cell", "gru", "--share", "shared", cwd=tmp_path, XDG_CACHE_HOME=cache)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "cache" / "xprnn" / "qualified").iterdir()
    assert path.name.startswith("numba-") and path.suffix == ".json"
    assert f"wrote {path}" in done.stdout.replace("\n", "")
    shared = sorted((tmp_path / "shared").iterdir())
    assert [each.name for each in shared] == [path.name, path.with_suffix(".md").name]
    assert shared[0].read_bytes() == path.read_bytes()
    text = shared[1].read_text()
    assert "gru float32 forward" in " ".join(text.split())
    for personal in qualifying._personal_names():
        assert personal not in text
    assert str(tmp_path) not in text + path.read_text()


def test_the_command_fails_for_a_wrong_kernel(tmp_path: Path) -> None:
    code = (
        f"{TINY}\nfrom tests.support.qualifying import WRONG, worker\n"
        "run.measure.__kwdefaults__['command'] = worker(WRONG)"
    )
    done = command("--cell", "gru", "-o", "q.json", cwd=tmp_path, code=code)
    assert_one_line_error(done, r"kernels failed and are not selected: gru \(sequence, float32\)")
    assert json.loads((tmp_path / "q.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (["--cell", "mamba"], "invalid choice: 'mamba'", 2),
        (["--backend", "tpu", "-o", "q.json"], "backend: expected", 1),
        (["-o", "no/q.json"], "no such folder: no", 1),
        (["-o", "."], "not a regular file", 1),
    ],
)
def test_arguments_that_it_refuses(
    arguments: list[str], text: str, status: int, tmp_path: Path
) -> None:
    assert_one_line_error(xprnn_command("qualify", *arguments, cwd=tmp_path), text, status)
    assert not [*tmp_path.iterdir()]


def test_without_a_home_folder_it_asks_for_a_path(tmp_path: Path) -> None:
    code = f"{TINY}\nfrom xprnn.kernels import qualification\nqualification.folder = lambda: None"
    assert_one_line_error(command(cwd=tmp_path, code=code), "no home folder; name the file with -o")


def test_a_cache_folder_that_cannot_be_made_asks_for_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("--quick", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert_one_line_error(done, r"output: .*file.*; name another file with -o FILE")
    assert done.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_that_measured_nothing_leaves_the_file(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text("of an earlier run")
    code = f"{TINY}\nfrom dataclasses import replace\n"
    code += "run.PLANS = dict.fromkeys(run.PLANS, (GRID, replace(LIMITS, total=0.0)))"
    done = command("-o", "q.json", cwd=tmp_path, code=code)
    assert_one_line_error(done, "nothing was measured before the time was over, and no file is")
    assert (tmp_path / "q.json").read_text() == "of an earlier run"


def test_a_full_disk_is_noticed_before_and_after(tmp_path: Path) -> None:
    code = (
        f"{TINY}\nimport pathlib, errno\n"
        "def full(self, data): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "pathlib.Path.write_bytes = full\n"
    )
    done = command("-o", "q.json", cwd=tmp_path, code=code)
    assert_one_line_error(done, "No space left on device")
    assert done.stdout == "" and not [*tmp_path.iterdir()]
    code += "run.check_outputs = lambda *paths: None"  # it is full when the file is written
    done = command("--cell", "gru", "-o", "q.json", cwd=tmp_path, code=code)
    assert_one_line_error(done, "No space left on device")
    assert "auto takes" in done.stdout and not [*tmp_path.iterdir()]


def test_without_numba_there_is_nothing_to_qualify(tmp_path: Path) -> None:
    code = (
        f"{TINY}\nfrom tests.support.qualifying import WITHOUT_NUMBA, worker\n"
        "run.measure.__kwdefaults__['command'] = worker(WITHOUT_NUMBA)"
    )
    done = command("-o", "q.json", cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    assert "nothing to qualify on numpy: fused kernels for the CPU need Numba" in done.stdout
    assert not [*tmp_path.iterdir()]


def test_two_runs_at_once_leave_one_whole_file(right: QualifyReport, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    with qualifying.replacing(path) as part:  # the first is about to replace it
        write(right, path)
        part.write_bytes(path.read_bytes())
    assert qualification.parse(path.read_bytes()) == right.qualification


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Both succeed, and what remains is the file of one; a damaged one is replaced."""
    cache, done = tmp_path / "xprnn" / "qualified", []
    environment = {"XDG_CACHE_HOME": str(tmp_path)}

    def run() -> None:
        done.append(command("--cell", "gru", cwd=tmp_path, **environment))

    threads = [Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.returncode for each in done] == [0, 0], [each.stderr for each in done]
    (path,) = cache.iterdir()
    digest = qualification.parse(path.read_bytes()).digest
    assert sum(f"file {digest}" in each.stdout for each in done) == 1
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(qualification.QualificationError):
        qualification.parse(path.read_bytes())
    run()
    assert done[-1].returncode == 0 and [*cache.iterdir()] == [path]
    assert f"file {qualification.parse(path.read_bytes()).digest}" in done[-1].stdout


# -- parts


@pytest.mark.parametrize(
    ("value", "text"), [(3.492, "3.49"), (56.94, "56.9"), (99.99, "100"), (1234.5, "1,234")]
)
def test_times_have_no_exponent(value: float, text: str) -> None:
    assert microseconds(value) == text


def test_time_that_is_over_leaves_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="nothing was measured before the time was over"):
        qualified(total=0.0)
    monkeypatch.setattr(qualifying.Run, "rows", lambda run, of=qualifying.Run.rows: of(run)[:4])
    report = qualified()
    assert report.missed == 3 * len(SIZES) - len(report.qualification.rows) > 0
    assert f"{report.missed} rows were not reached in time" in str(report)


ECHO = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["method"] == "hang": time.sleep(1000)
    if request["method"] == "cut": print('{"value"', end="", flush=True); os._exit(0)
    print(json.dumps({"value": [os.getpid(), *request["with"]]}), flush=True)
"""


def test_workers_are_replaced_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xprnn.diagnostics.qualifying.processes.START", 0.0)
    lanes = Lane("a"), Lane("b")
    with Workers("numpy", (sys.executable, "-c", ECHO)) as workers:
        first = workers.ask(lanes[0], Request("echo", (1,), 60.0))
        assert first.value[1:] == [1]
        assert workers.ask(lanes[0], Request("hang", (), 0.5)).outcome == "timed out"
        with pytest.raises(ProcessLookupError):
            os.kill(first.value[0], 0)
        assert workers.ask(lanes[0], Request("cut", (), 60.0)).outcome == "ended its process"
        requests = [Request("echo", (k,), 60.0) for k in range(5)]
        answers = [*workers.ask_all({lane: iter(requests) for lane in lanes})]
        assert sorted(answer.value[1] for _, _, answer in answers) == sorted([*range(5)] * 2)
        pids = {answer.value[0] for _, _, answer in answers}
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_shares_are_all_cases_once() -> None:
    lanes = shares([*range(10)], 3)  # type: ignore[list-item]
    taken = [next(lanes[k % 2]) for k in range(10)]  # the third takes none
    assert sorted(taken) == [*range(10)]
    assert [next(lane, None) for lane in lanes] == [None] * 3


def test_details_are_impersonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qualifying, "_personal_names", lambda: ["ada", "laptop"])
    text = "OSError: /home/ada/x/kernel.py:\x1b[31m ada@laptop C:\\Users\\ada\\k.cu, adapted"
    assert impersonal(text) == "OSError: kernel.py: [31m ...@... k.cu, adapted"


def compared(fault: Any, monkeypatch: pytest.MonkeyPatch) -> comparing.Outcome:
    """The comparison of the plain code, with a fault in the results of its calls."""
    calls: list[int] = []

    def faulty(layer: Any, arguments: Any) -> Any:
        results = unrecorded_results(layer, arguments)
        calls.append(1)
        fault(results["output (eval)"], arguments, len(calls))
        return results

    monkeypatch.setitem(comparing.CALLS, "forward", faulty)
    case = Case("gru", "float32", "forward", qualification.Shape(4, 6, 3))
    return comparing.compare(xprnn.get_backend("numpy"), "reference", case)


def off(output: Any, arguments: Any, call: int) -> None:
    output[1, 2] += 0.01


def unequal(output: Any, arguments: Any, call: int) -> None:
    output[0, 0] *= 1 + 2e-7 * (call == 2)


def beside(output: Any, arguments: Any, call: int) -> None:
    output[0, 0] *= 1 + 2e-7 * (call == 4)


def spreading(output: Any, arguments: Any, call: int) -> None:
    if np.isnan(arguments.x).any():
        output[-1, 0, 0] = np.nan


def hidden(output: Any, arguments: Any, call: int) -> None:
    np.nan_to_num(output, copy=False)


def near(output: Any, arguments: Any, call: int) -> None:
    row = arguments.x.shape[1] // 2
    if np.isinf(arguments.x).any():
        output[0, row] += 0.01


@pytest.mark.parametrize(
    ("fault", "detail"),
    [
        (off, "output (eval) differs"),
        (unequal, "output (eval) has other bits when the call is repeated"),
        (beside, "output (eval) has other bits beside other calls"),
        (spreading, "output (eval), with NaN in x: another row has other bits"),
        (hidden, "output (eval), with NaN in x: NaN or infinity at other elements than in the"),
        (near, "output (eval), with infinity in x: finite elements differ"),
    ],
)
def test_each_check_detects_its_fault(
    fault: Any, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = compared(fault, monkeypatch)
    assert outcome.outcome == "wrong"
    assert outcome.detail.startswith(detail)
    assert compared(lambda *arguments: None, monkeypatch).outcome == "right"


def test_training_is_timed_with_new_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a loop with an optimiser: what a kernel keeps of the weights is made at each call."""
    case = Case("gru", "float32", "training", qualification.Shape(4, 6, 3))
    packed: list[int] = []
    original = sequence.NumbaRunner._panels
    monkeypatch.setattr(
        sequence.NumbaRunner, "_panels", lambda *args: packed.append(1) or original(*args)
    )
    with xprnn.use_kernels("sequence"):
        call = call_of(xprnn.get_backend("numpy"), case)
        call()
        first = len(packed)
        call()
    assert len(packed) == 2 * first > 0
