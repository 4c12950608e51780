"""The complete device report on a CPU: NumPy's layers against torch's, over a tiny grid."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed, which the report compares with")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16")

import xprnn
from benchmarks import device_report
from benchmarks.device import files, peaks, problems, rows, stacks, steps
from xprnn.cells import CELLS

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "bfloat16", "float16")
GRID = ((1, 16, 4), (3, 8, 6))
STEP_GRID = ((1, 16), (3, 8))
STACK_GRID = ((2, 8, 5),)
BOTH_GRID = GRID[1:]  # those in both directions too, in two of the types
SMALL = {"side": 32, "copied": 1 << 16}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest samples possible."""
    for module in (rows, peaks, stacks, steps):
        monkeypatch.setattr(module, "BUDGET", 0.0)
    monkeypatch.setattr(problems, "BOTH_GRID", BOTH_GRID)
    monkeypatch.setattr(problems, "STEP_GRID", STEP_GRID)
    monkeypatch.setattr(problems, "STACK_GRID", STACK_GRID)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)


def measured(folder: Path, limit: float = device_report.LIMIT, **grid: Any) -> dict[str, Any]:
    grid = {"dtypes": DTYPES, "grid": GRID, **grid}
    numpy = xprnn.get_backend("numpy")
    return device_report.measured_report(numpy, folder, grid, limit, **SMALL)


def of_layers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are neither steps nor stacks."""
    return [row for row in report["rows"] if row["layers"] == 1]


def wrong_except_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip the sign of the reset gate's gradient, but not in float64, which is the reference."""
    original = CELLS["gru"].backward

    def broken(xp: Any, weights: Any, step: Any) -> None:
        original(xp, weights, step)
        if step.gates.dtype != "float64":
            step.gates.reshape(len(step.gates), 3, -1)[:, 0] *= -1

    monkeypatch.setattr(CELLS["gru"], "backward", broken)


def test_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = measured(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    files.check_report(report)
    assert len(report["rows"]) == 3 * (3 * 2 + 2) * 2 + 3 * 3 * 2 + 2 * 2 * 3
    for row in report["rows"]:
        assert not row["wrong"] and 0 < row["error"] <= row["limit"]
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["floor_us"] > 0 < row["ours_us"]  # both are times of a busy CPU
        assert row["floor_of"] in ("operations", "bytes")
    both = [row for row in report["rows"] if row["direction"] == "both"]
    assert len(both) == 3 * 2 * 2 and {row["dtype"] for row in both} == {"float32", "bfloat16"}
    assert {row["direction"] for row in report["rows"]} == {"forward", "both"}
    taken = [(row["T"], row["layers"]) for row in report["rows"] if row["pass"] == "step"]
    assert taken == [(1, 3)] * (3 * 3 * 2)
    stacked = [row for row in report["rows"] if row["T"] == 5]
    assert [row["layers"] for row in stacked] == [2, 3, 4] * 4
    assert {row["pass"] for row in stacked} == {"forward"}
    assert len(of_layers(report)) == len(report["rows"]) - len(taken) - len(stacked)
    assert report["versions"]["torch"] and report["ceilings"]["rates"].keys() == {*DTYPES}
    text = (tmp_path / "report.md").read_text()
    assert (
        text.count("| reference |") == len(report["rows"]) + len(both) and "0 of them wrong" in text
    )
    for private in (str(tmp_path), str(ROOT), str(Path.home()), socket.gethostname()):
        assert private not in text + json.dumps(report)
    printed = capsys.readouterr().out
    phases = [line.split(" ")[0] for line in printed.splitlines()[:-1]]
    assert phases == ["compared", "timed"] * (len(phases) // 2) and printed.splitlines()[-1] == (
        f"written: {tmp_path / 'report.json'}"
    )
    steps = [row for row in report["rows"] if row["pass"] == "step"]
    near = sum([row["ours_us"] <= 1.5 * row["floor_us"] for row in steps])
    assert f"- steps within 1.5 times their bound: {near} of 18\n" in text


def test_a_wrong_sign_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_except_in_float64(monkeypatch)
    report = measured(tmp_path, cells=("gru", "lstm"), dtypes=("float32",))
    for row in of_layers(report):
        back = row["pass"] == "forward+backward"
        if row["cell"] == "gru":
            assert row["ours_us"] is None and row["floor_us"] is None
            assert row["not_timed"] == ("wrong" if back else "the other pass is wrong")
            assert bool(row["wrong"]) == back
        else:
            assert row["ours_us"] > 0
    assert "is off by" in (tmp_path / "report.md").read_text()
    assert "wrong" in files.docs_section([report])


def test_a_wrong_row_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device_report, "usable_backend", lambda: xprnn.get_backend("numpy"))
    original = device_report.measured_report
    tiny = {"cells": ("gru",), "dtypes": ("float32",), "grid": GRID[:1]}
    monkeypatch.setattr(
        device_report,
        "measured_report",
        lambda *arguments, **limit: original(*arguments, tiny, **limit, **SMALL),
    )
    assert device_report.main(["--out", str(tmp_path)]) == 0
    wrong_except_in_float64(monkeypatch)
    assert device_report.main(["--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        "device_report: wrong: gru float32 forward 1 1 16 4 forward+backward reference: d"
    )


def test_results_that_differ_at_full_length_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps do not show it; torch is compared at full length."""
    original = rows.torch_peer

    def other(task: Any) -> Any:
        peer = original(task)
        peer.results["output"][-1] *= -1
        return peer

    monkeypatch.setattr(rows, "torch_peer", other)
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",))
    for row in of_layers(report):
        assert row["wrong"].startswith("DisagreementError: torch: its output differs")
        assert row["ours_us"] is None


def test_a_kernel_that_fails_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rows.results_of

    def failing(layer: Any, arguments: Any) -> Any:
        if isinstance(layer, xprnn.LSTM):
            raise xprnn.KernelStoppedError("kernel lstm_forward timed out at step 1: waited\nmore")
        return original(layer, arguments)

    monkeypatch.setattr(rows, "results_of", failing)
    report = measured(tmp_path, dtypes=("float32",))
    errors = {row["cell"]: row["wrong"] for row in of_layers(report)}
    stopped = "KernelStoppedError: kernel lstm_forward timed out at step 1: waited"
    assert errors == {"gru": "", "lstm": stopped, "rnn_tanh": ""}


def test_a_longer_time_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    original = rows.xprnn_peer

    def slow(task: Any) -> Any:
        peer = original(task)
        forward = peer.forward
        object.__setattr__(peer, "forward", lambda: (time.sleep(0.05), forward()))
        return peer

    monkeypatch.setattr(rows, "xprnn_peer", slow)
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",), grid=GRID[:1])
    forward, both = of_layers(report)
    assert forward["ours_us"] > 50_000 and forward["ratio"] < forward["torch_us"] / 50_000
    assert both["ours_us"] < forward["ours_us"]


# -- what is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with status 2."""
    assert device_report.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("device_report: ")
    return line.removeprefix("device_report: ")


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the command continued")


def test_out_is_refused_with_docs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "--docs", "--out", str(tmp_path))
    assert message == "--out applies to measurements: --docs writes docs/gpu.md only"
    assert not list(tmp_path.iterdir())


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        message = refused(capsys, "--out", str(tmp_path / "out"))
        assert message == f"no GPU to measure on: {error}"
        assert not list(tmp_path.iterdir())
    else:
        pytest.skip("this machine has a GPU")


def test_without_torch_and_with_one_for_the_cpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(xprnn, "get_backend", lambda name: object())
    monkeypatch.setattr(device_report, "measured_report", never)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(capsys).endswith("has no usable CUDA device to compare with")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused(capsys).startswith("torch cannot be imported: ")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error comes before any measurement."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(device_report, "usable_backend", lambda: xprnn.get_backend("numpy"))
    monkeypatch.setattr(rows, "compared", never)
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"--out {folder}: cannot be written: " in refused(capsys, "--out", str(folder))


def test_files_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",), grid=GRID[:1])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert before.keys() == {"report.json", "report.md"}
    later = {**report, "commit": "another"}

    def full(self: Path, *_: Any) -> None:
        with self.open("w") as file:
            file.write("half")
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match=os.strerror(28)):
            files.write(later, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a field too few": (lambda r: r.pop("commit"), "report: expected the fields"),
    "no ratio of a row": (lambda r: r["rows"][1].pop("ratio"), r"rows\[1\]: expected the fields"),
    "no driver": (lambda r: r["device"].pop("driver"), "report: device: expected its driver"),
    "a size as text": (lambda r: r["rows"][0].update(N="1"), r"rows\[0\]: N: expected int"),
    "no number": (lambda r: r["rows"][0].update(error=math.nan), r"rows\[0\]: error: .*nan"),
    "a time of a wrong row": (lambda r: r["rows"][0].update(wrong="so"), "is wrong but has a time"),
    "neither times nor why": (
        lambda r: r["rows"][0].update(ours_us=None),
        "either times or a reason",
    ),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BUDGET", 0.0)
        patch.setattr(problems, "STACK_GRID", STACK_GRID)
        folder = tmp_path_factory.mktemp("sample")
        return measured(folder, cells=("gru",), dtypes=("float32",), grid=GRID[:1])


@pytest.mark.parametrize("name", BROKEN)
def test_an_invalid_report_is_refused(name: str, sample: dict[str, Any], tmp_path: Path) -> None:
    report = copy.deepcopy(sample)
    change, message = BROKEN[name]
    change(report)
    with pytest.raises(ValueError, match=message):
        files.write(report, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_its_usage() -> None:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.device_report", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--docs" in done.stdout and "--out FOLDER" in done.stdout
