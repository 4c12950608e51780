"""How a run of the device report ends: at its limit, stopped, or when CUDA refuses every call."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xprnn
from benchmarks import device_report
from benchmarks.device import problems, rows, stacks, steps
from tests.tools.test_device_report import BOTH_GRID, measured, quick
from xprnn.backend.cupy import CupyBackend

__all__ = ["quick"]  # a fixture of every test


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that the report runs on its calls, in their order."""
    done: list[str] = []
    for module in (rows, stacks, steps):
        for name in ("compared", "timed"):
            original = getattr(module, name)

            def counted(*arguments: Any, original: Any = original, name: str = name) -> Any:
                done.append(name)
                return original(*arguments)

            monkeypatch.setattr(module, name, counted)
    return done


FIVE = {"grid": ((1, 16, 4), (2, 8, 3), (2, 16, 2), *BOTH_GRID)}  # with the other grids, ten calls


def call_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["T"] == 1, *[row[name] for name in ("layers", "N", "H", "direction")])


@pytest.mark.parametrize("reached", [0, 1, 4, 10])
def test_calls_that_are_not_reached_are_reported(
    reached: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of ten calls are compared and timed; the file contains all of them."""
    done = counted_calls(monkeypatch)
    clock = SimpleNamespace(monotonic=lambda: 1e9 if len(done) >= 2 * reached else 0.0)
    monkeypatch.setattr(device_report, "time", clock)
    if not reached:  # the report begins before the time is over
        times = iter([0.0])
        clock.monotonic = lambda: next(times, 1e9)
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",), limit=75.0, **FIVE)
    assert done == ["compared", "timed"] * reached
    assert json.loads((tmp_path / "report.json").read_text()) == report
    calls = list(dict.fromkeys([call_of(row) for row in report["rows"]]))
    assert len(calls) == 10
    for row in report["rows"]:
        at = calls.index(call_of(row))
        assert (row["error"] is not None) == (at < reached)
        assert row["not_timed"] == (None if at < reached else "not reached in 75 s")


def test_a_run_that_is_stopped_leaves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = rows.timed

    def stopped(problem: Any, *rest: Any) -> Any:
        if problem.H == 8:
            raise KeyboardInterrupt
        return original(problem, *rest)

    monkeypatch.setattr(rows, "timed", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, cells=("gru",), dtypes=("float32",))
    written = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["not_timed"] for row in written[:4]] == [None] * 2 + ["not reached in 440 s"] * 2


def test_a_stack_and_a_layer_of_the_same_sizes_are_two_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers, or two directions, of the same N, H and T."""
    monkeypatch.setattr(problems, "STACK_GRID", BOTH_GRID)
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",), grid=BOTH_GRID)
    kinds = [(row["layers"], row["direction"], row["pass"]) for row in report["rows"]]
    passes = ("forward", "forward+backward")
    layers = [(1, direction, what) for direction in ("forward", "both") for what in passes]
    stacked = [(layers, "forward", "forward") for layers in (2, 3, 4)]
    assert kinds == [*layers, *[(3, "forward", "step")] * 2, *stacked]
    assert all(row["ours_us"] for row in report["rows"])


@pytest.mark.parametrize("raised", [False, True])
def test_after_a_lost_context_no_call_is_started(
    raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call after which CUDA refuses every call is wrong; later ones are not reached."""
    original = rows.timed

    def failing(problem: Any, *rest: Any) -> Any:
        original(problem, *rest)
        if raised and problem.H == 8:
            raise RuntimeError("what CUDA refused")

    monkeypatch.setattr(rows, "timed", failing)
    done = counted_calls(monkeypatch)
    error = "cudaErrorIllegalAddress: an illegal memory access was encountered"
    monkeypatch.setattr(
        device_report, "refused_by", lambda backend: error if len(done) == 4 else ""
    )
    report = measured(tmp_path, cells=("gru",), dtypes=("float32",), **FIVE)
    assert done == ["compared", "timed"] * 2
    assert json.loads((tmp_path / "report.json").read_text()) == report
    message = f"CUDA refuses every call since gru float32 N=2 H=8 T=3: {error}"
    assert [row["wrong"] for row in report["rows"][:4]] == [""] * 2 + [message] * 2
    assert {row["wrong"] for row in report["rows"][4:]} == {""}
    assert {row["not_timed"] for row in report["rows"][2:]} == {message}


def test_another_error_of_a_call_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("a fault of the report")

    monkeypatch.setattr(rows, "timed", failing)
    with pytest.raises(RuntimeError, match="a fault of the report"):
        measured(tmp_path, cells=("gru",), dtypes=("float32",), **FIVE)


def test_cuda_is_checked_for_a_lost_context() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    if cupy.is_available():
        pytest.skip("this machine has a GPU")
    backend = CupyBackend("cupy:0", cupy, 0)  # without a driver
    assert device_report.refused_by(backend).startswith("cudaErrorInsufficientDriver")
    assert device_report.refused_by(xprnn.get_backend("numpy")) == ""


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "soon"])
def test_an_invalid_limit_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        device_report.main([f"--limit={limit}"])
    assert ended.value.code == 2
    assert f"argument --limit: {'invalid' if limit == 'soon' else 'expected a positive'}" in (
        capsys.readouterr().err
    )
