"""A forced wavefront: the forward pass of a stack in one launch, or an error with the reason."""

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
CALLS = [  # cell, case, dtype, whether it is recorded
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
    """The fake CuPy with a recent device and a forced wavefront."""
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
@pytest.mark.parametrize(("cell", "name", "mode", "training"), CALLS)
def test_calls_match_the_reference(
    cell: str, name: str, mode: str, training: bool, device: Backend
) -> None:
    case = CASES[name]
    if training and "dropout" in case[3]:
        with pytest.raises(
            xprnn.KernelUnavailableError, match=r"wave\W*: dropout=0\.5 acts between"
        ):
            run_layer(cell, device.name, case, training, **TYPES[mode])
        return
    results = run_layer(cell, device.name, case, training, **TYPES[mode])
    compare_on_numpy(cell, results, case, training, mode)
    layers, family = case[3]["num_layers"], cell.partition("_")[0]
    backward_launches = [(f"{family}_backward", 1)] * (layers if training else 0)
    assert layers_of_launches() == [(f"{family}_forward", layers), *backward_launches]


@pytest.mark.frozen
@pytest.mark.parametrize("mode", ["float32", "bfloat16"])
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
@pytest.mark.parametrize("backend", [pytest.param("cupy", marks=pytest.mark.gpu)], indirect=True)
def test_calls_on_a_gpu_match_the_reference(
    cell: str, mode: str, backend: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels("wave")
    for N, H, layers in ((3, 512, 2), (40, 200, 4), (5, 100, 8)):
        case = (N, H, 7, {"num_layers": layers}, [*range(1, 8), *[7] * N][:N])
        results = run_layer(cell, backend.name, case, True, **TYPES[mode])
        with xprnn.use_kernels("reference"):
            expected = run_layer(cell, "numpy", case, True, "float64")
        sizes = {"steps": 7, "width": 2 * H, "layers": layers}
        for k, (array, reference) in enumerate(zip(results, expected, strict=True)):
            assert_close(array, reference, "float32", f"array {k}", mode, **sizes)


def compare_on_numpy(cell: str, *rest: Any) -> None:
    """`compare`, with the plain code as the reference."""
    with xprnn.use_kernels("reference"):
        compare(cell, *rest)


def test_one_layer_runs_the_sequence_kernels(device: Backend) -> None:
    case = (5, 20, 4, {"bidirectional": True}, LENGTHS)
    compare_on_numpy("gru", run_layer("gru", device.name, case, True), case, True, "float32")
    assert layers_of_launches() == [("gru_forward", 2), ("gru_backward", 2)]


UNSUPPORTED = [
    ({"bidirectional": True}, "a layer above would wait for the end of a reverse direction"),
    ({"num_layers": 9}, "9 layers: a wavefront has at most 8"),
    ({"hidden_size": 840}, "H=840: the kernels for float32 hold at most H=832 and as many inputs"),
    ({"hidden_size": 720, "num_layers": 3}, "H=720: 135 blocks must run at once, one for 16 units "
     "of each layer; this device holds 132"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "reason"), UNSUPPORTED)
def test_unsupported_stacks_are_refused_with_the_reason(
    options: dict[str, Any], reason: str, device: Backend, select_kernels: SelectKernels
) -> None:
    options = {"hidden_size": 16, "num_layers": 2, **options}
    layer = xprnn.GRU(3, seed=0, backend=device.name, **options).eval()
    x = device.from_host(np.ones((2, 1, 3), np.float32))
    for call in (lambda: layer(x), lambda: layer.explain(x.shape)):
        with pytest.raises(xprnn.KernelUnavailableError, match=rf"wave\W*: {re.escape(reason)}$"):
            call()
    assert not Function.launches
    select_kernels("sequence")
    assert f"  forward, layers in a wavefront: {reason}" in layer.explain(x.shape).splitlines()


@pytest.mark.parametrize("requested", ["wave", "sequence"])
def test_the_error_names_the_requested_kernels(
    requested: str, device: Backend, select_kernels: SelectKernels
) -> None:
    """For a layer, its precision policy and a stepper, and in a supported layer's explanation."""
    select_kernels(requested)
    wide = xprnn.GRU(3, 2000, seed=0, backend=device.name)
    double = xprnn.GRU(3, 4, seed=0, backend=device.name, dtype="float64")
    for call in (lambda: wide.explain((2, 1, 3)), lambda: double.explain((2, 1, 3)),
                 lambda: double.stepper(1)):  # fmt: skip
        with pytest.raises(xprnn.KernelUnavailableError, match=rf"^\w+\W+{requested}\W*: "):
            call()
    one = xprnn.GRU(3, 4, seed=0, backend=device.name)
    assert re.search(rf"reason: .*{requested}", one.explain((2, 1, 3)))


def test_checkpointed_layers_are_refused(device: Backend) -> None:
    layer = xprnn.GRU(3, 4, seed=0, num_layers=2, recompute=2, backend=device.name).train()
    x = device.from_host(np.ones((3, 1, 3), np.float32))
    for call in (lambda: layer(x), lambda: layer.explain(x.shape)):
        with pytest.raises(xprnn.KernelUnavailableError, match=r"wave\W*: recomputed segments"):
            call()
    layer.eval()(x)
    assert layers_of_launches() == [("gru_forward", 2)]


def test_cpus_have_no_wavefront(select_kernels: SelectKernels) -> None:
    pytest.importorskip("numba", reason="sequence kernels of a CPU need Numba")
    select_kernels("wave")
    layer = xprnn.GRU(3, 4, seed=0, num_layers=2).eval()
    with pytest.raises(xprnn.KernelUnavailableError, match="no kernel for it on backend 'numpy'"):
        layer(np.ones((2, 1, 3), np.float32))


def test_a_wavefront_must_be_forced(device: Backend, select_kernels: SelectKernels) -> None:
    layer = xprnn.GRU(3, 16, seed=0, num_layers=2, backend=device.name).eval()
    line = "  forward, layers in a wavefront: {}"
    selected = line.format("one launch runs all steps of all layers")
    assert selected in layer.explain((4, 2, 3)).splitlines()
    select_kernels("sequence")
    not_selected = line.format("not yet run on a GPU; XPRNN_KERNELS=wave forces it")
    assert not_selected in layer.explain((4, 2, 3)).splitlines()
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
    """Only one of the two blocks of each layer is resident."""
    monkeypatch.setattr(Function, "run", Run(resident=1))
    monkeypatch.setattr(sequence, "MAX_POLLS", 50)
    layer = targets.make("gru", 3, 32, num_layers=2, backend=device.name, dtype="float32").eval()
    x = device.from_host(np.ones((4, 2, 3), np.float32))
    with pytest.raises(xprnn.KernelStoppedError, match="kernel gru_forward timed out at step 1"):
        device.to_host(layer(x)[0])


def first_layer_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    """Each layer has the arguments of the first."""
    return lambda layers, slots: original([layers[0]] * len(layers), slots)


def no_lower_exchange(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last argument of upper layers, the exchange buffer of the layer below, is null."""
    return lambda layers, slots: original([[*layer[:-1], None] for layer in layers], slots)


def own_exchange(original: Callable[..., Any]) -> Callable[..., Any]:
    """Each upper layer polls its own exchange buffer, the third argument from the end."""
    return lambda layers, slots: original(
        [layers[0], *[[*layer[:-1], layer[-3]] for layer in layers[1:]]], slots
    )


@pytest.mark.frozen
@pytest.mark.parametrize("fault", [first_layer_twice, no_lower_exchange, own_exchange])
def test_a_fault_in_the_launcher_is_detected(
    fault: Callable[[Any], Any], device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "grouped_arguments", fault(sequence.grouped_arguments))
    monkeypatch.setattr(sequence, "MAX_POLLS", 200)
    with pytest.raises((AssertionError, RuntimeError)):
        compare_on_numpy("gru", run_layer("gru", device.name, CASE, False), CASE, False, "float32")
