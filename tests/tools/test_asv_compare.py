"""`python -m benchmarks.record --compare A B`: what both commits measured, from stored results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.compare import NotStoredError, compare
from benchmarks.result_store import RESULTS, ROOT, add_rates, axis_product

A, B = "a" * 40, "b" * 40
TIME, MEMORY = "layers.Forward.time_forward", "layers.TrainingMemory.peakmem_training"
SIZE = "'N=1 H=32 T=128'"
COLUMNS = ["result", "params", "version"]


def store(folder: Path, commit: str, machine: str = "m", **rows: list[Any]) -> None:
    """Store rows "time" and "memory" of implementations by number, and rates."""
    names = {"time": TIME, "memory": MEMORY}
    file = {
        "commit_hash": commit,
        "env_name": f"{machine}-py3.11",
        "requirements": {"numpy": commit[0], "torch": "2"},
        "result_columns": COLUMNS,
        "results": {
            names[key]: [values, [[f"'i{n}'" for n in range(len(values))], [SIZE]], "1"]
            for key, values in rows.items()
        },
    }
    add_rates(file)
    path = folder / machine / f"{commit[:8]}-{machine}-py3.11.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(file), "utf-8")
    units = {TIME: {"unit": "seconds"}, MEMORY: {"unit": "bytes"}, "version": 2}
    (folder / "benchmarks.json").write_text(json.dumps(units), "utf-8")


def lines(folder: Path, *arguments: str | None) -> list[str]:
    text = compare(folder, *arguments) if len(arguments) == 3 else compare(folder, A, B, None)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_what_both_measured_the_right_way_round(tmp_path: Path) -> None:
    store(tmp_path, A, time=[1e-3, 2e-3, 5e-6, None, 1.0], memory=[50e6])
    store(tmp_path, B, time=[1.5e-3, 1e-3, 5.4e-6, 1.0, None, 9.0], memory=[60e6])
    assert lines(tmp_path) == [
        "m-py3.11: aaaaaaaa, bbbbbbbb, and the ratio bbbbbbbb / aaaaaaaa",
        "numpy: a, b",
        "1 ms 1.5 ms 1.50 slower layers.Forward.time_forward(i0, N=1 H=32 T=128)",
        "2 ms 1 ms 0.50 faster layers.Forward.time_forward(i1, N=1 H=32 T=128)",
        "5 us 5.4 us 1.08 layers.Forward.time_forward(i2, N=1 H=32 T=128)",
        "50 MB 60 MB 1.20 more layers.TrainingMemory.peakmem_training(i0, N=1 H=32 T=128)",
        "4 measured by both, 2 of them more than 1.1 times the first",
        "not compared: 1 that only aaaaaaaa has, 2 that only bbbbbbbb has",
    ]
    back = lines(tmp_path, B, A, None)
    assert "1.5 ms 1 ms 0.67 faster layers.Forward.time_forward(i0, N=1 H=32 T=128)" in back


def test_values_of_another_version_of_a_benchmark_are_not_compared(tmp_path: Path) -> None:
    store(tmp_path, A, time=[1e-3], memory=[50e6])
    store(tmp_path, B, time=[1e-3], memory=[50e6])
    path = tmp_path / "m" / "bbbbbbbb-m-py3.11.json"
    file = json.loads(path.read_text())
    file["results"][TIME][2] = "2"
    path.write_text(json.dumps(file))
    assert [line for line in lines(tmp_path) if "time_forward" in line] == []


def test_machines_are_not_mixed(tmp_path: Path) -> None:
    for machine, seconds in (("m", 1.0), ("n", 2.0)):
        store(tmp_path, A, machine, time=[seconds])
        store(tmp_path, B, machine, time=[seconds])
    store(tmp_path, "c" * 40, "n", time=[1.0])
    assert [line for line in lines(tmp_path) if "time" in line and "ratio" not in line] == [
        "1 s 1 s 1.00 layers.Forward.time_forward(i0, N=1 H=32 T=128)",
        "1 measured by both, 0 of them more than 1.1 times the first",
        "2 s 2 s 1.00 layers.Forward.time_forward(i0, N=1 H=32 T=128)",
        "1 measured by both, 0 of them more than 1.1 times the first",
    ]
    assert lines(tmp_path, A, B, "n")[0].startswith("n-py3.11")
    with pytest.raises(
        NotStoredError, match="both cccccccc and aaaaaaaa on m; stored: aaaaaaaa on"
    ):
        compare(tmp_path, "c" * 40, A, "m")
    with pytest.raises(NotStoredError, match="on one machine; stored: none; python -m benchmarks"):
        compare(tmp_path / "empty", A, B, None)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store(tmp_path, A, time=[1e-3])
    store(tmp_path, B, time=[2e-3])
    command = ["record", "--compare", "aaaaaaaa", "bbbb", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert record.main() == 0
    assert "2.00 slower" in capsys.readouterr().out
    command[3] = "cccccccc"
    with pytest.raises(SystemExit, match="compare: no results of both aaaaaaaa and cccccccc"):
        record.main()


def test_the_page_prints_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "asv.md").read_text("utf-8")
    command, first, *shown = re.search("```console\n(.*?)```", page, re.DOTALL)[1].splitlines()
    commits = re.fullmatch(r"\$ python -m benchmarks.record --compare (\w+) (\w+)", command)
    printed = compare(RESULTS, *commits.groups(), None).splitlines()
    assert first == printed[0] and set(shown) - {"  ..."} <= set(printed)
    assert shown[-1] == printed[-1]


def test_one_commit_under_its_older_and_newer_names() -> None:
    """Results that were stored before the grid was divided keep their benchmarks' names."""
    printed = lines(RESULTS, "64949dd1", "086a0c49", None)
    row = "layers.Forward.time_forward(gru, xprnn-numpy-reference, float32, N=32 H=128 T=128)"
    assert f"21.07 ms 11.21 ms 0.53 faster {row}" in printed
    assert printed[-2].startswith("30 measured by both") and len(printed) == 33
    file = json.loads(next(RESULTS.glob("*/64949dd1-*.json")).read_text())
    columns = dict(zip(file["result_columns"], file["results"][TIME], strict=False))
    assert len(axis_product(columns["params"])) == len(columns["result"])
