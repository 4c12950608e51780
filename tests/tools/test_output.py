"""The output of commands: on streams of every encoding and width, in pipes, and without any."""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from benchmarks import reports, result_store
from xprnn.diagnostics.verification.report import Absent, Row, VerifyReport
from xprnn.tools import cli, output
from xprnn.tools.bench import clock
from xprnn.tools.bench import report as bench_report

ROOT = Path(__file__).parents[2]
ENCODINGS = ["ascii", "latin-1", "cp1252", "utf-8"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a layer and an array; benchmarks take few and short samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clock, "BUDGET", 0.0)
    monkeypatch.setattr(clock, "SAMPLE", 1e-9)
    xprnn.GRU(3, 4, seed=0).save("m")
    np.save("x.npy", np.ones((6, 5, 3), np.float32))
    return tmp_path


def run_command(
    arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """The status of a command, and its output on a stream of this encoding."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        try:
            status = cli.main(arguments)
        except SystemExit as end:  # --help
            status = int(end.code or 0)
    stream.flush()
    return status, raw.getvalue().decode(encoding)


def words(text: str) -> str:
    """The text without progress bars, numbers and line breaks, which may differ."""
    text = re.sub(r"[-━╸╺]{2,}|(?<![\w.-])-?\d[\d.,e+-]*", "", text)
    return " ".join(text.split())


COMMANDS = [
    ["info"],
    ["verify", "--cell", "rnn_tanh", "--dtype", "float16"],
    ["bench", "--hidden", "4", "--batch", "2", "--steps", "3", "--against", "torch"],
    ["demo", "--epochs", "1", "--cell", "rnn", "--out", "démo-ε"],
    ["run", "m", "x.npy", "-o", "ÿ-ε-語.npy"],
    ["run", "m", "x.npy", "-o", os.fsdecode(b"\xff.npy")],
    ["--help"],
    ["run", "--help"],
    ["verify", "--help"],
    ["bench", "--help"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda line: ascii(" ".join(line)))
def test_every_command_prints_the_same_on_every_stream(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "torch" in arguments:
        pytest.importorskip("torch")
    printed = {encoding: run_command(arguments, encoding, monkeypatch) for encoding in ENCODINGS}
    assert [status for status, _ in printed.values()] == [0] * len(ENCODINGS)
    for encoding, (_, text) in printed.items():
        if arguments[-1].isascii() or encoding != "utf-8":
            expected = (
                words(printed["utf-8"][1]).encode(encoding, "backslashreplace").decode(encoding)
            )
            assert words(text) == words(expected)


def test_what_is_printed_is_ascii_except_for_what_users_name() -> None:
    """A program may print a report to a stream of any encoding."""
    for path in sorted((ROOT / "xprnn").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known = id(node) in docstrings or node.value in output.REPLACEMENTS
                assert known or node.value.isascii(), f"{path.name}:{node.lineno}: {node.value!r}"


# -- widths

ROWS = (
    Row("gru_reset_before", "reference", "bfloat16", 12345.6, "dweight_hh_l11_reverse[n]", 1e9),
    Row("gru", "pointwise", "gradcheck", 0.25, "h0", 1.0),
)
VERIFIED = VerifyReport("every cell", ROWS, (Absent("sequence", "gru", "no kernel"),))
MEASURED = bench_report.BenchReport(
    "a GRU", 10, 4, (bench_report.Row("with backward", "onnxruntime", [1.0] * 5, [2.0] * 5),), ()
)


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
@pytest.mark.parametrize("columns", [1, 20, 40, 80, 200])
@pytest.mark.parametrize("report", [VERIFIED, MEASURED], ids=["verify", "bench"])
def test_no_width_loses_a_character(
    report: Any,
    columns: int,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output.show(report)
    text = capsys.readouterr().out
    assert "…" not in text
    characters = re.sub(r"\s", "", str(report))
    assert sorted(re.sub(r"\s", "", text)) == sorted(characters)
    if report is VERIFIED:  # a row is one line, whatever the width
        (line,) = [line for line in text.splitlines() if "bfloat16" in line]
        assert line.split()[:5] == ["gru_reset_before", "reference", "bfloat16", "1.23e+04", "eps"]
        assert "dweight_hh_l11_reverse[n]" in line and line.split()[-1] == "ok"


@pytest.mark.parametrize("columns", ["20", "40"])
def test_a_narrow_pipe_gets_the_whole_last_line_of_a_progress_bar(
    columns: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    line = ["demo", "--epochs", "1", "--cell", "rnn", "--out", "out"]
    _, text = run_command(line, "ascii", monkeypatch)
    assert re.search(r"training -+ 1/1 loss \d\.\d{4} +accuracy \d+\.\d%", text), text


def test_a_table_keeps_colours_for_terminals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    output.show(VERIFIED)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    output.show(VERIFIED)
    assert "\x1b[32mok" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    output.show(VERIFIED)
    assert "\x1b[32m" not in capsys.readouterr().out


# -- processes: locales, pipes whose reader has gone, no output at all, a full disk

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def start(arguments: list[str], stdout: Any, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xprnn", *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii:fake_cupy"}, C_LOCALE], ids=["ascii", "C"]
)
def test_verify_reports_whatever_the_locale(environment: dict[str, str], folder: Path) -> None:
    command = start(
        ["verify", "--cell", "gru", "--dtype", "float32"], subprocess.PIPE, **environment
    )
    out, errors = command.communicate(timeout=300)
    assert (command.returncode, errors) == (0, "")
    assert out.isascii() and re.search(r"gru +reference +float32 +[\d.]+ eps ", out)
    name = os.fsdecode("ÿ.npy".encode())
    command = start(["run", "m", "x.npy", "-o", name], subprocess.PIPE, **environment)
    out, errors = command.communicate(timeout=300)
    assert (command.returncode, errors) == (0, "")
    assert (folder / name).exists() and out.isascii() and "wrote " in out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise on Windows")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["info"], 0),
        (["run", "m", "x.npy", "-o", "y.npy"], 0),
        (["run", "m", "gone.npy", "-o", "y.npy"], 1),
    ],
    ids=str,
)
def test_a_closed_pipe_does_not_change_the_status(
    arguments: list[str], status: int, folder: Path
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    command = start(arguments, theirs)
    os.close(theirs)
    _, errors = command.communicate(timeout=300)
    assert command.returncode == status, errors
    assert errors == ("" if status == 0 else "xprnn: error: no such file: gone.npy\n")
    assert (folder / "y.npy").exists() == ("x.npy" in arguments)


def run_in_shell(line: str) -> subprocess.CompletedProcess[str]:
    line = line.replace("xprnn", f"{sys.executable} -m xprnn", 1)
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk to write to")
@pytest.mark.parametrize("arguments", ["info", "run m x.npy -o y.npy"])
def test_an_output_that_cannot_be_written_is_an_error(arguments: str, folder: Path) -> None:
    done = run_in_shell(f"xprnn {arguments} > /dev/full")
    assert done.returncode == 1
    assert re.fullmatch(r"xprnn: error: .*No space left on device\n", done.stderr), done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs bash")
def test_closed_streams_are_not_an_error(folder: Path) -> None:
    for arguments, streams in (("info", ">&-"), ("run m x.npy -o y.npy", ">&- 2>&-")):
        done = run_in_shell(f"xprnn {arguments} {streams}")
        assert (done.returncode, done.stderr) == (0, "")
    assert np.load(folder / "y.npy").shape == (6, 5, 4)
    done = run_in_shell("xprnn info | head -n 1")
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", ["package", "value"])


# -- benchmarks


def test_a_benchmarks_table_is_printed_to_every_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    with output.standard_output():
        print("| — | … | µ |")
    assert raw.getvalue() == b"| - | ... | \\xb5 |\n"
    assert sys.stdout is stream


def test_stored_results_of_a_benchmark_are_replaced_atomically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "machine" / "results.json"
    result_store._write(stored, {"a": 1})
    before = stored.read_bytes()

    def interrupted(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:3].encode(encoding))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result_store._write(stored, {"a": 2})
    assert stored.read_bytes() == before
    assert [path.name for path in stored.parent.iterdir()] == ["results.json"]


def test_a_report_does_not_write_two_outputs_to_one_file(tmp_path: Path) -> None:
    (tmp_path / "cpu.md").symlink_to("cpu.json")
    with pytest.raises(ValueError, match=r"cpu\.md: expected another file to write to than"):
        reports.write(tmp_path, {"cpu.json": "{}", "cpu.md": "|"})
    assert not (tmp_path / "cpu.json").exists()
