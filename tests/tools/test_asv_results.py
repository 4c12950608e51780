"""Merging new results of asv with stored ones: values, and reasons for missing ones."""

from __future__ import annotations

import copy
import math
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import implementations, record, result_store
from benchmarks.common import UnusableError
from tests.support.implementations import SelectKernels
from xprnn.backend import Backend

COLUMNS = ["result", "params", "version", "stats_q_25", "samples"]
X, Y = ("x", "1"), ("y", "1")
NAN = math.nan


def results(values: list[float | None] | None, *names: str, version: str = "v") -> dict[str, Any]:
    """A results file of asv with the benchmark "a.B.time_c" of the parameters `names` and "1"."""
    quartiles = values and [None if v is None or math.isnan(v) else v - 0.5 for v in values]
    row = [values, [[repr(name) for name in names], ["'1'"]], version, quartiles]
    return {"result_columns": COLUMNS, "results": {"a.B.time_c": row}}


def skips(**reasons: set[tuple[str, ...]]) -> result_store.Skips:
    collected: result_store.Skips = defaultdict(lambda: defaultdict(set))
    collected["a.B"].update(copy.deepcopy(reasons))
    return collected


def merged(new: dict[str, Any], old: dict[str, Any], skipped: result_store.Skips) -> list[Any]:
    """What is stored after merging, with the quartiles."""
    result_store.restore(skipped, {"a.B": {"old": ["*, 1"]}}, result_store.merge(new, old, skipped))
    result_store.compact(new)
    value, _, _, quartile = new["results"].get("a.B.time_c", [None] * 4)[:4]
    return list(zip(value or (), quartile or (), strict=True))


def test_values_left_out_are_kept_with_their_statistics() -> None:
    skipped = skips()
    new, old = results([NAN, 8.0, NAN], "x", "y", "z"), results([1.0, 2.0, None], "x", "y", "z")
    assert merged(new, old, skipped) == [(1.0, 0.5), (8.0, 7.5)]
    assert skipped["a.B"] == {"old": {("z", "1")}}


def test_an_added_parameter_loses_no_value() -> None:
    new, old = results([NAN, 9.0, NAN], "x", "new", "y"), results([1.0, 2.0], "x", "y")
    assert merged(new, old, skips()) == [(1.0, 0.5), (9.0, 8.5), (2.0, 1.5)]


def test_a_new_skip_does_not_remove_a_stored_value() -> None:
    skipped = skips(gone={X, Y})
    new, old = results([NAN, NAN], "x", "y"), results([1.0, None], "x", "y")
    assert merged(new, old, skipped) == [(1.0, 0.5)]
    assert skipped["a.B"]["gone"] == {Y} and not skipped["a.B"]["old"]


def test_a_new_failure_removes_a_stored_value() -> None:
    assert merged(results([None, 2.0], "x", "y"), results([1.0, 1.0], "x", "y"), skips()) == [
        (None, None),
        (2.0, 1.5),
    ]


@pytest.mark.parametrize(("new", "old"), [(None, [1.0]), ([1.0], None)])
def test_a_benchmark_without_any_values(new: Any, old: Any) -> None:
    assert merged(results(new, "x"), results(old, "x"), skips()) == (
        [] if new is None else [(1.0, 0.5)]
    )


def test_values_of_another_version_are_not_merged() -> None:
    new, old = results([NAN], "x"), results([1.0], "x", version="other")
    assert merged(new, old, skips()) == []


def test_a_peer_that_is_not_installed_now_loses_no_value() -> None:
    new, old = results([NAN, 9.0], "x", "y"), results([1.0, 2.0], "x", "peer")
    assert merged(new, old, skips()) == [(1.0, 0.5), (9.0, 8.5), (2.0, 1.5)]
    assert new["results"]["a.B.time_c"][1] == [["'x'", "'y'", "'peer'"], ["'1'"]]


def test_a_benchmark_that_was_not_selected_keeps_its_values_and_reasons() -> None:
    new, old, skipped = results([1.0], "x"), results([2.0, None], "x", "y"), skips()
    suite = {
        "version": 2,
        "a.B.time_c": {"params": old["results"]["a.B.time_c"][1], "version": "v"},
    }
    new["results"].clear()
    result_store.complete(new, suite)
    assert merged(new, old, skipped) == [(2.0, 1.5)]
    assert skipped["a.B"] == {"old": {Y}}


def test_what_was_neither_measured_nor_failed_is_left_out() -> None:
    new = results([1.0, NAN, None], "x", "y", "z")
    new["results"]["a.B.time_d"] = [[NAN, NAN], [["'x'", "'y'"]], "v"]
    new["results"]["a.B.time_e"] = [None, [["'x'"]], "v"]
    result_store.compact(new)
    assert [*new["results"]] == ["a.B.time_c", "a.B.time_e"]
    assert new["results"]["a.B.time_c"][:2] == [[1.0, None], [["'x'", "'z'"], ["'1'"]]]
    square = results([1.0, NAN, NAN, 2.0], "x", "y")
    square["results"]["a.B.time_c"][1][1].append("'2'")
    result_store.compact(square)
    assert square["results"]["a.B.time_c"][0] == [1.0, None, None, 2.0]


def test_a_rate_is_computed_from_the_stored_time() -> None:
    sizes = [["'N=2 H=5 T=3'", "'N=8 H=64 T=128'"]]
    file = {"result_columns": COLUMNS, "results": {"a.B.time_forward": [[7e-3, None], sizes, "v"]}}
    file["results"]["a.B.time_training"] = [None, sizes, "v"]
    file["results"]["a.B.time_100_steps"] = [[1.0, 2.0], sizes, "v"]
    result_store.add_rates(file)
    assert file["results"].pop("a.B.track_throughput_forward")[:2] == [[857.1, None], sizes]
    assert file["results"].pop("a.B.track_throughput_training")[:2] == [None, sizes]
    assert len(file["results"]) == 3


def test_the_stored_rates_are_those_of_the_stored_times() -> None:
    files = [*result_store.RESULTS.glob("*/*-py*.json")]
    rates = 0
    for path in files:
        file = result_store.read(path)
        stored = copy.deepcopy(file["results"])
        result_store.add_rates(file)
        assert file["results"] == stored, path.name
        rates += sum("throughput" in name for name in stored)
    assert rates > len(files)


def test_the_description_has_what_is_stored(tmp_path: Path) -> None:
    def described(*params: list[str]) -> dict[str, Any]:
        facts = {"param_names": ["p", "size"], "timeout": 1, "type": "time", "version": "v"}
        return {"version": 2, "a.B.time_forward": {**facts, "params": [*params]}}

    def store(name: str, *params: list[str], version: str = "v") -> None:
        file = {"result_columns": COLUMNS, "results": {"a.B.time_forward": [None, params, version]}}
        result_store.add_rates(file)
        result_store._write(tmp_path / "m" / f"{name}-m-py3.11.json", file)

    store("1", ["'y'", "'peer'"], ["'N=1'"])
    store("2", ["'x'"], ["'N=1'"])
    store("3", ["'old'"], ["'N=1'"], version="other")
    known = described(["'x'", "'new'", "'y'"], ["'N=1'", "'N=2'"])
    result_store.write_benchmarks(tmp_path, known | {"a.B.time_d": known["a.B.time_forward"]})
    written = result_store.read(tmp_path / "benchmarks.json")
    assert [*written] == ["version", "a.B.time_forward", "a.B.track_throughput_forward"]
    for name in ("a.B.time_forward", "a.B.track_throughput_forward"):
        assert written[name]["params"] == [["'x'", "'y'", "'peer'"], ["'N=1'"]]
    assert written["a.B.track_throughput_forward"]["unit"] == "sequence steps / s"
    result_store.write_benchmarks(tmp_path, {"version": 2})  # as where only others are found
    assert result_store.read(tmp_path / "benchmarks.json") == written


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC 7763 64-Core Processor",
        "AMD EPYC 9R14",
        "Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz",
        "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz",
        "Apple M1",
    ],
)
def test_a_processor_with_a_model_number(name: str) -> None:
    assert result_store.names_a_model(name)


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC",
        "AMD EPYC Processor",
        "AMD EPYC-Milan Processor",
        "Intel Xeon Processor (Skylake, IBRS)",
        "Intel Xeon Processor (Cascadelake)",
        "Intel(R) Xeon(R) CPU @ 2.20GHz",
        "Intel(R) Xeon(R) Processor @ 2.70GHz",
        "QEMU Virtual CPU version 2.5+",
        "Common KVM processor",
        platform.machine(),
        "",
    ],
)
def test_a_processor_that_any_cloud_machine_has(name: str) -> None:
    assert not result_store.names_a_model(name)


class MeasuredError(Exception):
    """The run would begin."""


@pytest.mark.parametrize(
    ("cpu", "gpu", "arguments", "refused"),
    [
        ("AMD EPYC", "", (), True),
        ("AMD EPYC", "", ("--quick", "--out", "here"), True),
        ("AMD EPYC", "", ("--machine", "ours"), False),
        ("AMD EPYC", "", ("--quick",), False),  # nothing is stored
        ("AMD EPYC", "NVIDIA H100", (), False),
        ("AMD EPYC 7763 64-Core Processor", "", (), False),
    ],
)
def test_a_machine_without_a_name_is_refused(
    cpu: str, gpu: str, arguments: tuple[str, ...], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(*_: object) -> None:
        raise MeasuredError

    monkeypatch.setattr(sys, "argv", ["record", *arguments])
    for module in (record, result_store):
        monkeypatch.setattr(module, "gpu_name", lambda: gpu)
        monkeypatch.setattr(module, "processor", lambda: cpu)
    monkeypatch.setattr(record, "extract_sources", begin)
    with pytest.raises(SystemExit if refused else MeasuredError) as raised:
        record.main()
    if refused:
        assert re.match("machine: 'AMD EPYC' is .*; pass --machine NAME", str(raised.value))


def test_equal_reasons_are_collapsed() -> None:
    collected = skips(
        none={("x", "1"), ("x", "2"), ("y", "2")}, all={("x", "1"), ("y", "1")}, no=set()
    )
    suite = {"version": 2, "a.B.time_c": {"params": [["'x'", "'y'"], ["'1'", "'2'"]]}}
    assert result_store.collapsed(collected, suite) == {
        "a.B": {"none": ["*, 2", "x, 1"], "all": ["*, 1"]}
    }


@pytest.mark.parametrize(("size", "suffix"), [("N=2 H=5 T=3", ""), ("N=2 H=5", "Cell")])
def test_forced_kernels_are_those_that_run(
    fake_cupy: Backend, select_kernels: SelectKernels, size: str, suffix: str
) -> None:
    def forced_layer(kernels: str) -> Any:
        select_kernels(kernels)
        return implementations._layer("gru", fake_cupy, kernels, "float32", size, suffix)

    assert forced_layer("pointwise").options["hidden_size"] == 5
    with pytest.raises(UnusableError, match=r"use_kernels\('sequence'\): forward: "):
        forced_layer("sequence")
    with pytest.raises(UnusableError, match="expected one of the kernels"):
        implementations._layer("gru", fake_cupy, "fast", "float32", size, suffix)
    layer = forced_layer("reference")
    with pytest.raises(UnusableError, match="this version of xprnn has no such kernels"):
        implementations._check_kernels(layer, "pointwise", (2, 5) if suffix else (3, 2, 5))
