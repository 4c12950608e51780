"""Layer calls with sequence kernels on the emulator: selection, arguments, backward."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support import targets
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run
from tests.support.fake_cupy.cuda import LOG
from tests.support.fake_cupy.sequence import Function, install
from tests.support.implementations import SelectKernels
from tests.support.tolerances import assert_close
from xprnn import kernels
from xprnn.backend import Backend, driver
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda import sequence
from xprnn.kernels.cuda.plan import plan
from xprnn.kernels.cuda.table import KERNELS, Tiling

pytestmark = needs_compiler
CASES = {  # N, H, T, options, lengths
    "H padded": (3, 20, 5, {}, None),
    "odd H": (2, 7, 4, {}, None),
    "one step": (2, 8, 1, {}, None),
    "no bias": (2, 16, 3, {"bias": False}, None),
    "two groups": (11, 17, 4, {"bidirectional": True}, None),
    "lengths": (9, 16, 5, {"bidirectional": True, "num_layers": 2}, [5, 3, 0, 4, 1, 5, 2, 2, 1]),
    "padded lengths": (5, 6, 4, {"bidirectional": True}, [0, 4, 1, 3, 1]),
    "batch first": (3, 8, 4, {"batch_first": True}, [2, 4, 1]),
}
TYPES = {
    "float32": {},
    "tf32": {"precision": "tf32"},
    "float16": {"compute_dtype": "float16"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
OTHERS = {
    "lstm": ("float32", "bfloat16"),
    "rnn_tanh": ("float32", "tf32"),
    "rnn_relu": ("float16",),
}
CALLS = [  # cell, case, type
    *[("gru", name, mode) for name in CASES for mode in TYPES],
    *[
        (cell, name, mode)
        for cell in OTHERS
        for name in ("odd H", "no bias", "lengths")
        for mode in OTHERS[cell]
    ],
]


def run_layer(
    cell: str,
    backend: str,
    case: tuple[Any, ...],
    training: bool,
    dtype: str = "float32",
    **types: Any,
) -> list[np.ndarray]:
    """Outputs, final states and, in training, every gradient, on the host."""
    N, H, T, options, lengths = case
    layer = targets.make(cell, 3, H, backend=backend, dtype=dtype, **options, **types)
    if not training:
        layer.eval()
    layer_backend = layer.backend
    drawn = targets.arguments(layer, T, N).items()
    inputs = {name: layer_backend.from_host(array.astype(dtype)) for name, array in drawn}
    results = targets.arrays(targets.forward(layer, inputs, lengths=lengths))
    if training:
        results += [*targets.arrays(targets.backward(layer, inputs)), *layer.grads.values()]
    return [layer_backend.to_host(array) for array in results]


def compare(
    cell: str, results: list[np.ndarray], case: tuple[Any, ...], training: bool, mode: str
) -> None:
    with xprnn.use_kernels("reference"):
        expected = run_layer(cell, "numpy", case, training, "float64")
    for k, (array, wanted) in enumerate(zip(results, expected, strict=True)):
        assert_close(array, wanted, "float32", f"array {k}", mode)


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("cell", "name", "mode"), CALLS)
def test_calls_match_the_reference(
    cell: str, name: str, mode: str, training: bool, device: Backend
) -> None:
    if mode == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    case = CASES[name]
    results = run_layer(cell, device.name, case, training, **TYPES[mode])
    compare(cell, results, case, training, mode)
    layers, directions = case[3].get("num_layers", 1), 1 + case[3].get("bidirectional", False)
    assert [grid[2] for _, grid in Function.launches] == [directions] * layers * (1 + training)


def test_kernels_that_no_gpu_has_run_must_be_forced(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    install(monkeypatch)
    plan.cache_clear()
    select_kernels("auto")
    layer = xprnn.GRU(3, 16, seed=0, backend=fake_cupy.name)
    first, *_, last = layer.explain((4, 2, 3)).splitlines()
    assert first.endswith(": pointwise")
    assert last == "  sequence: not yet run on a GPU; XPRNN_KERNELS=sequence forces it"
    select_kernels("sequence")
    assert layer.explain((4, 2, 3)).splitlines()[0].endswith(": sequence")
    select_kernels("auto")
    why = {row.check: row.reason for row in xprnn.verify(layer, (4, 2, 3)).absent}["sequence"]
    assert why == kernels.EXPERIMENTAL and not Function.launches


def test_the_backward_pass_runs_step_by_step_where_no_kernel_fits(
    device: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    monkeypatch.delitem(KERNELS, ("gru", "backward"))
    for case in CASES.values():
        compare("gru", run_layer("gru", device.name, case, True), case, True, "float32")
    assert {name.partition("<")[0] for name, _ in Function.launches} == {"xprnn::gru_forward"}
    text = xprnn.GRU(3, 5, backend=device.name).train().explain((4, 2, 3))
    assert text.endswith("sequence: backward: no sequence kernel for cell 'gru'")
    select_kernels("sequence")
    with pytest.raises(xprnn.KernelUnavailableError, match=r"sequence\W*: backward: no"):
        run_layer("gru", device.name, CASES["odd H"], True)


@pytest.fixture
def pairs(device: Backend, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The fake CuPy, with clusters of two as the only tilings of the GRU, for calls of any size."""
    monkeypatch.setattr(planner, "CLUSTER_MIN_BYTES", 0)
    for work, tiling in (
        ("forward", Tiling(2, 4, 2, 4, cluster=2)),
        ("training", Tiling(2, 4, 2, 4, cluster=2)),
        ("backward", Tiling(4, 8, 4, 2, cluster=2)),
    ):
        kernel = KERNELS["gru", work]._replace(tilings={"float32": (tiling,)})
        monkeypatch.setitem(KERNELS, ("gru", work), kernel)
    return device


@pytest.mark.frozen
def test_calls_in_clusters_match_the_reference(pairs: Backend) -> None:
    for name in ("two groups", "padded lengths"):
        compare(
            "gru", run_layer("gru", pairs.name, CASES[name], True), CASES[name], True, "float32"
        )
    assert {grid for _, grid in Function.launches} == {(2, 1, 2)}  # 17 units: 2 blocks; 6: too


@pytest.mark.frozen
def test_more_clusters_than_the_driver_allows_are_not_launched(
    pairs: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "active_clusters", lambda *launch: 1)
    run_layer("gru", pairs.name, CASES["odd H"], True)
    with pytest.raises(RuntimeError, match=r"4 blocks of 64 .* in clusters of 2 .* holds 2"):
        run_layer("gru", pairs.name, (2, 64, 2, {}, None), True)
    assert len(Function.launches) == 2


@pytest.mark.parametrize("layer", [xprnn.GRU, xprnn.LSTM, xprnn.RNN])
def test_verify_accepts_the_sequence_kernels(layer: Any, device: Backend) -> None:
    report = xprnn.verify(layer(3, 9, seed=0, backend=device.name), (4, 3, 3))
    assert report.ok, report
    assert [row.check for row in report.rows if row.implementation == "sequence"] == ["float32"]
    why = {row.check: row.reason for row in report.absent}["sequence"]
    assert why.startswith("training: float64: ")  # used by the gradcheck


@pytest.mark.parametrize(("N", "T"), [(0, 3), (2, 0), (0, 0)])
def test_a_call_without_rows_or_steps_runs(
    N: int, T: int, device: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels("sequence")
    results = run_layer("gru", device.name, (N, 5, T, {}, None), True)
    select_kernels("reference")
    for array, wanted in zip(
        results, run_layer("gru", "numpy", (N, 5, T, {}, None), True), strict=True
    ):
        np.testing.assert_array_equal(array, wanted)
    assert not Function.launches


def test_the_number_of_launches_does_not_depend_on_the_steps(device: Backend) -> None:
    """Unlike the launches of the loop they do not grow with T."""
    counts = []
    for T in (2, 12):
        LOG.clear()
        run_layer("gru", device.name, (2, 16, T, {}, None), False)
        counts.append(LOG.launches)
    assert counts[0] == counts[1]


UNSUPPORTED = [
    ({"multiProcessorCount": 1}, "forward: H=17: 2 blocks must run at once, .* holds 1"),
    ({"major": 7, "minor": 5}, "forward: compute capability 7.5: sequence kernels need 8.0"),
    ({"sharedMemPerBlockOptin": 30000}, "forward: H=17: .* 30,848 bytes .* has 30,000"),
]


@pytest.mark.parametrize(("properties", "reason"), UNSUPPORTED)
def test_unsupported_calls_are_reported_and_run_otherwise(
    properties: dict[str, int],
    reason: str,
    fake_cupy: Backend,
    monkeypatch: pytest.MonkeyPatch,
    select_kernels: SelectKernels,
) -> None:
    install(monkeypatch, **properties)
    monkeypatch.setitem(kernels.AUTOMATIC, "cuda", kernels.IMPLEMENTATIONS)
    select_kernels("auto")
    case = (2, 17, 3, {}, None)
    compare("gru", run_layer("gru", fake_cupy.name, case, False), case, False, "float32")
    assert not Function.launches
    layer = xprnn.GRU(3, 17, backend=fake_cupy.name)
    lines = layer.explain((3, 2, 3)).splitlines()
    assert lines[0].endswith("N=2: pointwise")
    assert re.search(f"sequence: {reason}$", lines[-1])
    select_kernels("sequence")
    with pytest.raises(xprnn.KernelUnavailableError, match=rf"sequence\W*: {reason}"):
        layer.explain((3, 2, 3))


def test_no_value_is_mistaken_for_the_sentinel(device: Backend) -> None:
    """A NaN with the sentinel's bits in h0 causes no deadlock and affects only its row."""
    layer = xprnn.GRU(3, 16, seed=0, backend=device.name)
    h0 = np.zeros((1, 3, 16), np.float32)
    h0.view(np.uint32)[0, 1] = 0xFFFFFFFF
    output, _ = layer(device.from_host(np.ones((4, 3, 3), np.float32)), device.from_host(h0))
    is_nan = np.isnan(device.to_host(output)).all(axis=(0, 2))
    assert is_nan.tolist() == [False, True, False]
    assert np.isfinite(device.to_host(output)[:, [0, 2]]).all()


@pytest.mark.parametrize("cell", ["gru", *OTHERS])
def test_a_kernel_that_times_out_is_reported(
    cell: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of two blocks is resident: the states of the other never arrive."""
    monkeypatch.setattr(Function, "run", Run(resident=1))
    monkeypatch.setattr(sequence, "MAX_POLLS", 50)
    layer = targets.make(cell, 3, 32, backend=device.name, dtype="float32").eval()
    x = device.from_host(np.ones((4, 2, 3), np.float32))
    with pytest.raises(
        xprnn.KernelStoppedError, match=f"kernel {cell}_forward timed out at step 1"
    ):
        device.to_host(layer(x)[0])
    monkeypatch.setattr(Function, "run", Run())
    assert np.isfinite(device.to_host(layer(x)[0])).all()


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "an old exchange buffer": ("SENTINEL", lambda original: 0),
    "the other direction's first states": (
        "_initial_rows",
        lambda original: lambda layout, reverse: original(layout, not reverse),
    ),
    "rows of another width": ("padded", lambda original: lambda H, mode: original(H + 8, mode)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_launcher_is_detected(
    name: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, fault = FAULTS[name]
    monkeypatch.setattr(sequence, what, fault(getattr(sequence, what)))
    monkeypatch.setattr(sequence, "MAX_POLLS", 200)
    case = CASES["padded lengths"]
    try:
        compare("gru", run_layer("gru", device.name, case, False), case, False, "float32")
    except (AssertionError, RuntimeError, IndexError, ValueError):
        return
    pytest.fail("the fault was not detected")
