"""Bidirectional layers on sequence kernels: one launch if both directions fit, else two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.kernels.cuda.emulated.test_sequence_layers import compare, run_layer
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.sequence import Function, install
from xprnn.backend import Backend
from xprnn.kernels import Pass, Unsupported
from xprnn.kernels.cuda import sequence

pytestmark = needs_compiler
LENGTHS = [0, 4, 1, 3, 1]
LAYERS = {"bidirectional": True, "num_layers": 2, "dropout": 0.5}
CASE = (5, 20, 4, LAYERS, LENGTHS)
FLAT = (3, 9, 4, {"bidirectional": True, "bias": False, "batch_first": True}, None)


def grids() -> list[tuple[str, tuple[int, ...]]]:
    """The kernel and the grid of each launch."""
    return [
        (name.removeprefix("xprnn::").partition("<")[0], grid) for name, grid in Function.launches
    ]


@pytest.fixture
def small_device(device: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """As `device`, but too small for both directions: it holds the two blocks of up to 32 units."""
    install(monkeypatch, multiProcessorCount=3)
    return device


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
def test_a_layer_needs_one_launch_per_pass(cell: str, device: Backend) -> None:
    for case, layers in ((CASE, 2), (FLAT, 1)):
        Function.launches.clear()
        compare(cell, run_layer(cell, device.name, case, True), case, True, "float32")
        blocks = -(-case[1] // 16), 1, 2
        family = cell.partition("_")[0]
        expected = [f"{family}_{way}" for way in ("forward", "backward") for _ in range(layers)]
        assert grids() == [(name, blocks) for name in expected]


def test_directions_that_do_not_fit_are_launched_separately(small_device: Backend) -> None:
    compare("gru", run_layer("gru", small_device.name, CASE, True), CASE, True, "float32")
    expected = ["gru_forward"] * 4 + ["gru_backward"] * 4
    assert grids() == [(name, (2, 1, 1)) for name in expected]


def test_each_pass_is_planned_separately(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward in one launch, backward in two."""

    def forward_only(self: Any, work: Pass, *sizes: int) -> Any:
        if work is Pass.BACKWARD and sizes[3] == 2:
            return Unsupported("no")
        return original(self, work, *sizes)

    original = sequence.CudaRunner.plan
    monkeypatch.setattr(sequence.CudaRunner, "plan", forward_only)
    compare("lstm", run_layer("lstm", device.name, CASE, True), CASE, True, "float32")
    assert [grid[2] for _, grid in grids()] == [2, 2, 1, 1, 1, 1]


def test_explain_reports_the_launches(small_device: Backend) -> None:
    layer = xprnn.GRU(3, 20, seed=0, bidirectional=True, backend=small_device.name)
    alone = "one launch runs all steps of a direction of a layer"
    blocks = "both: H=20: 4 blocks must run at once, one for 16 units of each direction; this "
    why = f"{blocks}device holds 3"
    assert layer.eval().explain((4, 2, 3)).splitlines()[4:] == [f"  forward: {alone}; {why}"]
    assert layer.train().explain((4, 2, 3)).splitlines()[4:] == [
        f"  {work}: {alone}; {why}" for work in ("training", "backward")
    ]
    layer = xprnn.GRU(3, 16, seed=0, bidirectional=True, backend=small_device.name).eval()
    assert layer.explain((4, 2, 3)).splitlines()[4:] == [
        "  forward: one launch runs all steps of a layer, both directions"
    ]
    layer = xprnn.GRU(3, 16, seed=0, backend=small_device.name).eval()
    assert layer.explain((4, 2, 3)).splitlines()[4:] == [f"  {alone}"]


@pytest.mark.parametrize("cell", [xprnn.GRU, xprnn.LSTM])
def test_verify_accepts_both_directions(cell: Any, device: Backend) -> None:
    report = xprnn.verify(cell(3, 9, seed=0, bidirectional=True, backend=device.name), (4, 3, 3))
    assert report.ok, report
    assert {grid[2] for _, grid in grids()} == {2}
    assert [row.check for row in report.rows if row.implementation == "sequence"] == ["float32"]


def test_the_argument_by_value_has_one_element(device: Backend) -> None:
    """CuPy passes only such NumPy arrays by value; its bytes are two rows of addresses."""
    a, b = (device.from_host(np.zeros(4, np.float32)) for _ in range(2))
    for every, expected in (
        ([[a, None]], [[int(a.data.ptr), 0], [0, 0]]),
        ([[a, b], [None, a]], [[int(a.data.ptr), int(b.data.ptr)], [0, int(a.data.ptr)]]),
    ):
        table = sequence.grouped_arguments(every, 2)
        assert table.size == 1 and table.nbytes == 32
        assert np.frombuffer(table.tobytes(), np.uint64).reshape(2, 2).tolist() == expected


def swapped(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda every, slots: original(every[::-1], slots)


def first_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda every, slots: original([every[0]] * len(every), slots)


FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "directions exchanged": (sequence, "grouped_arguments", swapped),
    "the first direction twice": (sequence, "grouped_arguments", first_twice),
    "the other direction's first states": (
        sequence,
        "_first",
        lambda original: lambda layout, reverse: original(layout, not reverse),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_launcher_is_detected(
    name: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, what, fault = FAULTS[name]
    monkeypatch.setattr(module, what, fault(getattr(module, what)))
    monkeypatch.setattr(sequence, "MAX_POLLS", 200)
    with pytest.raises((AssertionError, RuntimeError)):
        compare("gru", run_layer("gru", device.name, FLAT, False), FLAT, False, "float32")
