"""bench: wrong peers are refused, slow calls have long times, and the report names its setting."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.definitions import DEFINITIONS
from xprnn.tools.bench import clock, onnx, peers
from xprnn.tools.bench import run as bench
from xprnn.tools.bench.report import BenchReport, Row
from xprnn.tools.bench.steps import onnxruntime_step, torch_step
from xprnn.tools.bench.task import Peer, PeerUnavailableError, Setting, make_task
from xprnn.tools.cli import main

SMALL = Setting("gru", hidden=5, input=3, batch=4, steps=6)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest and shortest samples possible."""
    monkeypatch.setattr(clock, "BUDGET", 0.0)
    monkeypatch.setattr(clock, "SAMPLE", 1e-9)


def double(task: Any, **changes: Any) -> Peer:
    """A peer that is xprnn itself, but for `changes`."""
    return replace(peers.xprnn_peer(task), **{"name": "double", **changes})


# -- refused peers


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["output", "dx", "dweight_hh_l0"])
def test_a_peer_with_other_results_is_not_measured(
    name: str, factor: float, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(task: Any) -> Peer:
        results = dict(peers.xprnn_peer(task).results)
        results[name] = results[name] * np.float32(factor)

        def never() -> None:
            raise AssertionError("it was measured")

        return double(task, results=results, forward=never, both=never)

    monkeypatch.setitem(bench.PEERS, "torch", wrong)
    with pytest.raises(bench.DisagreementError, match=f"double: its {name} differs from xprnn's"):
        bench.run(SMALL, ["torch"])


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
def test_torch_with_weights_of_its_own_is_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.nn.GRU, "load_state_dict", lambda self, weights: None)
    with pytest.raises(bench.DisagreementError, match=r"torch: its \w+ differs from xprnn's by"):
        bench.run(replace(SMALL, kind=kind), ["torch"])


def test_onnx_with_gates_in_torchs_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    operator, _, attributes = onnx.OPERATORS["gru"]
    monkeypatch.setitem(onnx.OPERATORS, "gru", (operator, (0, 1, 2), attributes))
    with pytest.raises(bench.DisagreementError, match="onnxruntime: its output differs"):
        bench.run(SMALL, ["onnxruntime"])


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_peer_that_is_not_installed(
    name: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert name not in peers.installed()
    assert name not in str(bench.run(SMALL)).split("versions:")[0]
    report = bench.run(SMALL, [name])
    assert f"not measured: {name}: not installed; pip install {name}" in report.lines
    assert [row.library for row in report.rows] == ["xprnn", "xprnn"]


def test_a_peer_without_such_a_layer(quick: None) -> None:
    pytest.importorskip("torch")
    setting = replace(SMALL, cell="gru_reset_before")
    why = "torch: has no GRU with the reset gate before the product"
    with pytest.raises(PeerUnavailableError, match=why):
        bench.run(setting, ["torch"])
    assert f"not measured: {why}" in bench.run(setting).lines
    pytest.importorskip("onnxruntime")
    with pytest.raises(PeerUnavailableError, match="operators take no float64"):
        bench.run(replace(SMALL, kind="float64"), ["onnxruntime"])


def test_a_slow_peer_and_a_slow_layer_have_long_times(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(task: Any) -> Peer:
        peer = double(task)
        return replace(peer, forward=lambda: (time.sleep(0.02), peer.forward()))

    monkeypatch.setitem(bench.PEERS, "torch", slow)
    report = bench.run(SMALL, ["torch"])
    by_name = {(row.what, row.library): row for row in report.rows}
    assert by_name["forward", "double"].median > 0.02
    assert by_name["forward", "double"].ratio[0] > 1
    assert by_name["forward", "double"].xprnn_seconds == by_name["forward", "xprnn"].seconds

    original = xprnn.engine.stack.backward

    def sleepy(*args: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return original(*args, **options)

    monkeypatch.setattr(xprnn.engine.stack, "backward", sleepy)
    task = make_task(SMALL)
    fast = replace(double(task), both=lambda: None)
    monkeypatch.setitem(bench.PEERS, "torch", lambda task: fast)
    by_name = {(row.what, row.library): row for row in bench.run(SMALL, ["torch"]).rows}
    assert by_name["with backward", "xprnn"].median > 0.05
    assert by_name["with backward", "double"].ratio[0] < 0.1


# -- the report


def test_the_report_is_a_table() -> None:
    ours = [1e-3, 2e-3, 1e-3, 1e-3, 1e-3]
    theirs = [2e-3, 5e-3, 2e-3, 2e-3, 3e-3]
    rows = (Row("forward", "xprnn", ours, ours), Row("forward", "torch", theirs, ours))
    lines = [
        " ".join(s.split()) for s in str(BenchReport("a GRU", 10, 4, rows, ("one",))).splitlines()
    ]
    assert lines == [
        "a GRU",
        "us / time step sequence steps / s peer / xprnn",
        "forward xprnn 100.00 40,000",
        "forward torch 200.00 20,000 2.00 (2.00 to 2.75)",
        "one",
    ]


def test_a_rate_is_in_asvs_unit() -> None:
    from benchmarks import result_store

    seconds, setting = [2e-3] * 5, replace(SMALL, batch=8, hidden=64, steps=128)
    row = [[2e-3], [["'gru'"], ["'N=8 H=64 T=128'"]], "1"]
    columns = ["result", "params", "version"]
    results = {"result_columns": columns, "results": {"layers.Forward.time_forward": row}}
    result_store.add_rates(results)
    ((rate,), *_) = results["results"]["layers.Forward.track_throughput_forward"]
    rows = (Row("forward", "xprnn", seconds, seconds),)
    text = str(BenchReport("", setting.steps, setting.batch, rows, ()))
    assert f" {rate:,.0f} " in f"{text} "
    assert result_store.RATE_UNIT in text


def test_the_report_names_the_setting_the_versions_and_the_machine(
    quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = str(bench.run(replace(SMALL, kind="float16"), []))
    assert "GRU(3, 5), gru, T=6 N=4, float32 with float16" in text
    assert "xprnn: reference on numpy, float32 with float16" in text
    assert "OMP_NUM_THREADS is 1" in text
    assert f"numpy {np.__version__}" in text and "machine: " in text
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP_NUM_THREADS is not set" in " ".join(str(bench.run(SMALL, [])).split())


def test_importing_the_command_line_imports_no_peer() -> None:
    code = (
        "import sys, xprnn.tools.cli; print(*{'torch', 'onnxruntime', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["float32", "tf32", "float16", "bfloat16"])
def test_torch_on_the_gpu_agrees(kind: str, quick: None) -> None:
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    pytest.importorskip("torch")
    report = bench.run(replace(SMALL, hidden=64, steps=20, kind=kind, backend="cupy"), ["torch"])
    assert [row.library for row in report.rows] == ["xprnn", "torch", "xprnn", "torch"]
    assert all(row.median > 0 for row in report.rows)


# -- definitions


@pytest.mark.parametrize("name", ["slstm", "every_function"])
def test_a_definition_is_timed_without_peers(name: str, quick: None) -> None:
    setting = replace(SMALL, cell=DEFINITIONS[name])
    report = bench.run(setting, None)
    assert {row.library for row in report.rows} == {"xprnn"}
    assert f"Recurrent(3, 5), {name}, T=6 N=4, float32" in report.title
    task, by_step = make_task(setting), {"torch": torch_step, "onnxruntime": onnxruntime_step}
    for peer in peers.installed():
        assert f"not measured: {peer}: has no layer of the cell {name}" in report.lines
        with pytest.raises(PeerUnavailableError, match=f"{peer}: has no layer of the cell {name}"):
            by_step[peer](task)


def test_a_definition_that_needs_more_than_x_is_refused() -> None:
    with pytest.raises(TypeError, match="cell: continuous has inputs beside x, dt"):
        make_task(replace(SMALL, cell=DEFINITIONS["continuous"]))
    with pytest.raises(TypeError, match="proj_size: expected a size"):
        make_task(replace(SMALL, cell=DEFINITIONS["projected"]))


def test_the_command_times_a_definition_in_a_file(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.py"
    path.write_text(
        "import xprnn\n"
        "@xprnn.cell(gates=('z', 'n'))\n"
        "def mine(f, x, s):\n"
        "    return s.h + f.sigmoid(x.z) * (x.n - s.h)\n"
    )
    sizes = ["--hidden", "5", "--batch", "4", "--steps", "6"]
    assert main(["bench", "--cell", f"{path}:mine", *sizes]) == 0
    assert "Recurrent(5, 5), mine, T=6 N=4" in capsys.readouterr().out
    assert main(["bench", "--cell", f"{path}:other", *sizes]) == 1
    assert "cells.py: has no definition of a cell 'other'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--cell", "mine"])
    assert "or FILE.py:NAME, got 'mine'" in capsys.readouterr().err
