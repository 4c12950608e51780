"""Merging new results of asv with stored ones: values, and reasons for missing ones."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import pytest

from benchmarks import implementations, result_store
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
    """The values after merging, with their quartiles."""
    result_store.restore(skipped, {"a.B": {"old": ["*, 1"]}}, result_store.merge(new, old, skipped))
    result_store.complete(new, {})
    value, _, _, quartile = new["results"]["a.B.time_c"][:4]
    return list(zip(value or (), quartile or (), strict=False))


def test_values_left_out_are_kept_with_their_statistics() -> None:
    skipped = skips()
    new, old = results([NAN, 8.0, NAN], "x", "y", "z"), results([1.0, 2.0, None], "x", "y", "z")
    assert merged(new, old, skipped) == [(1.0, 0.5), (8.0, 7.5), (None, None)]
    assert skipped["a.B"] == {"old": {("z", "1")}}


def test_an_added_parameter_loses_no_value() -> None:
    new, old = results([NAN, 9.0, NAN], "x", "new", "y"), results([1.0, 2.0], "x", "y")
    assert merged(new, old, skips()) == [(1.0, 0.5), (9.0, 8.5), (2.0, 1.5)]


def test_a_new_skip_does_not_remove_a_stored_value() -> None:
    skipped = skips(gone={X, Y})
    new, old = results([NAN, NAN], "x", "y"), results([1.0, None], "x", "y")
    assert merged(new, old, skipped) == [(1.0, 0.5), (None, None)]
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
    assert merged(new, old, skips()) == [(None, None)]


def test_every_benchmark_gets_a_row() -> None:
    new = results([1.0], "x")
    result_store.complete(new, {"version": 2, "a.D.time_e": {"params": [["'x'"]], "version": "w"}})
    assert new["results"]["a.D.time_e"] == [None, [["'x'"]], "w", None, None]


def test_equal_reasons_are_collapsed() -> None:
    collected = skips(
        none={("x", "1"), ("x", "2"), ("y", "2")}, all={("x", "1"), ("y", "1")}, no=set()
    )
    row = [[], [["'x'", "'y'"], ["'1'", "'2'"]]]
    file = {"result_columns": COLUMNS, "results": {"a.B.time_c": row}}
    assert result_store.collapsed(collected, file) == {
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
