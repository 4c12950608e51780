"""The memory that `explain` says a training step takes, against what tracemalloc counts."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.implementations import SelectKernels
from tests.support.numba_cases import needs_numba
from tests.support.targets import LAYERS, make
from xprnn.core.workspace import Workspace
from xprnn.engine import replay

README = Path(__file__).parents[2] / "README.md"
BOUND = 0.05  # of what is measured: what a step works on and packed weights are estimated
T, N, I, H = 200, 8, 48, 64  # noqa: E741
NETWORKS = {
    "one layer": {},
    "batch first": {"batch_first": True},
    "three layers": {"num_layers": 3, "dropout": 0.5},
    "two directions": {"num_layers": 2, "bidirectional": True},
}
KERNELS = ["reference", *(pytest.param(k, marks=needs_numba) for k in ("pointwise", "sequence"))]


def stated(layer: Any) -> dict[str, int]:
    """The bytes that `explain` names, by what they are."""
    shape = (N, T, I) if layer.options["batch_first"] else (T, N, I)
    (line,) = re.findall("^  a training step takes about (.*)$", layer.explain(shape), re.M)
    total, kept, work, results = [int(n.replace(",", "")) for n in re.findall("[0-9,]+[0-9]", line)]
    assert total == kept + work + results
    return {"total": total, "kept": kept}


def measured(layer: Any, steps: int = 3) -> dict[str, int]:
    """The same bytes counted, in the last of some steps."""
    outer = (N, T) if layer.options["batch_first"] else (T, N)
    x = np.ones((*outer, I), layer.dtype)
    doutput = np.ones((*outer, H * layer._stack.num_directions), layer.dtype)
    layer(x)  # what is compiled or imported is so now
    layer.backward(doutput)
    layer.eval().train()
    tracemalloc.start()
    try:
        for _ in range(steps):
            tracemalloc.reset_peak()
            output, final = layer(x)
            kept = layer._records[-1].memory.mark() * layer.dtype.itemsize
            dx, dinitial = layer.backward(doutput)
            total = tracemalloc.get_traced_memory()[1]
            del output, final, dx, dinitial
    finally:
        tracemalloc.stop()
    return {"total": total, "kept": kept}


def check(layer: Any) -> None:
    expected = stated(layer)
    for name, found in measured(layer).items():
        error = expected[name] / found - 1
        assert abs(error) < BOUND, f"{name}: {expected[name]:,} stated, {found:,} measured"


@pytest.mark.parametrize("k", [None, 10, 1000])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_training_step_takes_what_is_stated(
    cell: str, kernels: str, network: str, k: int | None, select_kernels: SelectKernels
) -> None:
    if kernels == "sequence" and cell == "gru_reset_before":
        kernels = "auto"
    select_kernels(kernels)
    check(make(cell, I, H, dtype="float32", recompute=k, **NETWORKS[network]))


def test_it_does_in_other_types(implementation: str) -> None:
    check(make("gru", I, H, num_layers=2))
    narrow = make("lstm", I, H, dtype="float32", compute_dtype="float16")
    text = narrow.explain((T, N, I))
    assert "\n  the memory of the plain code in low precision is not counted\n" in text


def test_of_gates_and_states_a_record_keeps_one_in_k(implementation: str) -> None:
    """From T to k steps of gates, from T to T/k states; x and what a layer hands up stay."""
    for k in (1, 7, 50, T):
        layer = make("lstm", I, H, num_layers=2, bidirectional=True, recompute=k)
        states = -(-T // k) * N * H * 2 * 4
        assert stated(layer)["kept"] == 8 * (T * N * (I + 2 * H) + states)
        assert abs(measured(layer)["kept"] / stated(layer)["kept"] - 1) < 0.001


def test_the_layer_says_what_recomputing_gives() -> None:
    lines = make("gru", I, H, recompute=10).explain((T, N, I)).splitlines()
    (saved,) = [line for line in lines if line.startswith("  without recompute=10 about ")]
    bytes_of = stated(make("gru", I, H))["total"]
    assert saved == f"  without recompute=10 about {bytes_of:,}"
    assert bytes_of > 1.5 * stated(make("gru", I, H, recompute=10))["total"]


@pytest.mark.parametrize("kernels", ["reference", pytest.param("sequence", marks=needs_numba)])
def test_the_readme_says_what_is_stated(kernels: str, select_kernels: SelectKernels) -> None:
    select_kernels(kernels)
    rows = re.findall("^[|] (.*) [|] (.*) MB [|] .* [|] (.*) MB [|]", README.read_text(), re.M)
    assert [name for name, *_ in rows] == ["all is kept", "`recompute=32`"]
    for k, (_, compiled, plain) in zip((None, 32), rows, strict=True):
        text = make("gru", 256, 256, dtype="float32", recompute=k).explain((1000, 32, 256))
        (total,) = re.findall("a training step takes about ([0-9,]+)", text)
        found = float(plain if kernels == "reference" else compiled) * 1e6
        assert abs(int(total.replace(",", "")) / found - 1) < BOUND


@pytest.mark.parametrize("k", [None, 10])
def test_buffers_stay_while_calls_and_backward_take_turns(
    k: int | None, implementation: str
) -> None:
    """A call needs much less to work in than `backward`, and leaves it what there is."""
    layer, x = make("gru", I, H, recompute=k), np.ones((T, N, I))
    buffers = []
    for _ in range(12):
        output, _ = layer(x)
        layer.backward(output)
        (scratch,) = layer._scratch._free[0]
        buffers.append(scratch._buffer)
    assert buffers[2].nbytes >= output.nbytes
    assert all(buffer is buffers[2] for buffer in buffers[2:])


# -- planted faults


@pytest.mark.parametrize("fault", ["trace", "scratch"])
def test_memory_that_is_not_stated_is_found(
    fault: str, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """A state more in each trace; segments that are not given back."""
    layer = make("gru", I, H, recompute=None if fault == "trace" else 10)
    if fault == "trace":
        genuine = replay.allocate

        def more(*arguments: Any) -> Any:
            saved = arguments[3].saved
            saved.empty(T * N, H)
            return genuine(*arguments)

        monkeypatch.setattr(replay, "allocate", more)
    else:
        monkeypatch.setattr(Workspace, "rewind", lambda self, mark: None)
    with pytest.raises(AssertionError, match="stated"):
        check(layer)
