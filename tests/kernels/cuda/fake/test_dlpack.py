"""Arrays of other libraries on the same CUDA device are used without copying."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy.cuda import LOG
from tests.support.fake_cupy.foreign_arrays import (
    CPU,
    CUDA,
    MANAGED,
    DlpackBackend,
    ForeignArray,
    UnexportableArray,
)
from tests.support.implementations import SelectKernels
from tests.support.on_device import backward, forward, run
from tests.support.operations import moved
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    make,
    module_of,
    normal,
    state_of,
)
from xprnn import feature_first
from xprnn.backend import Backend
from xprnn.backend import registry as backend_module

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels) -> Iterator[Backend]:
    """The backend "cupy", with a fake CuPy that imports arrays by DLPack, and the plain code."""
    select_kernels("reference")
    monkeypatch.setitem(backend_module.BACKENDS, "cupy", DlpackBackend)
    backend_module._opened.clear()
    yield xprnn.get_backend("cupy")
    backend_module._opened.clear()


def foreign(inputs: dict[str, Any], kind: int = CUDA, number: int = 0) -> dict[str, Any]:
    return {name: ForeignArray(array, kind, number) for name, array in inputs.items()}


def on_host(backend: Backend, results: Any) -> list[np.ndarray]:
    return [backend.to_host(array) for array in arrays(results)]


# -- accepted


@pytest.mark.parametrize("kind", [CUDA, MANAGED])
@pytest.mark.parametrize("name", SUBJECTS)
def test_foreign_arrays_give_the_same_bits(name: str, kind: int, cupy: Backend) -> None:
    inputs = arguments(make(name))
    expected = on_host(cupy, run(make(name, backend="cupy"), moved(cupy, inputs)))
    actual = run(make(name, backend="cupy"), foreign(inputs, kind))
    assert_same(on_host(cupy, actual), expected)
    assert_same(expected, run(make(name), inputs), "the fake CuPy")


def allocations(subject: Any, inputs: dict[str, Any]) -> list[int]:
    """The sizes of all arrays that a call and its backward allocate."""
    for _ in range(3):  # until its workspace has its final size
        LOG.clear()
        run(subject, inputs)
    return list(LOG.memory)


def check_nothing_is_copied(name: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    inputs = arguments(subject)
    assert allocations(subject, foreign(inputs)) == allocations(subject, moved(cupy, inputs))


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_is_copied(name: str, cupy: Backend) -> None:
    check_nothing_is_copied(name, cupy)


def test_a_copy_is_detected(cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    from_dlpack = cupy.from_dlpack
    monkeypatch.setattr(
        cupy, "from_dlpack", lambda array: array if cupy.owns(array) else from_dlpack(array).copy()
    )
    with pytest.raises(AssertionError):
        check_nothing_is_copied("gru", cupy)


def test_weights_of_another_library(cupy: Backend) -> None:
    """A function runs on the device of its weights, and a cell is built on it."""
    inputs = arguments(make("gru_function"))
    subject = make("gru_function")
    expected = run(subject, inputs)
    weights = [np.array(weight) for weight in subject.weights]
    ours = make("gru_function", backend="cupy")
    ours.weights = [ForeignArray(weight) for weight in weights]
    assert_same(on_host(cupy, run(ours, foreign(inputs))), expected)

    one = arguments(make("gru_cell"))
    cells = [
        xprnn.GRUCell.from_weights(*inputs).train()
        for inputs in (weights, map(ForeignArray, weights))
    ]
    assert cells[1].backend is cupy
    assert_same(on_host(cupy, run(cells[1], foreign(one))), run(cells[0], one))


def test_parameters_by_name(cupy: Backend) -> None:
    layer = xprnn.GRU(3, 5, backend="cupy", seed=0)
    values = normal(3, 15, dtype="float32")
    layer.parameters["bias_ih_l0"] = ForeignArray(values)
    assert_same(cupy.to_host(layer.parameters["bias_ih_l0"]), values)
    values[...] = 0.0  # the layer has a copy
    assert cupy.to_host(layer.parameters["bias_ih_l0"]).all()


def test_readout_and_losses(cupy: Backend) -> None:
    x, dy, targets = normal(0, 4, 3), normal(1, 4, 2), np.array([1, 0, 1, 1])
    on_numpy, on_cupy = (
        xprnn.Linear(3, 2, dtype="float64", backend=name, seed=0).train()
        for name in ("numpy", "cupy")
    )
    assert_same(cupy.to_host(on_cupy(ForeignArray(x))), on_numpy(x))
    assert_same(cupy.to_host(on_cupy.backward(ForeignArray(dy))), on_numpy.backward(dy))
    assert_same(cupy.to_host(on_cupy.grads.flat), on_numpy.grads.flat)
    for inputs in (ForeignArray(targets), cupy.from_host(targets), targets, targets.tolist()):
        actual = xprnn.softmax_cross_entropy(ForeignArray(dy), inputs)
        expected = xprnn.softmax_cross_entropy(dy, targets)
        assert_same(on_host(cupy, actual), [*map(np.asarray, expected)])
    actual, expected = (
        xprnn.mse_loss(ForeignArray(x), ForeignArray(2 * x)),
        xprnn.mse_loss(x, 2 * x),
    )
    assert_same(on_host(cupy, actual), [*map(np.asarray, expected)])


def test_feature_first(cupy: Backend) -> None:
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    weights = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    x, a0, da, dy = normal(5, 3, 4, 6), normal(6, 5, 4), normal(7, 5, 4, 6), normal(8, 2, 4, 6)

    def both_ways(convert: Callable[[np.ndarray], Any]) -> list[Any]:
        moved = {name: convert(weight) for name, weight in weights.items()}
        a, y, caches = feature_first.rnn_forward(convert(x), convert(a0), moved)
        gradients = feature_first.rnn_backward(convert(da), caches, convert(dy))
        a1, y1, cache = feature_first.rnn_cell_forward(convert(x[:, :, 0]), convert(a0), moved)
        ones = feature_first.rnn_cell_backward(convert(da[:, :, 0]), cache, convert(dy[:, :, 0]))
        return [a, y, *gradients.values(), a1, y1, *ones.values()]

    assert_same(on_host(cupy, both_ways(ForeignArray)), both_ways(np.array))


def test_arrays_are_imported_on_the_current_stream(cupy: Backend) -> None:
    x = ForeignArray(normal(0, 4, 3, 3))
    layer = make("gru", backend="cupy")
    layer(x)
    with cupy.xp.cuda.Stream() as stream:
        layer(x)
    assert x.streams == [1, stream.ptr]


# -- refused


def check_refused(
    subject: Any, inputs: dict[str, Any], argument: str, value: Any, *texts: str
) -> None:
    """Fail unless `value` for `argument` is a TypeError with these texts that changes nothing."""
    expected = run(subject, inputs)
    forward(subject, inputs)
    before = state_of(subject)
    call = backward if argument.startswith("d") else forward
    with pytest.raises(TypeError) as caught:
        call(subject, {**inputs, argument: value})
    for text in (argument, *texts):
        assert text in str(caught.value), caught.value
    backend = module_of(subject).backend
    moved = [on_host(backend, state[:-1]) for state in (state_of(subject), before)]
    assert_same(*moved)
    backward(subject, inputs)
    assert_same(on_host(backend, run(subject, inputs)), on_host(backend, expected))


LOCATIONS = {
    "host": (CPU, 0, "on the CPU"),
    "another device": (CUDA, 1, "on CUDA device 1"),
    "page-locked": (3, 0, "on the CPU, page-locked"),
    "another kind": (8, 0, "on DLPack device (8, 0)"),
}


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("name", ["lstm", "lstm_cell", "lstm_function"])
def test_arrays_on_other_devices_are_refused(name: str, location: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    host = arguments(subject)
    kind, number, where = LOCATIONS[location]
    for argument, array in host.items():
        advice = f"xprnn.asarray({argument}, backend='cupy:0', dtype='float64')"
        value = ForeignArray(array, kind, number)
        check_refused(
            subject, moved(cupy, host), argument, value, f"got ForeignArray {where}", advice
        )


@pytest.mark.parametrize("name", ["gru", "gru_cell", "gru_function"])
def test_numpy_arrays_are_refused(name: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        advice = f"on backend 'numpy'; convert it with xprnn.asarray({argument}, backend='cupy:0'"
        check_refused(
            subject, moved(cupy, host), argument, array, "on backend 'cupy:0', got", advice
        )


def test_numpy_layers_import_no_arrays(cupy: Backend) -> None:
    host = arguments(make("gru"))
    for location, where in (((CPU, 0), "the CPU"), ((CUDA, 0), "CUDA device 0")):
        for argument, array in host.items():
            advice = f"xprnn.asarray({argument}, backend='numpy'"
            value = ForeignArray(array, *location)
            check_refused(
                make("gru"), host, argument, value, f"got ForeignArray on {where}", advice
            )


EXPORT_ERRORS = {
    "a tensor with a gradient": (BufferError("requires grad"), True, "pass it with .detach()"),
    "conjugated": (BufferError("a conjugate bit"), False, "a conjugate bit"),
    "bfloat16": (NotImplementedError("install ml_dtypes"), False, "install ml_dtypes"),
}


@pytest.mark.parametrize("kind", EXPORT_ERRORS)
def test_arrays_that_cannot_be_exported_are_refused(kind: str, cupy: Backend) -> None:
    error, requires_grad, text = EXPORT_ERRORS[kind]
    subject = make("gru", backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        value = UnexportableArray(array, error, requires_grad)
        check_refused(
            subject,
            moved(cupy, host),
            argument,
            value,
            "export to CuPy, got UnexportableArray",
            text,
        )


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool", "complex128"])
def test_other_dtypes_are_refused(dtype: str, cupy: Backend) -> None:
    subject = make("gru", backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        texts = f"expected dtype float64, got {dtype}", f"xprnn.asarray({argument}, backend='cupy:"
        check_refused(
            subject, moved(cupy, host), argument, ForeignArray(array.astype(dtype)), *texts
        )


def test_bfloat16_is_refused(cupy: Backend) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    subject = make("gru", backend="cupy", dtype="float32")
    host = arguments(subject)
    value = ForeignArray(host["x"].astype(ml_dtypes.bfloat16))
    check_refused(subject, moved(cupy, host), "x", value, "expected dtype float32, got bfloat16")


def test_other_shapes_are_refused(cupy: Backend) -> None:
    layer = make("gru", backend="cupy")
    for shape in ((4, 3, 4), (3,), (1, 4, 3, 3)):
        with pytest.raises(ValueError, match=rf"x: expected shape .* got {re.escape(str(shape))}"):
            layer(ForeignArray(np.zeros(shape)))


def test_lengths_stay_on_the_host(cupy: Backend) -> None:
    layer = make("gru", backend="cupy")
    x, lengths = ForeignArray(normal(0, 4, 3, 3)), np.array([4, 2, 1])
    for value, where in (
        (ForeignArray(lengths), "ForeignArray on CUDA device 0"),
        (cupy.from_host(lengths), "an array on backend 'cupy:0'"),
    ):
        with pytest.raises(TypeError, match=rf"lengths: expected .*{where}.*xprnn.to_numpy\("):
            layer(x, lengths=value)


def test_reference_arrays_on_other_devices_are_refused(cupy: Backend) -> None:
    weights = [ForeignArray(normal(0, 15, 3), CPU), ForeignArray(normal(1, 15, 5), CPU)]
    for name, call in {
        "weight_ih": lambda: xprnn.functional.gru(ForeignArray(normal(0, 4, 3, 3)), None, *weights),
        "logits": lambda: xprnn.softmax_cross_entropy(ForeignArray(normal(0, 4, 3), CPU), [0] * 4),
        "prediction": lambda: xprnn.mse_loss(ForeignArray(normal(0, 4), CPU), normal(0, 4)),
    }.items():
        advice = rf"xprnn\.asarray\({name}\)"
        with pytest.raises(
            TypeError, match=f"{name}: expected .*got ForeignArray on the CPU; {advice}"
        ):
            call()
    with pytest.raises(
        TypeError, match=r"targets: expected 4 integers, got ForeignArray on CUDA device 1"
    ):
        targets = ForeignArray(np.zeros(4, int), CUDA, 1)
        xprnn.softmax_cross_entropy(cupy.from_host(normal(0, 4, 3)), targets)
    with pytest.raises(ValueError, match=r"targets: expected \(4,\) integers, got float64 \(4,\)"):
        xprnn.softmax_cross_entropy(cupy.from_host(normal(0, 4, 3)), ForeignArray(np.zeros(4)))


# -- converted


def test_asarray_imports_without_copying(cupy: Backend) -> None:
    tensor = ForeignArray(normal(0, 3, 4))
    LOG.clear()
    same = xprnn.asarray(tensor, backend="cupy")
    assert same._inner is tensor.memory and not LOG.memory
    single = xprnn.asarray(tensor, backend="cupy", dtype="float32")
    assert_same(cupy.to_host(single), tensor.memory.astype("float32"))
    tensor.memory[...] = 0.0
    assert cupy.to_host(single).all()
