"""On a GPU a qualification alone makes "auto" select sequence kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy import stack_step
from tests.support.fake_cupy.sequence import Function, install
from tests.support.implementations import SelectKernels
from tests.support.qualifications import Qualify, corners, preferring, selected
from tests.support.targets import arguments, arrays, assert_same, backward, forward
from tests.support.targets import make as make_layer
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels.cuda.plan import plan
from xprnn.kernels.qualification import FAULTS, IMPLEMENTATIONS, PASSES

T, N, H = 4, 3, 16
PRECISIONS = {
    "float32": {},
    "float64": {"dtype": "float64"},
    "tf32": {"precision": "tf32"},
    "float16": {"compute_dtype": "float16"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}


@pytest.fixture
def gpu(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Iterator[Backend]:
    """A fake device on which sequence kernels run, but are not selected."""
    install(monkeypatch)
    select_kernels("auto")
    plan.cache_clear()
    assert kernels.AUTOMATIC["cuda"] == ("reference", "pointwise")
    yield fake_cupy
    plan.cache_clear()


def layer_of(gpu: Backend, cell: str = "gru", size: int = H, **options: Any) -> Any:
    return make_layer(cell, 3, size, backend=gpu.name, **{"dtype": "float32", **options})


def results(gpu: Backend, layer: Any, lengths: Any = None) -> list[np.ndarray]:
    """All results and gradients of a recorded call, on the host."""
    inputs = {name: gpu.from_host(each) for name, each in arguments(layer, T, N).items()}
    first = forward(layer, inputs, lengths=lengths)
    every = arrays([first, backward(layer, inputs), [*layer.grads.values()]])
    return [gpu.to_host(each) for each in every]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_relu", "gru_reset_before"])
def test_the_rows_of_a_precision_decide_its_calls(
    cell: str, precision: str, gpu: Backend, qualify: Qualify
) -> None:
    """Kernels of another precision, or that do not exist, are never selected."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    layers = {
        name: layer_of(gpu, cell, **options)
        for name, options in PRECISIONS.items()
        if name != "bfloat16" or precision == name
    }
    exists = cell != "gru_reset_before" and precision != "float64"
    for preferred in IMPLEMENTATIONS:
        qualify.use("off")
        defaults = {name: selected(layer, (T, N, 3)) for name, layer in layers.items()}
        qualify(gpu, preferring(preferred, cell=cell, dtype=precision))
        for name, layer in layers.items():
            after = selected(layer, (T, N, 3))
            if name == precision and defaults[name][0] != preferred:
                if preferred == "sequence" and not exists:
                    assert after == defaults[name]
                else:
                    assert after[0] == preferred and after[1].startswith("qualified 2026-12-03 on ")
            else:
                assert after == defaults[name]


def test_what_it_says_is_explained(gpu: Backend, qualify: Qualify) -> None:
    qualified = qualify(gpu, preferring("sequence"))
    assert selected(layer_of(gpu), (T, N, 3)) == (
        "sequence",
        f"qualified 2026-12-03 on Fake H200 (file {qualified.digest}), worst error 0.25 of the "
        "limit, 2.0 times as fast as pointwise",
    )


@pytest.mark.parametrize("outcome", [*FAULTS, "unsupported"])
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "not timed"])
def test_kernels_that_were_not_right_are_never_selected(
    outcome: str, timed: bool, gpu: Backend, qualify: Qualify
) -> None:
    others = [each for each in preferring("sequence") if each.implementation != "sequence"]
    changes = {"outcome": outcome, "microseconds": 1.0 if timed else None}
    bad = [
        each for kind in PASSES for each in corners(kind=kind, implementation="sequence", **changes)
    ]
    for rows in ([*others, *bad], bad):
        qualify(gpu, rows)
        for training in (True, False):
            layer = layer_of(gpu)
            if not training:
                layer.eval()
            for shape in ((1, 1, 3), (4, 3, 3), (512, 64, 3), (9999, 64, 3)):
                assert selected(layer, shape)[0] == "pointwise"
        first = layer_of(gpu).stepper(N).explain().splitlines()[0]
        assert first.endswith(": pointwise")


@pytest.mark.parametrize(
    ("outcome", "verify_says", "explain_says"),
    [
        ("right", "", "not qualified as right and faster here; XPRNN_KERNELS=sequence forces it"),
        ("wrong", "wrong, by the qualification", "not qualified as right and faster here; XPRNN"),
        ("unsupported", kernels.EXPERIMENTAL, kernels.EXPERIMENTAL),
    ],
)
def test_what_has_run_on_this_device_is_not_called_new(
    outcome: str, verify_says: str, explain_says: str, gpu: Backend, qualify: Qualify
) -> None:
    """`verify` runs what a file says is right, and `explain` does not say that it never ran."""
    rows = [
        replace(each, outcome=outcome) if each.implementation == "sequence" else each
        for each in preferring("pointwise")
    ]
    qualify(gpu, rows)
    layer, other = layer_of(gpu), layer_of(gpu, "lstm")
    for text in (layer.explain((T, N, 3)), layer.stepper(N).explain()):
        assert f"\n  sequence: {explain_says}" in text
    report = xprnn.verify(layer, (T, N, 3))
    absent = {each.check: each.reason for each in report.absent}
    if verify_says:
        assert absent["sequence"] == verify_says
    else:  # but its gradcheck, which is in float64
        assert absent["sequence"].startswith("training: float64: sequence kernels support ")
    assert ("sequence" in {each.implementation for each in report.rows}) == (not verify_says)
    absent = {each.check: each.reason for each in xprnn.verify(other, (T, N, 3)).absent}
    assert absent["sequence"] == kernels.EXPERIMENTAL


def test_sizes_without_a_kernel_between_qualified_ones(gpu: Backend, qualify: Qualify) -> None:
    """A file may say that H=2048 was right: where there is no kernel, the default runs."""
    qualify(gpu, preferring("sequence", {"N": (1, 64), "H": (16, 2048), "T": (1, 512)}))
    assert selected(layer_of(gpu, size=512), (T, N, 3))[0] == "sequence"
    layer = layer_of(gpu, size=1700)
    implementation, reason = selected(layer, (T, N, 3))
    assert (implementation, reason) == ("pointwise", "the fastest of 2")
    with xprnn.use_kernels("sequence"), pytest.raises(xprnn.KernelUnavailableError):
        layer.explain((T, N, 3))


def test_the_wavefront_is_not_selected(gpu: Backend, qualify: Qualify) -> None:
    qualify(gpu, preferring("sequence"))
    text = layer_of(gpu, num_layers=2).explain((T, N, 3))
    assert ", T=4 N=3: sequence" in text
    assert f"layers in a wavefront: {kernels.dispatch.WAVEFRONT_EXPERIMENTAL}" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "Fake A100"), ("driver", "12999"), ("cupy", "14.1.0"), ("sources", "0" * 16)],
)
def test_a_file_of_another_machine_is_not_used(
    name: str, value: str, gpu: Backend, qualify: Qualify
) -> None:
    here = kernels.dispatch._package("cuda").identity(gpu)
    assert {*here} == {"device", "capability", "driver", "runtime", "cupy", "sources"}
    qualify(gpu, preferring("sequence"), identity={**here, name: value})
    text = layer_of(gpu).explain((T, N, 3))
    assert ", T=4 N=3: pointwise\n" in text
    expected = rf"  qualification: .*: {name}: {value} in the file, {re.escape(here[name])} here"
    assert re.fullmatch(expected, text.splitlines()[-1])


@needs_compiler
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_results_are_those_of_the_kernel(cell: str, gpu: Backend, qualify: Qualify) -> None:
    for name in IMPLEMENTATIONS:
        qualify(gpu, preferring(name, cell=cell))
        layer, other = (layer_of(gpu, cell, num_layers=2) for _ in range(2))
        before = len(Function.launches)
        actual = results(gpu, layer, [4, 0, 2])
        assert len(Function.launches) - before == (4 if name == "sequence" else 0)
        with xprnn.use_kernels(name):
            assert_same(actual, results(gpu, other, [4, 0, 2]))


@needs_compiler
def test_a_stepper_runs_the_kernel(
    gpu: Backend, qualify: Qualify, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack_step.install(monkeypatch)
    x = gpu.from_host(np.ones((N, 3), np.float32))
    for name in IMPLEMENTATIONS:
        qualify(gpu, preferring(name))
        stepper = layer_of(gpu).eval().stepper(N)
        assert stepper.explain().splitlines()[0].endswith(f": {name}")
        with xprnn.use_kernels(name):
            other = layer_of(gpu).eval().stepper(N)
        assert_same(gpu.to_host(stepper.step(x)), gpu.to_host(other.step(x)))
