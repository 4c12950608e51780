"""The CPU report: only correct results are timed, and its text follows from the measurements."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed, which the report compares with")

from benchmarks import cpu_report, reports
from benchmarks.cpu import files, implementations, problems, rounds, startup, thresholds, worker
from benchmarks.cpu.problems import BOTH, FORWARD, STEP, Problem

ROOT = Path(__file__).parents[2]
PAGES = {  # and what each has between its marks
    "README.md": files.readme_table,
    "docs/performance.md": files.docs_section,
}
RESULTS = ROOT / "benchmarks" / "results"
SLICE = ["--cells", "lstm", "--shapes", "5,2,3,4", "--threads", "1", "--rounds", "2"]
SMALL = Problem("gru", 5, 2, 3, 4)


def row(work: str, threads: int = 1, shape: tuple[int, ...] = (64, 32, 256, 256), **us: float):
    """A row of the GRU in which each implementation took the same time in both of two rounds."""
    fields: dict[str, Any] = dict(zip("TNIH", shape, strict=True))
    fields |= {"cell": "gru", "work": work, "threads": threads, "wrong": [], "not_timed": {}}
    fields["us"] = {implementation: [time, time] for implementation, time in us.items()}
    return fields | {"cores": dict.fromkeys(us, 1.0), "notes": dict.fromkeys(us, "")}


# -- measured


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("cpu")
    some = ["--implementations", "numpy", "torch", "onnxruntime", "products", "--first", "1"]
    assert cpu_report.main([*SLICE, *some, "--out", str(folder)]) == 0
    return json.loads((folder / files.NAME).read_text()), folder


def test_a_slice_is_measured_and_written(measured: tuple[dict[str, Any], Path]) -> None:
    report, folder = measured
    files.check_report(report)
    assert [row["work"] for row in report["rows"]] == [FORWARD, BOTH, STEP]
    forward, both, step = report["rows"]
    assert {*forward["us"]} == {*step["us"]} == {*both["us"]} | {"onnxruntime"}
    assert all(len(us) == 2 and min(us) > 0 for row in report["rows"] for us in row["us"].values())
    assert "reference on numpy" in forward["notes"]["numpy"]
    assert "torch.nn.LSTM" in both["notes"]["torch"]
    assert {*report["first"]} == {"numpy", "torch", "onnxruntime"}
    assert report["first"]["torch"]["MiB"] > report["first"]["numpy"]["MiB"] > 20
    assert report["sizes"]["torch"] > report["sizes"]["numpy"] > 10
    text = (folder / "cpu.md").read_text()
    assert text == files.markdown(report) + "\n"
    for private in (str(folder), str(ROOT), str(Path.home()), socket.gethostname()):
        assert private not in text + json.dumps(report)


def test_a_partial_run_writes_no_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_report, "RESULTS", tmp_path)
    assert cpu_report.main([*SLICE, "--implementations", "numpy", "--works", "forward"]) == 0
    assert not [*tmp_path.iterdir()]
    assert "lstm 5, 2, 3, 4 forward, threads 1: numpy " in capsys.readouterr().out


@pytest.mark.parametrize("work", ["layer", STEP])
@pytest.mark.parametrize("implementation", problems.IMPLEMENTATIONS)
def test_every_implementation_agrees_with_the_plain_code(
    implementation: str, work: str, tmp_path: Path
) -> None:
    if implementation in rounds.missing([implementation]):
        pytest.skip(rounds.missing([implementation])[implementation])
    path = str(tmp_path / "expected.npz")
    for cell in problems.CELLS:
        problem = [*SMALL._replace(cell=cell)]
        one = worker.Worker(implementation)
        one.expect(problem, work, path)
        prepared = one.prepare(problem, work, path)
        assert prepared["works"][0] == (STEP if work == STEP else FORWARD)
        assert ("at most" in prepared["agreed"]) == (implementation != "products")
        assert one.sample(prepared["works"][-1])["seconds"] > 0


def wrong_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = implementations.torch_peer

    def wrong(task: Any) -> Any:
        peer = original(task)
        peer.results["dx"][-1] *= -1
        return peer

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "torch", wrong)


class InProcess:
    """A worker in this process."""

    def __init__(self, implementation: str, threads: int) -> None:
        self.implementation, self.threads, self._worker = (
            implementation,
            threads,
            worker.Worker(implementation),
        )

    def send(self, do: str, **request: Any) -> Any:
        return getattr(self._worker, do)(**request)

    def close(self) -> None:
        pass


def test_wrong_results_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_torch(monkeypatch)
    monkeypatch.setattr(rounds, "Client", InProcess)
    some = ["--implementations", "numpy", "torch", "--works", "forward", BOTH]
    assert cpu_report.main([*SLICE, *some]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("torch: torch: its dx differs from xprnn's by") == 2
    assert printed.err.startswith("cpu_report: wrong: lstm 5, 2, 3, 4 forward, threads 1: ")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_a_process_is_limited_to_its_processors(tmp_path: Path) -> None:
    with rounds.clients(["numpy"], 1) as (client,):
        client.send("expect", problem=[*SMALL], work="layer", path=str(tmp_path / "expected.npz"))
        assert len(os.sched_getaffinity(client._process.pid)) == 1


def test_after_a_pause_the_threads_of_a_blas_sleep() -> None:
    """Threads that wait busily would take a processor from the library that is timed next."""
    code = """
import sys, time, numpy as np
a = np.ones((768, 768), np.float32)
for _ in range(20):
    a @ a
time.sleep(float(sys.argv[1]))
before = time.process_time()
time.sleep(0.05)
print(time.process_time() - before)
"""
    environment = problems.environment("numpy", problems.all_threads())
    command = [sys.executable, "-c", code, str(rounds.REST)]
    assert float(subprocess.check_output(command, env=environment)) < 0.01


def test_a_worker_that_ends_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(problems, "IMPLEMENTATIONS", (*problems.IMPLEMENTATIONS, "unknown"))
    assert cpu_report.main([*SLICE, "--implementations", "unknown"]) == 2
    assert "the process of unknown ended with status 1 in prepare" in capfd.readouterr().err


def test_the_environment_of_a_process_limits_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPRNN_KERNELS", "pointwise")
    variables = problems.environment("numba", 2)
    assert "XPRNN_KERNELS" not in variables and variables["OMP_NUM_THREADS"] == "2"
    assert problems.environment("numpy", 1)["XPRNN_KERNELS"] == "reference"
    assert "parallelism_threads=1" in problems.environment("jax", 1)["XLA_FLAGS"]
    assert problems.environment("jax", 2)["XLA_FLAGS"] == ""


def test_libraries_that_are_not_installed_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "find_spec", lambda name: None)
    assert rounds.missing(("numpy", "jax")) == {"jax": "jax is not installed"}


# -- thresholds


def test_a_row_is_compared_with_the_faster_peer_or_the_products() -> None:
    def passes(work: str, **us: float) -> list[bool]:
        return [check.passed for check in thresholds.evaluate([row(work, **us)], {})]

    assert passes(FORWARD, numba=10, torch=11, onnxruntime=10) == [True]
    assert passes(FORWARD, numba=10, torch=9.9, onnxruntime=20) == [False]
    assert passes(FORWARD, numba=10, torch=9.9, onnxruntime=20, products=9.6) == [True]
    assert passes(FORWARD, numba=10, torch=9.9, onnxruntime=20, products=9.5) == [False]
    assert passes(FORWARD, numpy=10, torch=9.1) == [True]
    assert passes(FORWARD, numpy=10, torch=8.9) == [False]
    assert passes(BOTH, numba=10, torch=12.1, jax=10) == [True, True]
    assert passes(BOTH, numba=10, torch=11.9, jax=9.9) == [False, False]
    assert passes(BOTH, numba=10, torch=11.9, products=9.2) == [True]
    assert passes(STEP, numba=10, numpy=20, torch=30, onnxruntime=9) == [True, False, True]
    assert passes(STEP, numba=10, numpy=31, torch=29, onnxruntime=11) == [False, True, False]


@pytest.mark.parametrize(
    ("shape", "least"),
    [((9, 1, 32, 32), 2.0), ((9, 8, 64, 64), 1.4), ((9, 1, 128, 128), 1.2), ((9, 32, 9, 128), 1.0)],
)
def test_small_sizes_have_their_own_thresholds(shape: tuple[int, ...], least: float) -> None:
    for ratio, passed in ((least + 0.01, True), (least - 0.01, False)):
        (check,) = thresholds.evaluate(
            [row(FORWARD, shape=shape, numba=1, torch=ratio, onnxruntime=9)], {}
        )
        assert check.passed == passed


def test_means_need_every_shape() -> None:
    def means(threads: int, fast: float, count: int) -> list[tuple[str, bool]]:
        rows = [
            row(FORWARD, threads, shape, numba=1, torch=t, onnxruntime=1.25)
            for shape, t in zip(problems.SHAPES[:count], [fast, 4 / fast] * 4, strict=False)
        ]
        checks = thresholds.evaluate(rows, {})
        return [
            (check.measured, check.passed) for check in checks if "geometric" in check.criterion
        ]

    assert means(1, 8, 8) == [("2.00", True), ("1.25", True)]
    assert means(2, 8, 8) == [("2.00", True), ("1.25", False)]
    assert means(1, 8, 7) == []


def test_the_first_result_has_thresholds() -> None:
    def passes(numpy: float, numba: float, mib: int) -> list[bool]:
        taken = {"numpy": numpy, "numba": numba, "torch": 1.0}
        results = {
            implementation: {"seconds": [t, t, t], "MiB": mib}
            for implementation, t in taken.items()
        }
        results["torch"]["MiB"] = 300
        return [check.passed for check in thresholds.evaluate([], results)]

    assert passes(0.2, 0.49, 100) == [True] * 4
    assert passes(0.21, 0.52, 101) == [False] * 4


def test_a_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(startup.CODE, "numpy", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="the first result of numpy: status 3"):
        startup.first_results(["numpy"], 1)


# -- stored reports


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_follow_the_stored_reports(name: str) -> None:
    page = (ROOT / name).read_text("utf-8")
    section = PAGES[name](reports.read_all(RESULTS, files.NAME, files.check_report))
    assert reports.with_section(page, files.MARKS, section) == page
    inside = page.split(files.MARKS[0])[1].split(files.MARKS[1])[0]
    edited = page.replace(inside, inside.replace(".", ", and 9 times torch's speed.", 1), 1)
    assert edited != page
    assert reports.with_section(edited, files.MARKS, section) == page


def stored_reports() -> Iterator[Path]:
    yield from RESULTS.glob(f"*/{files.NAME}")


def test_the_stored_tables_follow_the_stored_numbers() -> None:
    for path in stored_reports():
        text = path.with_name("cpu.md").read_text("utf-8")
        assert text == files.markdown(json.loads(path.read_text("utf-8"))) + "\n"


def sample() -> dict[str, Any]:
    us = {"numba": 1234.5, "torch": 2469.0}
    rows = [row(FORWARD, shape=shape, **us) for shape in problems.SHAPES]
    rows += [row(STEP, shape=problems.STEP_SHAPE, numba=9.876, torch=30.0)]
    report = dict.fromkeys(("date", "commit", "sources"), "0123456789abcdef")
    report |= {"machine": {"name": "A Processor, 2 cores"}, "versions": {"torch": "2.13.0"}}
    report |= {"absent": {"jax": "jax is not installed"}, "seconds": 1.5, "rows": rows}
    first = {"torch": {"seconds": [1.0, 1.2, 1.4], "MiB": 300}}
    return report | {"first": first, "sizes": {"torch": 700}}


def test_the_sections_of_the_pages(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in PAGES:
        (tmp_path / name).write_text("\n".join(["before", *files.MARKS, "after\n"]))
    (tmp_path / "a-machine").mkdir()
    files.write(sample(), tmp_path / "a-machine")
    cpu_report.write_docs(tmp_path, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "on one thread of an A Processor, 2 cores, 0123456789abcdef, medians:" in readme
    assert "| GRU, forward | 128, 1, 32, 32 | 1.23 | — | 2.47 | — |" in readme
    assert "| GRU, step | 1, 1, 128, 128 | 0.00988 | — | 0.0300 | — |" in readme
    text = (tmp_path / "docs" / "performance.md").read_text()
    assert "**A Processor, 2 cores**, 0123456789abcdef, commit 01234567; torch 2.13.0." in text
    assert "| 128, 1, 32, 32 | 1 | 1.23 | 2.47 |" in text
    assert "| gru | forward | 1 | 2.00 (2.00 to 2.00) | — | — |" in text
    assert "| gru | 1, 128, 128 | 9.88 | 30.0 |" in text
    assert "| torch | 1.20 | 300 | 700 |" in text
    assert text.startswith("before") and text.endswith("after\n")
    assert "- not available: JAX: jax is not installed" in files.markdown(sample())


def test_a_row_that_used_more_threads_is_reported() -> None:
    report = sample()
    report["rows"][0]["cores"]["torch"] = 1.8
    lines = [
        line for line in files.markdown(report).splitlines() if "thread limit exceeded" in line
    ]
    assert len(lines) == 1 and "torch used 1.8 cores, limit 1" in lines[0]


def test_an_invalid_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / files.NAME).write_text(json.dumps({**sample(), "rows": 3}))
    with pytest.raises(ValueError, match=r"a/cpu\.json: report: rows: expected list, got 3"):
        reports.read_all(tmp_path, files.NAME, files.check_report)
