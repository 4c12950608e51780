"""The report's steps of a stepper: compared, timed, as a graph; on a CPU and the fake CuPy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy import cuda as fake_cuda
from tests.support.fake_cupy.stack_step import Function, install

pytest.importorskip("torch", reason="torch is not installed, which the report compares with")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16")

import torch

import xprnn
from benchmarks.device import graphs, peaks, steps
from benchmarks.device.bounds import step_bound, weights
from benchmarks.device.peaks import Peaks
from benchmarks.device.problems import STEP_GRID, StepProblem, everything, step_problems
from xprnn.backend import Backend
from xprnn.kernels.cuda import loading
from xprnn.tools.bench import clock

ALL = ("sequence", "graph", "pointwise")
SMALL = StepProblem("gru", "float32", 2, 9)
MEASURED = Peaks(4e12, {"float32": 5e13, "float16": 8e14}, 6e-7, 2e-7, 3e-6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "BUDGET", 0.0)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)


@pytest.fixture
def device(fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The fake CuPy on a small device with the host's clock, and torch on the CPU."""
    install(monkeypatch, multiProcessorCount=2)
    monkeypatch.setattr(steps, "poisoned", lambda backend: nullcontext())
    monkeypatch.setattr(steps, "timer", lambda backend: clock._seconds)
    monkeypatch.setattr(steps, "measure_read", lambda backend, nbytes: nbytes / 1e13)
    where = torch, torch.device("cpu")
    monkeypatch.setattr(
        steps, "torch_for", lambda task: (*where, getattr(torch, task.setting.operand_dtype))
    )
    loading.kernel.cache_clear()
    yield fake_cupy
    loading.kernel.cache_clear()


def test_the_steps_of_the_report() -> None:
    assert STEP_GRID == ((1, 512), (8, 512))
    problems = step_problems(("gru", "lstm"), ("tf32", "float16"))
    assert [(p.cell, p.dtype, p.N) for p in problems] == [
        *(("gru", "float16", 1), ("gru", "float16", 8)),
        *(("lstm", "float16", 1), ("lstm", "float16", 8)),
    ]
    every = [p for p in everything() if isinstance(p, StepProblem)]
    assert [p.layers for p in every] == [3] * 18


# -- compared


@needs_compiler
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_way_is_compared(cell: str, dtype: str, device: Backend) -> None:
    results, absent = steps.compared(StepProblem(cell, dtype, 2, 9), device)
    assert [row["kernels"] for row in results] == [*ALL] and not absent
    assert all(0 < row["error"] <= row["limit"] and not row["wrong"] for row in results)
    assert len(Function.launches) == steps.COMPARED + 2 + steps.COMPARED


@needs_compiler
def test_a_wrong_sign_in_the_launch_is_reported_in_its_rows(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign = ("n = tanh_of(gx_n + r * gh_n)", "n = tanh_of(gx_n - r * gh_n)")
    monkeypatch.setattr(Function, "faults", (sign,))
    results, _ = steps.compared(SMALL, device)
    assert [bool(row["wrong"]) for row in results] == [True, True, False]
    steps.timed(SMALL, results, device, MEASURED)
    assert [row["not_timed"] for row in results] == ["wrong", "wrong", None]
    assert results[2]["ours_us"] > 0


@needs_compiler
def test_a_graph_of_one_buffer_is_wrong(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step would start from the first state and read an exchange buffer that is full."""
    monkeypatch.setattr(graphs, "cycle", lambda calls: iter(calls[:1] * 100))
    results, _ = steps.compared(SMALL, device)
    assert [bool(row["wrong"]) for row in results] == [False, True, False]


@needs_compiler
def test_a_failed_capture_is_reported(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(stream: Any) -> Any:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: not permitted")

    monkeypatch.setattr(fake_cuda.Stream, "end_capture", refused)
    results, (absent,) = steps.compared(SMALL, device)
    assert [row["kernels"] for row in results] == ["sequence", "pointwise"]
    assert absent["kernels"] == "graph" and absent["layers"] == 3
    assert absent["reason"] == ("not captured: cudaErrorStreamCaptureUnsupported: not permitted")


def test_steps_that_are_not_one_launch_have_no_graph(device: Backend) -> None:
    stepper = xprnn.GRU(3, 5, backend=device.name, seed=0).stepper(1)
    x = device.from_host(np.zeros((1, 3), np.float32))
    with pytest.raises(graphs.NotCapturedError, match="two steps were 0 cooperative launches"):
        graphs.replayed(lambda: stepper.step(x), device)
    assert "launch" not in vars(device.cooperative)


@needs_compiler
def test_sizes_that_no_kernel_supports_are_reported(device: Backend) -> None:
    results, absent = steps.compared(SMALL._replace(N=9), device)
    assert [row["kernels"] for row in results] == ["pointwise"]
    assert [one["kernels"] for one in absent] == ["sequence", "graph"]
    assert all("supports at most 8 rows" in one["reason"] for one in absent)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
def test_a_wrong_step_on_a_cpu(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One result in one of the steps, or one of the final states."""
    problem, backend = SMALL._replace(cell=cell), xprnn.get_backend("numpy")
    original = steps.Streams.run
    for name in ("output", "h", *["c"] * (cell == "lstm")):

        def changed(self: Any, *arguments: Any, name: str = name) -> Any:
            results = original(self, *arguments)
            results[name][-1, 0, 0] += 1e-3
            return results

        with monkeypatch.context() as patch:
            patch.setattr(steps.Streams, "run", changed)
            (row,), _ = steps.compared(problem, backend)
            assert row["wrong"].startswith(f"{name} is off by ") and row["of"] == name
    (row,), _ = steps.compared(problem, backend)
    assert not row["wrong"]


# -- timed


@needs_compiler
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_way_is_timed_with_torchs_cells(cell: str, device: Backend) -> None:
    problem = SMALL._replace(cell=cell)
    results, _ = steps.compared(problem, device)
    steps.timed(problem, results, device, MEASURED)
    for row in results:
        assert row["not_timed"] is None and row["floor_of"] == "launch"
        assert row["floor_us"] == pytest.approx(3.0)
        assert row["torch_us"] == results[0]["torch_us"] > 0 and row["ours_us"] > 0


def test_results_other_than_torchs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = steps.torch_cells

    def other(problem: Any, layer: Any, x: np.ndarray) -> Callable[[], Any]:
        call = original(problem, layer, x)
        return lambda: -call()

    monkeypatch.setattr(steps, "torch_cells", other)
    backend = xprnn.get_backend("numpy")
    results, _ = steps.compared(SMALL, backend)
    steps.timed(SMALL, results, backend, MEASURED)
    (row,) = results
    assert row["wrong"].startswith("DisagreementError: reference: its h differs")
    assert row["not_timed"] == row["wrong"] and row["ours_us"] is None


def test_a_state_that_becomes_nan_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a graph whose kernel timed out, which is not reported otherwise."""
    backend, original = xprnn.get_backend("numpy"), steps.measure
    results, _ = steps.compared(SMALL, backend)

    def broken(functions: Any, *rest: Any) -> Any:
        samples = original(functions, *rest)
        functions[0].keywords["out"][0, 0] = np.nan
        return samples

    monkeypatch.setattr(steps, "measure", broken)
    steps.timed(SMALL, results, backend, MEASURED)
    assert "h became NaN" in results[0]["wrong"] and results[0]["ours_us"] is None


def test_a_longer_step_has_a_longer_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, original = xprnn.get_backend("numpy"), steps.Streams.__init__
    results, _ = steps.compared(SMALL, backend)

    def slow(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        run_step = self.run_step
        self.run_step = lambda: (time.sleep(0.02), run_step())

    monkeypatch.setattr(steps.Streams, "__init__", slow)
    steps.timed(SMALL, results, backend, MEASURED)
    (row,) = results  # torch's own time depends on the machine, which may be busy
    assert row["ours_us"] > 20_000 and row["ratio"] < row["torch_us"] / 20_000


# -- bounds


def test_bounds() -> None:
    one = StepProblem("lstm", "float16", 8, 512)
    assert weights(one) == 3 * 4 * 512 * 1024
    assert step_bound(one, MEASURED, 4e-6) == (4e-6, "bytes")
    assert step_bound(one, MEASURED, 1e-6) == (3e-6, "launch")
    quick = MEASURED._replace(launch=1e-6)
    assert step_bound(one, quick, 1e-6) == (pytest.approx(1.2e-6), "layers")
    assert step_bound(one._replace(layers=1), quick, 1e-6)[1] in ("bytes", "launch")
    slow = MEASURED._replace(rates={"float16": 1e12})
    least = 2 * 8 * weights(one) / 1e12
    assert step_bound(one, slow, 1e-6) == (pytest.approx(least), "operations")


@pytest.mark.parametrize(("call", "replay"), [(4e-4, 2e-3), (2e-3, 4e-4), (4e-4, None)])
def test_the_time_of_a_launch_is_the_shorter_of_two(
    call: float,
    replay: float | None,
    fake_cupy: Backend,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That of CuPy's call or of a graph; a missing graph is reported."""
    rounds: set[int] = set()

    def kernel(grid: Any, block: Any, arguments: Any) -> None:
        stream = fake_cuda.get_current_stream()
        rounds.add(int(arguments[1]))
        if not stream.is_capturing():
            time.sleep(call)
        elif replay is None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        else:
            stream.captured.append(lambda: time.sleep(replay))

    monkeypatch.setattr(peaks.loading, "kernel", lambda *_: kernel)
    monkeypatch.setattr(peaks, "BUDGET", 0.0)
    assert 4e-4 < peaks.measure_launch(fake_cupy, clock._seconds) < 2e-3
    assert rounds == {0}
    message = "no graph of a launch: not captured: cudaErrorStreamCaptureUnsupported\n"
    assert capsys.readouterr().out == message * (replay is None)
