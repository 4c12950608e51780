"""Embedding, compared with torch and with float64 differences by value."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn import Embedding
from xprnn.backend import Backend
from xprnn.nn import serialization as io
from xprnn.optim import SGD, Adam, AdamW

SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 5), (300,), (0,), (3, 0)]


@pytest.fixture(params=["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, fake_cupy: Backend) -> Backend:
    """The fake CuPy, which raises where the host would wait for a value, and CuPy on a GPU."""
    try:
        return xprnn.get_backend(request.param)
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))


def make(rows: int = 6, width: int = 3, **options: Any) -> Embedding:
    return Embedding(rows, width, **{"dtype": "float64", "seed": 1, **options}).train()


def close(actual: Any, wanted: Any, tolerance: float = 1e-13) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max(initial=0.0) <= tolerance * np.abs(wanted).max(initial=1.0)


@pytest.mark.parametrize("padding", [None, 0, 4, -1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_equals_torch(shape: tuple[int, ...], padding: int | None) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    ours = make(padding_idx=padding)
    theirs = torch.nn.Embedding(6, 3, padding_idx=padding, dtype=torch.float64)
    assert ours.options["padding_idx"] == theirs.padding_idx
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.state_dict().items()})
    for _ in range(2):  # gradients accumulate
        indices, dy = rng.integers(0, 6, shape), rng.standard_normal((*shape, 3))
        y = theirs(torch.tensor(indices))
        y.backward(torch.tensor(dy))
        close(ours(indices), y.detach())
        assert ours.backward(dy) is None
        close(ours.grads["weight"], theirs.weight.grad)


@pytest.mark.parametrize("shape", [(7,), (3, 4)], ids=str)
def test_the_gradient_equals_finite_differences(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    embedding = make()
    indices, u = rng.integers(0, 6, shape), rng.standard_normal((*shape, 3))
    weight, direction = np.array(embedding.parameters["weight"]), rng.standard_normal((6, 3))
    embedding(indices)
    embedding.backward(u)

    def loss(step: float) -> float:
        embedding.parameters["weight"] = weight + step * direction
        return float((u * embedding(indices)).sum())

    numeric = (loss(1e-3) - loss(-1e-3)) / 2e-3  # exact but for rounding: it is linear
    analytic = float((embedding.grads["weight"] * direction).sum())
    assert numeric == pytest.approx(analytic, rel=1e-10)


def test_initial_values_follow_torch() -> None:
    """Normal with mean 0 and variance 1; the padding row is zero."""
    embedding = Embedding(400, 100, padding_idx=7, seed=3)
    weight = np.asarray(embedding.parameters["weight"], np.float64)
    assert not weight[7].any()
    drawn = np.delete(weight, 7, axis=0).ravel()
    moments = [(drawn**k).mean() for k in (1, 2, 3, 4)]
    # 39,900 draws: standard errors 0.005, 0.007, 0.019 and 0.049
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.2)
    same = Embedding(400, 100, padding_idx=7, seed=3, dtype="float64")
    np.testing.assert_array_equal(same.parameters["weight"].astype(np.float32), weight)


def test_many_gradients_of_one_row_are_summed_accurately() -> None:
    """In float32, where sequential summation loses three of seven digits."""
    embedding = make(dtype="float32")
    rows = np.random.default_rng(0).random((20_000, 3), dtype=np.float32)
    indices = np.zeros(20_000, int)
    indices[::7] = 5
    embedding(indices)
    embedding.backward(rows)
    for row in (0, 5):
        wanted = rows[indices == row].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(embedding.grads["weight"][row], wanted, rtol=5e-7)


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_device_gives_the_same_bits(
    shape: tuple[int, ...], padding: int | None, device: Backend
) -> None:
    rng = np.random.default_rng(2)
    indices, dy = rng.integers(0, 6, shape), rng.standard_normal((*shape, 3))
    on_host = make(padding_idx=padding)
    y = on_host(indices)
    on_host.backward(dy)
    for moved in (indices, device.from_host(indices), device.from_host(indices.astype("uint8"))):
        on_device = make(padding_idx=padding, backend=device.name)
        np.testing.assert_array_equal(device.to_host(on_device(moved)), y)
        on_device.backward(device.from_host(dy))
        np.testing.assert_array_equal(device.to_host(on_device.grads.flat), on_host.grads.flat)


def test_out_of_range_indices_on_a_device_give_nan(device: Backend) -> None:
    on_device, on_host = make(backend=device.name), make()
    dy = np.random.default_rng(3).standard_normal((5, 3))
    y = device.to_host(on_device(device.from_host(np.array([2, 6, -1, 2, 0]))))
    assert np.isnan(y).all(axis=1).tolist() == [False, True, True, False, False]
    np.testing.assert_array_equal(y[[0, 3, 4]], on_host([2, 2, 0]))
    on_device.backward(device.from_host(dy))
    on_host.backward(dy[[0, 3, 4]])
    np.testing.assert_array_equal(device.to_host(on_device.grads.flat), on_host.grads.flat)


@pytest.mark.parametrize(
    ("indices", "error", "text"),
    [
        ([0, 6], ValueError, "indices: expected 0 to 5, got 0 to 6"),
        ([-1, 0], ValueError, "indices: expected 0 to 5, got -1 to 0"),
        ([0.0], ValueError, r"indices: expected integers, got float64 \(1,\)"),
        ([True], ValueError, r"indices: expected integers, got bool \(1,\)"),
        ([[0], [0, 1]], ValueError, "indices: expected integers: "),
        (3, TypeError, "indices: expected integers, got int"),
        ("abc", TypeError, "indices: expected integers, got str"),
        (np.ma.array([1]), TypeError, "indices: expected integers, got MaskedArray"),
    ],
    ids=range(8),
)
def test_bad_indices_are_named(indices: Any, error: type[Exception], text: str) -> None:
    embedding = make()
    with pytest.raises(error, match=text):
        embedding(indices)
    with pytest.raises(RuntimeError, match="no recorded call"):
        embedding.backward(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 3), ValueError, "num_embeddings: expected at least 1"),
        ((6, 3.0), TypeError, "embedding_dim: expected an integer"),
        ((6, 3, 6), ValueError, "padding_idx: expected -6 to 5, got 6"),
        ((6, 3, -7), ValueError, "padding_idx: expected -6 to 5, got -7"),
        ((6, 3, 1.0), TypeError, "padding_idx: expected an integer"),
        ((6, 3, True), TypeError, "padding_idx: expected an integer"),
    ],
    ids=range(6),
)
def test_bad_arguments_are_named(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Embedding(*arguments)


def test_a_recorded_call_owns_its_arrays() -> None:
    embedding, indices = make(), np.array([1, 1, 4])
    y = embedding(indices)
    indices[...] = 0
    y[...] = 0.0
    dy = np.arange(9.0).reshape(3, 3)
    with pytest.raises(ValueError, match=r"dy: expected shape \(3, 3\), got \(2, 3\)"):
        embedding.backward(dy[:2])
    with pytest.raises(TypeError, match="dy: expected"):
        embedding.backward(None)  # type: ignore[arg-type]
    embedding.backward(dy)
    wanted = np.zeros((6, 3))
    wanted[1], wanted[4] = dy[0] + dy[1], dy[2]
    np.testing.assert_array_equal(embedding.grads["weight"], wanted)
    embedding([0])
    embedding.parameters["weight"] = wanted
    with pytest.raises(RuntimeError, match="parameters were changed"):
        embedding.backward(np.zeros((1, 3)))


def test_a_frozen_table_gets_no_gradient() -> None:
    embedding = make()
    embedding.freeze("weight")
    embedding([1, 1])
    embedding.backward(np.ones((2, 3)))
    assert not embedding.grads.flat.any()
    before = np.array(embedding.parameters.flat)
    Adam([embedding]).step()
    np.testing.assert_array_equal(embedding.parameters.flat, before)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(SGD, {"lr": 0.1, "momentum": 0.9}), (Adam, {"lr": 0.1}), (AdamW, {"lr": 0.1})],
    ids=["SGD", "Adam", "AdamW"],
)
def test_optimisers_update_it_as_torch(kind: Any, options: dict[str, float]) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    ours = make(padding_idx=1)
    theirs = torch.nn.Embedding(6, 3, padding_idx=1, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.state_dict().items()})
    optimizer = kind([ours], **options)
    other = getattr(torch.optim, kind.__name__)(theirs.parameters(), **options)
    for _ in range(10):
        indices, dy = rng.integers(0, 5, (2, 3)), rng.standard_normal((2, 3, 3))
        optimizer.zero_grad()
        other.zero_grad(set_to_none=False)
        ours(indices)
        ours.backward(dy)
        theirs(torch.tensor(indices)).backward(torch.tensor(dy))
        optimizer.step()
        other.step()
    close(ours.parameters["weight"], theirs.weight.detach())
    assert not ours.parameters["weight"][1].any()


def test_it_is_saved_copied_and_moved(tmp_path: Path) -> None:
    embedding = make(padding_idx=-2)
    embedding([1, 1, 4])
    embedding.backward(np.ones((3, 3)))
    embedding.save(tmp_path / "table.safetensors")
    loaded = xprnn.load(tmp_path / "table.safetensors")
    others = [copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))]
    for other in (loaded, *others):
        assert isinstance(other, Embedding)
        assert dict(other.options) == dict(embedding.options)
        assert other.options["padding_idx"] == 4
        np.testing.assert_array_equal(other.parameters.flat, embedding.parameters.flat)
    for other in others:
        np.testing.assert_array_equal(other.grads.flat, embedding.grads.flat)
    assert repr(loaded) == (
        "Embedding(num_embeddings=6, embedding_dim=3, padding_idx=4, seed=1, "
        "backend='numpy', dtype='float64')"
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"padding_idx": 6},
        {"padding_idx": "0"},
        {"padding_idx": 10**400},
        {"num_embeddings": 10**15},
        {"num_embeddings": "6"},
        {"embedding_dim": None},
        {"seed": -1},
        {"more": 1},
    ],
    ids=str,
)
def test_an_invalid_file_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    make().save(path)
    kind, options, arrays = io.read(path)
    io.write(path, kind, {**options, **changed}, arrays)
    with pytest.raises(ValueError, match=r"table\.safetensors: does not make a Embedding"):
        xprnn.load(path)


def test_words_to_a_loss_at_every_step_equal_torch() -> None:
    """Embedding, GRU and read-out; targets past a row's end are ignored."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(5)
    words, targets = rng.integers(1, 6, (7, 4)), rng.integers(0, 2, (7, 4))
    for row, length in enumerate((7, 3, 5, 0)):
        words[length:, row], targets[length:, row] = 0, -100
    ours = [
        make(padding_idx=0),
        xprnn.GRU(3, 4, dtype="float64", seed=2).train(),
        xprnn.Linear(4, 2, dtype="float64", seed=3).train(),
    ]
    theirs = [
        torch.nn.Embedding(6, 3, padding_idx=0),
        torch.nn.GRU(3, 4),
        torch.nn.Linear(4, 2),
    ]
    for module, other in zip(ours, theirs, strict=True):
        other.double().load_state_dict({k: torch.tensor(v) for k, v in module.state_dict().items()})
    embedding, gru, readout = ours
    loss, dlogits = xprnn.softmax_cross_entropy(readout(gru(embedding(words))[0]), targets)
    dx, _ = gru.backward(readout.backward(dlogits))
    embedding.backward(dx)
    logits = theirs[2](theirs[1](theirs[0](torch.tensor(words)))[0])
    wanted = torch.nn.functional.cross_entropy(logits.reshape(-1, 2), torch.tensor(targets.ravel()))
    wanted.backward()
    close(loss, wanted.item())
    for module, other in zip(ours, theirs, strict=True):
        for name, p in other.named_parameters():
            close(module.grads[name], p.grad)
