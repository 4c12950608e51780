"""Stacks with a forced wavefront: one launch forward, or a reason why not."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.kernels.cuda.emulated.test_sequence_layers import TYPES, compare, run_layer
from tests.support import targets
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run
from tests.support.fake_cupy.sequence import Function, install
from tests.support.implementations import SelectKernels
from tests.support.tolerances import assert_close
from xprnn.backend import Backend
from xprnn.kernels.cuda import sequence

pytestmark = needs_compiler
LENGTHS = [0, 4, 1, 3, 1]
CASES = {  # N, H, T, options, lengths
    "three layers, H padded": (3, 18, 5, {"num_layers": 3}, None),
    "no bias": (2, 16, 3, {"num_layers": 2, "bias": False}, None),
    "lengths, batch first": (5, 20, 4, {"num_layers": 2, "batch_first": True}, LENGTHS),
    "dropout": (3, 16, 4, {"num_layers": 2, "dropout": 0.5}, None),
}
CASE = CASES["lengths, batch first"]
CALLS = [  # cell, case, type, whether it is recorded
    *[("gru", name, "float32", training) for name in CASES for training in (False, True)],
    ("gru", "lengths, batch first", "float16", True),
    ("lstm", "three layers, H padded", "float32", True),
    ("lstm", "no bias", "float16", False),
    ("rnn_tanh", "lengths, batch first", "tf32", True),
]


@pytest.fixture
def device(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Backend:
    """The fake CuPy on a current device, with a forced wavefront."""
    install(monkeypatch)
    select_kernels("wave")
    return fake_cupy


def layers_of_launches() -> list[tuple[str, int]]:
    """The kernel and the grid's z size of each launch."""
    return [
        (name.removeprefix("xprnn::").partition("<")[0], grid[2])
        for name, grid in Function.launches
    ]


@pytest.mark.frozen
@pytest.mark.parametrize(("cell", "name", "numbers", "training"), CALLS)
def test_calls_have_the_values_of_the_equations(
    cell: str, name: str, numbers: str, training: bool, device: Backend
) -> None:
    case = CASES[name]
    if training and "dropout" in case[3]:
        with pytest.raises(xprnn.KernelUnavailableError, match=r"=wave: dropout=0\.5 acts between"):
            run_layer(cell, device.name, case, training, **TYPES[numbers])
        return
    found = run_layer(cell, device.name, case, training, **TYPES[numbers])
    compare_on_numpy(cell, found, case, training, numbers)
    layers, family = case[3]["num_layers"], cell.partition("_")[0]
    back = [(f"{family}_backward", 1)] * (layers if training else 0)
    assert layers_of_launches() == [(f"{family}_forward", layers), *back]


@pytest.mark.frozen
@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.parametrize("backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_a_gpu_has_the_values_of_the_equations(
    cell: str, numbers: str, backend: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels("wave")
    for N, H, layers in ((3, 512, 2), (40, 200, 4), (5, 100, 8)):
        case = (N, H, 7, {"num_layers": layers}, [*range(1, 8), *[7] * N][:N])
        found = run_layer(cell, backend.name, case, True, **TYPES[numbers])
        with xprnn.use_kernels("reference"):
            expected = run_layer(cell, "numpy", case, True, "float64")
        sizes = {"steps": 7, "width": 2 * H, "layers": layers}
        for k, (array, wanted) in enumerate(zip(found, expected, strict=True)):
            assert_close(array, wanted, "float32", f"array {k}", numbers, **sizes)


def compare_on_numpy(cell: str, *rest: Any) -> None:
    """`compare`, without a forced wavefront for the reference."""
    with xprnn.use_kernels("reference"):
        compare(cell, *rest)


def test_one_layer_runs_as_by_sequence(device: Backend) -> None:
    case = (5, 20, 4, {"bidirectional": True}, LENGTHS)
    compare_on_numpy("gru", run_layer("gru", device.name, case, True), case, True, "float32")
    assert layers_of_launches() == [("gru_forward", 2), ("gru_backward", 2)]


REFUSED = [
    ({"bidirectional": True}, "a layer above would wait for the end of a reverse direction"),
    ({"num_layers": 9}, "9 layers: a wavefront has at most 8"),
    ({"hidden_size": 840}, "H=840: the kernels for float32 hold at most H=832 and as many inputs"),
    ({"hidden_size": 720, "num_layers": 3}, "H=720: 135 blocks must run at once, one for 16 units "
     "of each layer; this device holds 132"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_what_cannot_run_in_a_wavefront_is_refused(
    options: dict[str, Any], reason: str, device: Backend, select_kernels: SelectKernels
) -> None:
    options = {"hidden_size": 16, "num_layers": 2, **options}
    layer = xprnn.GRU(3, seed=0, backend=device.name, **options).eval()
    x = device.from_host(np.ones((2, 1, 3), np.float32))
    for call in (lambda: layer(x), lambda: layer.explain(x.shape)):
        with pytest.raises(xprnn.KernelUnavailableError, match=f"=wave: {re.escape(reason)}$"):
            call()
    assert not Function.launches
    select_kernels("sequence")
    assert f"  forward, layers in a wavefront: {reason}" in layer.explain(x.shape).splitlines()


@pytest.mark.parametrize("asked", ["wave", "sequence"])
def test_the_reason_of_no_sequence_kernel_names_what_was_requested(
    asked: str, device: Backend, select_kernels: SelectKernels
) -> None:
    """A layer, its arithmetic, and a stepper; the explanation of a supported one as well."""
    select_kernels(asked)
    wide = xprnn.GRU(3, 2000, seed=0, backend=device.name)
    double = xprnn.GRU(3, 4, seed=0, backend=device.name, dtype="float64")
    for call in (lambda: wide.explain((2, 1, 3)), lambda: double.explain((2, 1, 3)),
                 lambda: double.stepper(1)):  # fmt: skip
        with pytest.raises(xprnn.KernelUnavailableError, match=rf"^\w+\W+{asked}\W*: "):
            call()
    one = xprnn.GRU(3, 4, seed=0, backend=device.name)
    assert re.search(rf"reason: .*{asked}", one.explain((2, 1, 3)))


def test_segments_that_are_recomputed_are_refused(device: Backend) -> None:
    layer = xprnn.GRU(3, 4, seed=0, num_layers=2, recompute=2, backend=device.name).train()
    x = device.from_host(np.ones((3, 1, 3), np.float32))
    for call in (lambda: layer(x), lambda: layer.explain(x.shape)):
        with pytest.raises(xprnn.KernelUnavailableError, match="=wave: recomputed segments"):
            call()
    layer.eval()(x)
    assert layers_of_launches() == [("gru_forward", 2)]


def test_a_cpu_has_none(select_kernels: SelectKernels) -> None:
    pytest.importorskip("numba", reason="sequence kernels of a CPU need Numba")
    select_kernels("wave")
    layer = xprnn.GRU(3, 4, seed=0, num_layers=2).eval()
    with pytest.raises(xprnn.KernelUnavailableError, match="no kernel for it on backend 'numpy'"):
        layer(np.ones((2, 1, 3), np.float32))


def test_a_wave_has_to_be_asked_for(device: Backend, select_kernels: SelectKernels) -> None:
    layer = xprnn.GRU(3, 16, seed=0, num_layers=2, backend=device.name).eval()
    line = "  forward, layers in a wavefront: {}"
    wanted = line.format("one launch runs all steps of all layers")
    assert wanted in layer.explain((4, 2, 3)).splitlines()
    select_kernels("sequence")
    wanted = line.format("not yet run on a GPU; XPRNN_KERNELS=wave forces it")
    assert wanted in layer.explain((4, 2, 3)).splitlines()
    layer(device.from_host(np.ones((4, 2, 3), np.float32)))
    assert layers_of_launches() == [("gru_forward", 1)] * 2


@pytest.mark.parametrize(("N", "T"), [(0, 3), (2, 0)])
def test_a_call_without_rows_or_steps_runs(N: int, T: int, device: Backend) -> None:
    case = (N, 5, T, {"num_layers": 2}, None)
    compare_on_numpy("gru", run_layer("gru", device.name, case, True), case, True, "float32")
    assert not Function.launches


@pytest.mark.frozen
def test_a_wavefront_that_times_out_is_reported(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of the two blocks of each layer runs."""
    monkeypatch.setattr(Function, "run", Run(resident=1))
    monkeypatch.setattr(sequence, "MAX_POLLS", 50)
    layer = targets.make("gru", 3, 32, num_layers=2, backend=device.name, dtype="float32").eval()
    x = device.from_host(np.ones((4, 2, 3), np.float32))
    with pytest.raises(xprnn.KernelStoppedError, match="kernel gru_forward timed out at step 1"):
        device.to_host(layer(x)[0])


def first_layer_twice(genuine: Callable[..., Any]) -> Callable[..., Any]:
    return lambda every, slots: genuine([every[0]] * len(every), slots)


def nothing_below(genuine: Callable[..., Any]) -> Callable[..., Any]:
    """The upper layers' last argument, the exchange buffer of the layer below, is null."""
    return lambda every, slots: genuine([[*row[:-1], None] for row in every], slots)


def own_exchange(genuine: Callable[..., Any]) -> Callable[..., Any]:
    """Each upper layer polls its own exchange buffer."""
    return lambda every, slots: genuine(
        [every[0], *[[*row[:-1], row[-3]] for row in every[1:]]], slots
    )


@pytest.mark.frozen
@pytest.mark.parametrize("fault", [first_layer_twice, nothing_below, own_exchange])
def test_a_fault_in_the_launcher_is_seen(
    fault: Callable[[Any], Any], device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "grouped_arguments", fault(sequence.grouped_arguments))
    monkeypatch.setattr(sequence, "MAX_POLLS", 200)
    with pytest.raises((AssertionError, RuntimeError)):
        compare_on_numpy("gru", run_layer("gru", device.name, CASE, False), CASE, False, "float32")
