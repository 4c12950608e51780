"""The report's stacks on the fake CuPy: compared and timed, as wavefront and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from tests.kernels.cuda.emulated.test_wavefront_layers import first_layer_twice, layers_of_launches
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.sequence import Function, install

pytest.importorskip("torch", reason="torch is not installed, which the report compares with")
pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16")

import time

import torch

import xprnn
from benchmarks.device import stacks
from benchmarks.device.bounds import call_bound, operations
from benchmarks.device.peaks import Peaks
from benchmarks.device.problems import FORWARD, Problem, StackProblem, everything, stack_problems
from xprnn.backend import Backend
from xprnn.kernels.cuda import sequence
from xprnn.tools.bench import clock

SMALL = StackProblem("gru", "float32", 2, 20, 4, 3)
MEASURED = Peaks(4e12, {"float32": 5e13, "bfloat16": 8e14}, 6e-7, 2e-7, 3e-6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "BUDGET", 0.0)
    monkeypatch.setattr("xprnn.tools.bench.clock.SAMPLE", 1e-9)


@pytest.fixture
def device(fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The fake CuPy with the host's clock, and torch on the CPU."""
    install(monkeypatch)
    monkeypatch.setattr(stacks, "poisoned", lambda backend: nullcontext())
    monkeypatch.setattr(stacks, "timer", lambda backend: clock._seconds)
    where = torch, torch.device("cpu")
    monkeypatch.setattr(
        stacks, "torch_for", lambda task: (*where, getattr(torch, task.setting.operand_dtype))
    )
    return fake_cupy


def test_the_stacks_of_the_report() -> None:
    problems = stack_problems(("gru", "rnn_tanh"), ("tf32", "float32"))
    sizes = [(p.cell, p.dtype, p.N, p.H, p.T, p.layers) for p in problems]
    assert sizes == [
        ("gru", "float32", *size, layers)
        for size in ((1, 256, 512), (8, 512, 512), (32, 512, 512))
        for layers in (2, 3, 4)
    ]
    every = [p for p in everything() if isinstance(p, StackProblem)]
    assert every == everything()[-36:] and {p.cell for p in every} == {"gru", "lstm"}


# -- compared


@pytest.mark.frozen
@needs_compiler
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_are_compared_and_timed(cell: str, dtype: str, device: Backend) -> None:
    problem = SMALL._replace(cell=cell, dtype=dtype)
    results, absent = stacks.compared(problem, device)
    assert [row["kernels"] for row in results] == ["wave", "sequence"] and not absent
    assert all(0 < row["error"] <= row["limit"] and not row["wrong"] for row in results)
    assert layers_of_launches() == [(f"{cell}_forward", 3), *[(f"{cell}_forward", 1)] * 3]
    stacks.timed(problem, results, device, MEASURED)
    for row in results:
        assert row["not_timed"] is None and row["floor_of"] == "steps"
        assert row["floor_us"] == pytest.approx((4 + 2) * 0.6)
        assert row["torch_us"] == results[0]["torch_us"] > 0 and row["ours_us"] > 0


@pytest.mark.frozen
@needs_compiler
def test_a_wavefront_with_another_layers_arrays_is_wrong(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sequence, "grouped_arguments", first_layer_twice(sequence.grouped_arguments)
    )
    monkeypatch.setattr(sequence, "MAX_POLLS", 200)
    results, _ = stacks.compared(SMALL, device)
    assert [bool(row["wrong"]) for row in results] == [True, False]
    stacks.timed(SMALL, results, device, MEASURED)
    assert [row["not_timed"] for row in results] == ["wrong", None]


@needs_compiler
def test_a_stack_that_does_not_fit_in_a_wavefront_is_reported(device: Backend) -> None:
    (row,), (absent,) = stacks.compared(SMALL._replace(layers=9, H=4), device)
    assert row["kernels"] == "sequence" and not row["wrong"]
    assert absent["kernels"] == "wave" and absent["layers"] == 9
    assert absent["reason"] == "use_kernels('wave'): 9 layers: a wavefront has at most 8"
    assert {name for name, _ in Function.launches} and layers_of_launches()[0][1] == 1


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_wrong_layer_on_a_cpu(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One result in the output, or one of a layer's final states."""
    problem, backend = SMALL._replace(cell=cell), xprnn.get_backend("numpy")
    original = stacks.named
    for name in ("output", "h", *["c"] * (cell == "lstm")):

        def changed(*arguments: Any, name: str = name) -> dict[str, np.ndarray]:
            results = {key: array.copy() for key, array in original(*arguments).items()}
            results[name][-1, 0, 0] += 1e-3
            return results

        with monkeypatch.context() as patch:
            patch.setattr(stacks, "named", changed)
            (row,), _ = stacks.compared(problem, backend)
            assert row["wrong"].startswith(f"{name} is off by ") and row["of"] == name
    (row,), _ = stacks.compared(problem, backend)
    assert not row["wrong"]


# -- timed


def test_results_other_than_torchs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = stacks.torch_stack

    def other(*arguments: Any) -> Callable[[], Any]:
        call = original(*arguments)
        return lambda: (-call()[0],)

    monkeypatch.setattr(stacks, "torch_stack", other)
    backend = xprnn.get_backend("numpy")
    results, _ = stacks.compared(SMALL, backend)
    stacks.timed(SMALL, results, backend, MEASURED)
    (row,) = results
    assert row["wrong"].startswith("DisagreementError: reference: its output differs")
    assert row["not_timed"] == row["wrong"] and row["ours_us"] is None


def test_a_longer_call_has_a_longer_time(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, original = xprnn.get_backend("numpy"), stacks._call
    results, _ = stacks.compared(SMALL, backend)

    def slow(*arguments: Any) -> Callable[[], Any]:
        call = original(*arguments)
        return lambda: (time.sleep(0.02), call())[1]

    monkeypatch.setattr(stacks, "_call", slow)
    stacks.timed(SMALL, results, backend, MEASURED)
    (row,) = results  # torch's own time depends on the machine, which may be busy
    assert row["ours_us"] > 20_000 and row["ratio"] < row["torch_us"] / 20_000


def test_bounds() -> None:
    """Every layer's products and weights; x and the output once; L - 1 steps more."""
    stack, layer = (
        StackProblem("lstm", "float32", 8, 64, 10, 4),
        Problem("lstm", "float32", 8, 64, 10),
    )
    assert operations(stack, FORWARD) == 4 * operations(layer, FORWARD) == 4 * 2 * 256 * 128 * 80
    assert call_bound(stack, FORWARD, MEASURED, None) == (pytest.approx(13 * 6e-7), "steps")
    slow = MEASURED._replace(bandwidth=1e9)
    nbytes = 4 * (2 * 10 * 8 * 64 + 4 * 256 * 128)
    assert call_bound(stack, FORWARD, slow, None) == (pytest.approx(nbytes / 1e9), "bytes")
