"""The memory of a training step that `explain` states, against what tracemalloc counts."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.definitions import DEFINITIONS
from tests.support.implementations import SelectKernels
from tests.support.numba_cases import needs_numba
from tests.support.targets import LAYERS, make
from xprnn.core.workspace import Workspace
from xprnn.engine import replay

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "memory.md"
BOUND = 0.05  # relative to the measurement: workspaces and packed weights are estimated
T, N, I, H = 200, 8, 48, 64  # noqa: E741
NETWORKS = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "three layers": {"num_layers": 3, "dropout": 0.5},
    "two directions": {"num_layers": 2, "bidirectional": True},
}
KERNELS = ["reference", *(pytest.param(k, marks=needs_numba) for k in ("pointwise", "sequence"))]


def stated(layer: Any) -> dict[str, int]:
    """The bytes that `explain` states, by kind."""
    shape = (N, T, I) if layer.options["batch_first"] else (T, N, I)
    (line,) = re.findall("^  a training step takes about (.*)$", layer.explain(shape), re.M)
    total, saved, work, results = [
        int(n.replace(",", "")) for n in re.findall("[0-9,]+[0-9]", line)
    ]
    assert total == saved + work + results
    return {"total": total, "saved": saved}


def measured(layer: Any, steps: int = 3) -> dict[str, int]:
    """The same bytes counted, in the last of some steps."""
    outer = (N, T) if layer.options["batch_first"] else (T, N)
    x = np.ones((*outer, I), layer.dtype)
    doutput = np.ones((*outer, H * layer._spec.num_directions), layer.dtype)
    layer(x)  # compiles and imports
    layer.backward(doutput)
    layer.eval().train()
    tracemalloc.start()
    try:
        for _ in range(steps):
            tracemalloc.reset_peak()
            output, final = layer(x)
            saved = layer._records[-1].memory.mark() * layer.dtype.itemsize
            dx, dinitial = layer.backward(doutput)
            total = tracemalloc.get_traced_memory()[1]
            del output, final, dx, dinitial
    finally:
        tracemalloc.stop()
    return {"total": total, "saved": saved}


def check(layer: Any) -> None:
    expected = stated(layer)
    for name, actual in measured(layer).items():
        error = expected[name] / actual - 1
        assert abs(error) < BOUND, f"{name}: {expected[name]:,} stated, {actual:,} measured"


@pytest.mark.parametrize("k", [None, 10, 1000])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_training_step_needs_the_stated_memory(
    cell: str, kernels: str, network: str, k: int | None, select_kernels: SelectKernels
) -> None:
    if kernels == "sequence" and cell == "gru_reset_before":
        kernels = "auto"
    select_kernels(kernels)
    check(make(cell, I, H, dtype="float32", recompute=k, **NETWORKS[network]))


@pytest.mark.parametrize("kernels", ["reference", pytest.param("sequence", marks=needs_numba)])
@pytest.mark.parametrize("name", ["layer_norm_lstm", "zoneout", "li_gru", "slstm"])
def test_definitions(name: str, kernels: str, select_kernels: SelectKernels) -> None:
    """What only some cells have: sums, masks, and other widths of what is saved."""
    select_kernels(kernels)
    check(xprnn.Recurrent(DEFINITIONS[name], I, H, dtype="float32", seed=0).train())


def test_other_dtypes(implementation: str) -> None:
    check(make("gru", I, H, num_layers=2))
    low_precision = make("lstm", I, H, dtype="float32", compute_dtype="float16")
    text = low_precision.explain((T, N, I))
    assert "\n  the memory of the plain code in low precision is not counted\n" in text


def test_a_recorded_call_saves_one_in_k_gates_and_states(implementation: str) -> None:
    """k instead of T steps of gates, T/k instead of T states; x and the outputs are saved too."""
    for k in (1, 7, 50, T):
        layer = make("lstm", I, H, num_layers=2, bidirectional=True, recompute=k)
        states = -(-T // k) * N * H * 2 * 4
        assert stated(layer)["saved"] == 8 * (T * N * (I + 2 * H) + states)
        assert abs(measured(layer)["saved"] / stated(layer)["saved"] - 1) < 0.001


def test_explain_states_what_recomputing_saves() -> None:
    lines = make("gru", I, H, recompute=10).explain((T, N, I)).splitlines()
    (saved,) = [line for line in lines if line.startswith("  without recompute=10 about ")]
    bytes_of = stated(make("gru", I, H))["total"]
    assert saved == f"  without recompute=10 about {bytes_of:,}"
    assert bytes_of > 1.5 * stated(make("gru", I, H, recompute=10))["total"]


@pytest.mark.parametrize("kernels", ["reference", pytest.param("sequence", marks=needs_numba)])
def test_the_guide_states_the_same(kernels: str, select_kernels: SelectKernels) -> None:
    select_kernels(kernels)
    rows = re.findall("^[|] (.*) [|] (.*) MB [|] .* [|] (.*) MB [|]", PAGE.read_text(), re.M)
    assert [name for name, *_ in rows] == ["everything is saved", "`recompute=32`"]
    for k, (_, compiled, plain) in zip((None, 32), rows, strict=True):
        text = make("gru", 256, 256, dtype="float32", recompute=k).explain((1000, 32, 256))
        (total,) = re.findall("a training step takes about ([0-9,]+)", text)
        documented = float(plain if kernels == "reference" else compiled) * 1e6
        assert abs(int(total.replace(",", "")) / documented - 1) < BOUND


@pytest.mark.parametrize("k", [None, 10])
def test_alternating_calls_and_backward_keep_their_buffers(
    k: int | None, implementation: str
) -> None:
    """A call needs a much smaller workspace than `backward`, and does not shrink it."""
    layer, x = make("gru", I, H, recompute=k), np.ones((T, N, I))
    buffers = []
    for _ in range(12):
        output, _ = layer(x)
        layer.backward(output)
        (scratch,) = layer._scratch._free[0]
        buffers.append(scratch._buffer)
    assert buffers[2].nbytes >= output.nbytes
    assert all(buffer is buffers[2] for buffer in buffers[2:])


# -- injected faults


@pytest.mark.parametrize("fault", ["trace", "scratch"])
def test_unstated_memory_is_detected(
    fault: str, monkeypatch: pytest.MonkeyPatch, reference: None
) -> None:
    """One more saved state in each call; segments that are not released."""
    layer = make("gru", I, H, recompute=None if fault == "trace" else 10)
    if fault == "trace":
        original = replay.allocate

        def more(*arguments: Any) -> Any:
            saved = arguments[3].saved
            saved.empty(T * N, H)
            return original(*arguments)

        monkeypatch.setattr(replay, "allocate", more)
    else:
        monkeypatch.setattr(Workspace, "rewind", lambda self, mark: None)
    with pytest.raises(AssertionError, match="stated"):
        check(layer)
