"""The report on layers of definitions: tiny runs, its text, and the loop that it compares with."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed, which the report needs")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed, which the report needs")
pytest.importorskip("numba", reason="Numba is not installed, which the report needs")

from benchmarks import definitions_report as report
from benchmarks import reports
from benchmarks.common import use_kernels

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TINY = (6, 2, 4, 4)


def test_a_tiny_run_is_written_and_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "LARGE", (4, *TINY[1:]))
    monkeypatch.setattr(report, "TURN", 1e-3)
    arguments = ["--cells", "li_gru", "gru_reset_before", "--shapes", "6,2,4,4", "4,2,4,4"]
    arguments += ["--rounds", "3", "--limit", "0.001", "--out", str(tmp_path)]
    assert report.main(arguments) == 0
    stored = json.loads((tmp_path / report.NAME).read_text())
    report.check_report(stored)
    printed = capsys.readouterr().out
    assert printed.strip() == report.section([stored])
    rows = stored["training"]
    assert [(row["cell"], "loop" in row, "products" in row) for row in rows] == [
        *(("li_gru", True, False), ("gru_reset_before", True, False)),
        *(("li_gru", False, True), ("gru_reset_before", False, True)),
    ]
    assert [row["shape"] for row in stored["forward"]] == [[6, 2, 4, 4], [4, 2, 4, 4]]
    keys = ("per_gate", "loop", "products", "sums")
    found = [row[key] for row in rows for key in keys if key in row]
    assert [("sums" in row) for row in rows] == [False, False, True, True]
    found += [row[key] for row in stored["forward"] for key in ("gru", "onnxruntime")]
    assert all(0 < low <= median <= high for low, median, high in found)
    assert [row["ratio"] for row in stored["compiled"]] == [None, None]
    assert {row["reason"] for row in stored["compiled"]} == {"not compiled within 0 s"}
    assert "| li_gru | 6, 2, 4, 4 | not compiled within 0 s |" in printed


@pytest.mark.parametrize("cell", [name for name in report.BASE if name not in report.MASKED])
def test_the_loop_in_torch_has_the_gradients_of_the_layer(cell: str) -> None:
    task = report.task_of(cell, TINY)
    with use_kernels("reference"):
        dx = report.training(task)()[0]  # type: ignore[index]
    expected = [dx, *task.layer.grads.values()]
    grads: Any = report.torch_loop(task)()
    for gradient, value in zip(grads, expected, strict=True):
        np.testing.assert_allclose(gradient.numpy(), value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("cell", "masks"), [("recurrent_dropout", 1), ("zoneout", 2 * TINY[0])])
def test_the_loop_in_torch_draws_masks_as_the_definition_asks(
    cell: str, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    drawn: list[Any] = []
    rand = torch.rand_like
    monkeypatch.setattr(torch, "rand_like", lambda like: drawn.append(like) or rand(like))
    report.torch_loop(report.task_of(cell, TINY))()
    assert len(drawn) == masks


def test_a_loop_with_another_gradient_is_not_timed() -> None:
    task = report.task_of("li_gru", TINY)
    loop = report.torch_loop(task)
    with use_kernels("reference"):
        call = report.training(task)
        report.check_equal("li_gru", task, call, loop)
        with pytest.raises(RuntimeError, match="li_gru: dx differs from that of the torch loop"):
            report.check_equal("li_gru", task, call, lambda: [1.01 * loop()[0]])  # type: ignore[index]


def test_keras_is_measured_or_its_absence_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TURN", 1e-3)
    row = report.keras_row(TINY, 3)
    if importlib.util.find_spec("keras") is None:
        assert row["reason"] == "Keras is not installed" and row["ratio"] is None
    else:
        assert row["version"] and min(row["ratio"]) > 0


def test_the_interval_is_of_order_statistics() -> None:
    values = [9.0, 1, 5, 3, 7, 2, 8, 4, 6]
    assert report.interval(values) == (2, 5, 8)  # of nine: the second and the eighth, 96.1 %
    assert report.interval(range(1, 52)) == (19, 26, 33)
    assert report.interval([3.0]) == (3, 3, 3)


def test_ratios_of_samples_and_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"one": 6.0, "two": 2.0}
    monkeypatch.setattr(report, "sample", lambda call: seconds[call()])
    calls = {name: (lambda name=name: name) for name in seconds}
    ratio = report.ratios(calls, 4)
    assert ratio("one", "two", 1.0) == (3, 3, 3)
    assert ratio("two", "one", 1.5) == (0.5, 0.5, 0.5)


def test_the_page_follows_the_stored_reports() -> None:
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    stored = report.stored(RESULTS)
    assert stored
    assert reports.with_section(page, report.MARKS, report.section(stored)) == page


def test_parts_are_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "TURN", 1e-3)
    options = ["--cells", "li_gru", "--shapes", "6,2,4,4", "--rounds", "3", "--out", str(tmp_path)]
    report.main([*options, "--parts", "training"])
    first = json.loads((tmp_path / report.NAME).read_text())
    assert [bool(first[part]) for part in report.PARTS] == [True, False, False, False]
    report.main([*options, "--parts", "forward"])
    both = json.loads((tmp_path / report.NAME).read_text())
    assert both["training"] == first["training"]
    assert [row["shape"] for row in both["forward"]] == [[6, 2, 4, 4]]
    assert {*both["commits"]} == {"training", "forward"}
    other = {**both, "versions": {"numpy": "0"}}
    with pytest.raises(SystemExit, match="of other versions"):
        report.merged(other, both)


def test_the_commits_of_parts_are_stated() -> None:
    one, other = "1" * 40, "2" * 40 + "+changes"
    assert report._commits({"commits": {"training": one, "forward": one}}) == "commit 11111111"
    assert report._commits({"commits": {"training": one, "forward": other}}) == (
        "training: commit 11111111; forward: commit 22222222+changes"
    )


def test_an_invalid_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / report.NAME).write_text("{}")
    with pytest.raises(ValueError, match=r"a/definitions\.json: report: expected the fields"):
        report.stored(tmp_path)


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--cells", "nonsense"]])
def test_bad_options(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        report.main(arguments)
    assert caught.value.code == 2
