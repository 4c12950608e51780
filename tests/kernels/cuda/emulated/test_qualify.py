"""`qualify` on the fake CuPy, with sequence kernels on the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import xprnn
from tests.support.emulator.elementwise import needs_compiler
from tests.support.implementations import SelectKernels
from tests.support.qualifying import FAKE_CUPY, worker
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.diagnostics.qualifying.grid import Grid
from xprnn.diagnostics.qualifying.report import QualifyReport
from xprnn.diagnostics.qualifying.run import Limits, measure, write

pytestmark = needs_compiler
GRID = (Grid(("float32",), (2,), (8,), (3,)),)
LIMITS = Limits(total=900.0, compare=300.0, sample=120.0)
# a fault in the source of the forward kernel, which runs in both passes
WRONG = """
original = sequence.launch
def launch(tiling, *arguments):
    faults = (("return tanh_of(", "return -tanh_of("),) if tiling.work != "backward" else ()
    return original(tiling, *arguments, faults)
sequence.launch = launch
"""
STOPPING = """
import os, time
original = sequence.launch
def launch(tiling, *arguments):
    if tiling.work == "backward":
        {action}
    return original(tiling, *arguments)
sequence.launch = launch
"""

SLOW = """
import time
from xprnn.engine.loop import StepLoop
original = StepLoop.forward
def slow(self, passes, call):
    time.sleep(0.2)
    return original(self, passes, call)
StepLoop.forward = slow
"""


def qualified(code: str = "", compare: float = LIMITS.compare) -> QualifyReport:
    return measure(
        "fake_cupy",
        ["rnn_tanh"],
        grid=GRID,
        limits=Limits(LIMITS.total, compare, LIMITS.sample),
        command=worker(FAKE_CUPY + code),
    )


def outcomes(report: QualifyReport, implementation: str) -> dict[str, str]:
    rows = report.qualification.rows
    return {row.kind: row.outcome for row in rows if row.implementation == implementation}


@pytest.fixture
def gpu(
    fake_cupy: Backend, select_kernels: SelectKernels, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Backend]:
    """The same device in this process, where "auto" takes no sequence kernel by itself."""
    exec(FAKE_CUPY.replace("pytest.MonkeyPatch()", "patch"), {"patch": monkeypatch})
    select_kernels("auto")
    yield fake_cupy
    kernels.forget_plans()


def selected(report: QualifyReport, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What "auto" takes for a forward pass and for training where it reads the file."""
    write(report, path)
    monkeypatch.setenv("XPRNN_QUALIFIED", str(path))
    kernels.forget_plans()
    layer = xprnn.RNN(8, 8, backend="fake_cupy", seed=0)
    return [each.explain((3, 2, 8)) for each in (layer.eval(), layer.train())]


def test_right_kernels(gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = qualified()
    assert report.ok and not report.missed, str(report)
    for name in kernels.IMPLEMENTATIONS:
        assert outcomes(report, name) == dict.fromkeys(("forward", "training", "step"), "right")
    assert report.qualification.device == "Fake H200"
    assert {line.default for line in report.lines} == {"pointwise"}


@pytest.mark.parametrize(
    ("code", "forward", "training"),
    [
        (WRONG, "wrong", "wrong"),
        (STOPPING.format(action="os._exit(4)"), "right", "ended its process"),
        (STOPPING.format(action="raise RuntimeError('illegal')"), "right", "raised"),
        (STOPPING.format(action="time.sleep(1000)"), "right", "timed out"),
    ],
)
def test_a_kernel_with_a_fault_is_never_taken(
    code: str,
    forward: str,
    training: str,
    gpu: Backend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = qualified(code, 30.0 if training == "timed out" else LIMITS.compare)
    assert outcomes(report, "sequence") == {
        "forward": forward,
        "training": training,
        "step": "right",
    }, str(report)
    for name in ("reference", "pointwise"):
        assert {*outcomes(report, name).values()} == {"right"}
    texts = selected(report, tmp_path / "q.json", monkeypatch)
    for text, outcome in zip(texts, (forward, training), strict=True):
        assert outcome == "right" or not text.splitlines()[0].endswith(": sequence")


def test_a_right_kernel_that_is_faster_is_taken(
    gpu: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are made slow in their workers."""
    report = qualified(SLOW)
    texts = selected(report, tmp_path / "q.json", monkeypatch)
    for text in texts:
        first, reason = text.splitlines()[:2]
        assert first.endswith(": sequence")
        digest = report.qualification.digest
        assert f"on Fake H200 (file {digest}), worst error" in reason
    changes = {line.case.kind: line.selected for line in report.changes}
    assert (changes["forward"], changes["training"]) == ("sequence", "sequence")
    assert "sequence instead of pointwise" in " ".join(str(report).split())
