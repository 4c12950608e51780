"""Arrays of other libraries that live on the same CUDA device are taken as they are, uncopied."""

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
    BorrowingBackend,
    Lent,
    Unwilling,
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
    """The backend "cupy", on the stand-in that borrows, with the equations that NumPy runs."""
    select_kernels("reference")
    monkeypatch.setitem(backend_module.BACKENDS, "cupy", BorrowingBackend)
    backend_module._opened.clear()
    yield xprnn.get_backend("cupy")
    backend_module._opened.clear()


def lent(given: dict[str, Any], kind: int = CUDA, number: int = 0) -> dict[str, Any]:
    return {name: Lent(array, kind, number) for name, array in given.items()}


def on_host(backend: Backend, results: Any) -> list[np.ndarray]:
    return [backend.to_host(array) for array in arrays(results)]


# -- taken


@pytest.mark.parametrize("kind", [CUDA, MANAGED])
@pytest.mark.parametrize("name", SUBJECTS)
def test_they_give_the_same_bits(name: str, kind: int, cupy: Backend) -> None:
    given = arguments(make(name))
    expected = on_host(cupy, run(make(name, backend="cupy"), moved(cupy, given)))
    found = run(make(name, backend="cupy"), lent(given, kind))
    assert_same(on_host(cupy, found), expected)
    assert_same(expected, run(make(name), given), "the stand-in")


def taken(subject: Any, given: dict[str, Any]) -> list[int]:
    """The sizes of all arrays that a call and its undoing allocate."""
    for _ in range(3):  # until its own memory is as large as it gets
        LOG.clear()
        run(subject, given)
    return list(LOG.memory)


def check_nothing_is_copied(name: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    given = arguments(subject)
    assert taken(subject, lent(given)) == taken(subject, moved(cupy, given))


@pytest.mark.parametrize("name", SUBJECTS)
def test_nothing_is_copied(name: str, cupy: Backend) -> None:
    check_nothing_is_copied(name, cupy)


def test_a_copy_is_found(cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    borrow = cupy.from_dlpack
    monkeypatch.setattr(
        cupy, "from_dlpack", lambda array: array if cupy.owns(array) else borrow(array).copy()
    )
    with pytest.raises(AssertionError):
        check_nothing_is_copied("gru", cupy)


def test_weights_of_another_library(cupy: Backend) -> None:
    """A function computes where its weights are, a cell is built there."""
    given = arguments(make("gru_function"))
    subject = make("gru_function")
    expected = run(subject, given)
    weights = [np.array(weight) for weight in subject.weights]
    ours = make("gru_function", backend="cupy")
    ours.weights = [Lent(weight) for weight in weights]
    assert_same(on_host(cupy, run(ours, lent(given))), expected)

    one = arguments(make("gru_cell"))
    cells = [xprnn.GRUCell.from_weights(*given).train() for given in (weights, map(Lent, weights))]
    assert cells[1].backend is cupy
    assert_same(on_host(cupy, run(cells[1], lent(one))), run(cells[0], one))


def test_parameters_by_name(cupy: Backend) -> None:
    layer = xprnn.GRU(3, 5, backend="cupy", seed=0)
    values = normal(3, 15, dtype="float32")
    layer.parameters["bias_ih_l0"] = Lent(values)
    assert_same(cupy.to_host(layer.parameters["bias_ih_l0"]), values)
    values[...] = 0.0  # the layer has its own
    assert cupy.to_host(layer.parameters["bias_ih_l0"]).all()


def test_readout_and_losses(cupy: Backend) -> None:
    x, dy, targets = normal(0, 4, 3), normal(1, 4, 2), np.array([1, 0, 1, 1])
    here, there = (
        xprnn.Linear(3, 2, dtype="float64", backend=name, seed=0).train()
        for name in ("numpy", "cupy")
    )
    assert_same(cupy.to_host(there(Lent(x))), here(x))
    assert_same(cupy.to_host(there.backward(Lent(dy))), here.backward(dy))
    assert_same(cupy.to_host(there.grads.flat), here.grads.flat)
    for given in (Lent(targets), cupy.from_host(targets), targets, targets.tolist()):
        found = xprnn.softmax_cross_entropy(Lent(dy), given)
        expected = xprnn.softmax_cross_entropy(dy, targets)
        assert_same(on_host(cupy, found), [*map(np.asarray, expected)])
    found, expected = xprnn.mse_loss(Lent(x), Lent(2 * x)), xprnn.mse_loss(x, 2 * x)
    assert_same(on_host(cupy, found), [*map(np.asarray, expected)])


def test_feature_first(cupy: Backend) -> None:
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    weights = {name: normal(k, *shape) for k, (name, shape) in enumerate(shapes.items())}
    x, a0, da, dy = normal(5, 3, 4, 6), normal(6, 5, 4), normal(7, 5, 4, 6), normal(8, 2, 4, 6)

    def both_ways(lend: Callable[[np.ndarray], Any]) -> list[Any]:
        moved = {name: lend(weight) for name, weight in weights.items()}
        a, y, caches = feature_first.rnn_forward(lend(x), lend(a0), moved)
        gradients = feature_first.rnn_backward(lend(da), caches, lend(dy))
        a1, y1, cache = feature_first.rnn_cell_forward(lend(x[:, :, 0]), lend(a0), moved)
        ones = feature_first.rnn_cell_backward(lend(da[:, :, 0]), cache, lend(dy[:, :, 0]))
        return [a, y, *gradients.values(), a1, y1, *ones.values()]

    assert_same(on_host(cupy, both_ways(Lent)), both_ways(np.array))


def test_they_are_borrowed_on_the_current_stream(cupy: Backend) -> None:
    x = Lent(normal(0, 4, 3, 3))
    layer = make("gru", backend="cupy")
    layer(x)
    with cupy.xp.cuda.Stream() as stream:
        layer(x)
    assert x.streams == [1, stream.ptr]


# -- refused


def refuses(subject: Any, given: dict[str, Any], argument: str, value: Any, *texts: str) -> None:
    """Fail unless `value` for `argument` is a TypeError with these texts, and does no harm."""
    expected = run(subject, given)
    forward(subject, given)
    before = state_of(subject)
    call = backward if argument.startswith("d") else forward
    with pytest.raises(TypeError) as caught:
        call(subject, {**given, argument: value})
    for text in (argument, *texts):
        assert text in str(caught.value), caught.value
    backend = module_of(subject).backend
    moved = [on_host(backend, state[:-1]) for state in (state_of(subject), before)]
    assert_same(*moved)
    backward(subject, given)
    assert_same(on_host(backend, run(subject, given)), on_host(backend, expected))


PLACES = {
    "host": (CPU, 0, "on the CPU"),
    "another device": (CUDA, 1, "on CUDA device 1"),
    "page-locked": (3, 0, "on the CPU, page-locked"),
    "another kind": (8, 0, "on DLPack device (8, 0)"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["lstm", "lstm_cell", "lstm_function"])
def test_arrays_that_are_elsewhere(name: str, place: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    host = arguments(subject)
    kind, number, where = PLACES[place]
    for argument, array in host.items():
        advice = f"xprnn.asarray({argument}, backend='cupy:0', dtype='float64')"
        value = Lent(array, kind, number)
        refuses(subject, moved(cupy, host), argument, value, f"got Lent {where}", advice)


@pytest.mark.parametrize("name", ["gru", "gru_cell", "gru_function"])
def test_numpy_arrays(name: str, cupy: Backend) -> None:
    subject = make(name, backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        advice = f"on backend 'numpy'; convert it with xprnn.asarray({argument}, backend='cupy:0'"
        refuses(subject, moved(cupy, host), argument, array, "on backend 'cupy:0', got", advice)


def test_numpy_layers_borrow_nothing(cupy: Backend) -> None:
    host = arguments(make("gru"))
    for place, where in (((CPU, 0), "the CPU"), ((CUDA, 0), "CUDA device 0")):
        for argument, array in host.items():
            advice = f"xprnn.asarray({argument}, backend='numpy'"
            value = Lent(array, *place)
            refuses(make("gru"), host, argument, value, f"got Lent on {where}", advice)


REFUSALS = {
    "a tensor with a gradient": (BufferError("requires grad"), True, "pass it with .detach()"),
    "conjugated": (BufferError("a conjugate bit"), False, "a conjugate bit"),
    "bfloat16": (NotImplementedError("install ml_dtypes"), False, "install ml_dtypes"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_arrays_that_are_not_lent(refusal: str, cupy: Backend) -> None:
    error, requires_grad, text = REFUSALS[refusal]
    subject = make("gru", backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        value = Unwilling(array, error, requires_grad)
        refuses(subject, moved(cupy, host), argument, value, "export to CuPy, got Unwilling", text)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "bool", "complex128"])
def test_other_dtypes(dtype: str, cupy: Backend) -> None:
    subject = make("gru", backend="cupy")
    host = arguments(subject)
    for argument, array in host.items():
        texts = f"expected dtype float64, got {dtype}", f"xprnn.asarray({argument}, backend='cupy:"
        refuses(subject, moved(cupy, host), argument, Lent(array.astype(dtype)), *texts)


def test_bfloat16(cupy: Backend) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    subject = make("gru", backend="cupy", dtype="float32")
    host = arguments(subject)
    value = Lent(host["x"].astype(ml_dtypes.bfloat16))
    refuses(subject, moved(cupy, host), "x", value, "expected dtype float32, got bfloat16")


def test_other_shapes(cupy: Backend) -> None:
    layer = make("gru", backend="cupy")
    for shape in ((4, 3, 4), (3,), (1, 4, 3, 3)):
        with pytest.raises(ValueError, match=rf"x: expected shape .* got {re.escape(str(shape))}"):
            layer(Lent(np.zeros(shape)))


def test_lengths_stay_on_the_host(cupy: Backend) -> None:
    layer = make("gru", backend="cupy")
    x, lengths = Lent(normal(0, 4, 3, 3)), np.array([4, 2, 1])
    for value, where in (
        (Lent(lengths), "Lent on CUDA device 0"),
        (cupy.from_host(lengths), "an array on backend 'cupy:0'"),
    ):
        with pytest.raises(TypeError, match=rf"lengths: expected .*{where}.*xprnn.to_numpy\("):
            layer(x, lengths=value)


def test_leaders_that_are_elsewhere(cupy: Backend) -> None:
    weights = [Lent(normal(0, 15, 3), CPU), Lent(normal(1, 15, 5), CPU)]
    for name, call in {
        "weight_ih": lambda: xprnn.functional.gru(Lent(normal(0, 4, 3, 3)), None, *weights),
        "logits": lambda: xprnn.softmax_cross_entropy(Lent(normal(0, 4, 3), CPU), [0] * 4),
        "prediction": lambda: xprnn.mse_loss(Lent(normal(0, 4), CPU), normal(0, 4)),
    }.items():
        advice = rf"xprnn\.asarray\({name}\)"
        with pytest.raises(TypeError, match=f"{name}: expected .*got Lent on the CPU; {advice}"):
            call()
    with pytest.raises(TypeError, match=r"targets: expected 4 integers, got Lent on CUDA device 1"):
        targets = Lent(np.zeros(4, int), CUDA, 1)
        xprnn.softmax_cross_entropy(cupy.from_host(normal(0, 4, 3)), targets)
    with pytest.raises(ValueError, match=r"targets: expected \(4,\) integers, got float64 \(4,\)"):
        xprnn.softmax_cross_entropy(cupy.from_host(normal(0, 4, 3)), Lent(np.zeros(4)))


# -- moved


def test_asarray_lends_what_is_there(cupy: Backend) -> None:
    tensor = Lent(normal(0, 3, 4))
    LOG.clear()
    same = xprnn.asarray(tensor, backend="cupy")
    assert same._inner is tensor.memory and not LOG.memory
    single = xprnn.asarray(tensor, backend="cupy", dtype="float32")
    assert_same(cupy.to_host(single), tensor.memory.astype("float32"))
    tensor.memory[...] = 0.0
    assert cupy.to_host(single).all()
