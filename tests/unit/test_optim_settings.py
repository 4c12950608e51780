"""Settings of optimisers and schedules are checked when they are set and when they are loaded."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.nn import serialization as io
from xprnn.optim import SGD, Adam, AdamW, CosineDecay


def linear() -> xprnn.Linear:
    return xprnn.Linear(3, 2, dtype="float64", seed=1)


def make_with(name: str) -> Any:
    """An optimiser or schedule that has the attribute `name`."""
    if name == "momentum":
        return SGD([linear()], lr=0.5)
    optimizer = AdamW([linear()], lr=0.5)
    return CosineDecay(optimizer, 5) if name in ("lr_min", "lr_max", "done", "steps") else optimizer


RATES = ("lr", "momentum", "eps", "weight_decay", "lr_min", "lr_max")
COUNTS = ("done", "steps")


@pytest.mark.parametrize("name", RATES)
def test_a_rate_becomes_a_float_and_is_saved(name: str, tmp_path: Path) -> None:
    instance = make_with(name)
    for value in (np.float32(1e-3), np.float64(1e-3), 0.25, np.float16(0.25)):
        setattr(instance, name, value)
        stored = getattr(instance, name)
        assert type(stored) is float
        assert stored == float(value)
        instance.save(tmp_path / "state.safetensors")
        instance.load(tmp_path / "state.safetensors")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((value, ValueError) for value in (-1.0, math.nan, math.inf, np.float32("nan"), 10**400)),
        *((value, TypeError) for value in ("0.1", True, None, [0.1], np.ones(1))),
    ],
    ids=lambda value: repr(value)[:20],
)
@pytest.mark.parametrize("name", RATES)
def test_a_wrong_rate_is_refused_by_name(name: str, value: Any, error: type[Exception]) -> None:
    instance = make_with(name)
    before = getattr(instance, name)
    with pytest.raises(error, match=f"^{name}: expected a number"):
        setattr(instance, name, value)
    assert getattr(instance, name) == before


@pytest.mark.parametrize("value", [-1, 1.0, "3", True, None], ids=repr)
@pytest.mark.parametrize("name", COUNTS)
def test_a_wrong_count_is_refused_by_name(name: str, value: Any) -> None:
    instance = make_with(name)
    before = getattr(instance, name)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        setattr(instance, name, value)
    assert getattr(instance, name) == before


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ((0.9, 1.0), ValueError, r"betas\[1\]: expected a number"),
        ((math.nan, 0.9), ValueError, r"betas\[0\]: expected a number"),
        (("0.9", 0.9), TypeError, r"betas\[0\]: expected a number"),
        ((0.9,), TypeError, "betas: expected two numbers"),
        (0.9, TypeError, "betas: expected two numbers"),
    ],
)
def test_wrong_betas_are_refused(value: Any, error: type[Exception], text: str) -> None:
    optimizer = Adam([linear()])
    with pytest.raises(error, match=text):
        optimizer.betas = value
    assert optimizer.betas == (0.9, 0.999)
    optimizer.betas = [np.float32(0.5), 0.25]
    assert optimizer.betas == (0.5, 0.25)
    assert [type(beta) for beta in optimizer.betas] == [float, float]


@pytest.mark.parametrize("name", ["modules", "steps"])
def test_modules_and_steps_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(SGD([linear()], lr=0.1), name, getattr(SGD([linear()], lr=0.1), name))


def test_a_decay_keeps_its_optimizer() -> None:
    decay = CosineDecay(SGD([linear()], lr=0.1), 3)
    with pytest.raises(AttributeError):
        decay.optimizer = SGD([linear()], lr=0.1)  # type: ignore[misc]
    with pytest.raises(TypeError, match=r"optimizer: expected one of xprnn\.optim, got float"):
        CosineDecay(0.1, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [(0.0, 0.9, 0.9), (0.9, 0.0, 0.9), (0.9, 0.5, 0.5)], ids=str)
def test_momentum_set_between_steps_equals_torch(values: tuple[float, ...]) -> None:
    torch = pytest.importorskip("torch")
    module, rng = linear(), np.random.default_rng(0)
    weight = torch.nn.Parameter(torch.tensor(np.array(module.parameters["weight"])))
    ours = SGD([module], lr=0.1, momentum=values[0])
    theirs = torch.optim.SGD([weight], lr=0.1, momentum=values[0])
    for momentum in values:
        ours.momentum = momentum
        theirs.param_groups[0]["momentum"] = momentum
        for _ in range(2):
            module.grads["weight"][...] = gradient = rng.standard_normal((2, 3))
            weight.grad = torch.tensor(gradient)
            ours.step()
            theirs.step()
    wanted = weight.detach().numpy()
    np.testing.assert_allclose(module.parameters["weight"], wanted, rtol=1e-13, atol=0)


# -- files


def test_a_loaded_decay_continues_exactly(tmp_path: Path) -> None:
    uninterrupted, first, second = (
        CosineDecay(SGD([linear()], lr=0.5), 7, lr_min=0.01) for _ in range(3)
    )
    rates = [(uninterrupted.step(), uninterrupted.optimizer.lr)[1] for _ in range(9)]
    for _ in range(4):
        first.step()
    first.save(tmp_path / "decay.safetensors")
    second.lr_max = second.lr_min = 0.3
    second.load(tmp_path / "decay.safetensors")
    assert second.state_dict() == first.state_dict() == {"done": 4, "lr_max": 0.5, "lr_min": 0.01}
    assert [(second.step(), second.optimizer.lr)[1] for _ in range(5)] == rates[4:]


DECAY = {"done": 4, "lr_max": 0.5, "lr_min": 0.01}


@pytest.mark.parametrize(
    ("options", "arrays", "text"),
    [
        ({**DECAY, "done": -1}, {}, "done: expected a number from 0"),
        ({**DECAY, "done": 4.0}, {}, "done: expected an integer"),
        ({**DECAY, "done": 10**400}, {}, "done: expected a number from 0"),
        ({**DECAY, "done": True}, {}, "done: expected an integer"),
        ({**DECAY, "lr_max": math.nan}, {}, "lr_max: expected a number"),
        ({**DECAY, "lr_max": 10**400}, {}, "lr_max: expected a number"),
        ({**DECAY, "lr_min": "0"}, {}, "lr_min: expected a number"),
        ({**DECAY, "lr_min": [0]}, {}, "lr_min: expected a number"),
        ({"done": 4}, {}, "expected done, lr_max, lr_min, got done"),
        ({**DECAY, "more": 1}, {}, "expected done, lr_max, lr_min, got"),
        (DECAY, {"more": np.ones(3)}, "expected done, lr_max, lr_min, got"),
        (DECAY, {"done": np.ones((), np.int64)}, "done: expected an integer"),
        ({}, {}, "expected done, lr_max, lr_min, got"),
    ],
    ids=range(13),
)
def test_an_invalid_decay_file_is_refused(
    options: dict[str, Any], arrays: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "decay.safetensors"
    io.write(path, "CosineDecay", options, arrays)
    decay = CosineDecay(SGD([linear()], lr=0.5), 7)
    before = decay.state_dict()
    with pytest.raises(ValueError, match=text) as caught:
        decay.load(path)
    assert "decay.safetensors" in str(caught.value)
    assert decay.state_dict() == before


def test_another_kind_of_state_is_refused(tmp_path: Path) -> None:
    optimizer = SGD([linear()], lr=0.5)
    optimizer.save(tmp_path / "sgd.safetensors")
    with pytest.raises(ValueError, match="holds a 'SGD', expected a 'CosineDecay'"):
        CosineDecay(optimizer, 7).load(tmp_path / "sgd.safetensors")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"steps": "3"}, "steps: expected an integer"),
        ({"steps": 10**400}, "steps: expected a number from 0"),
        ({"lr": "fast"}, "lr: expected a number"),
        ({"lr": 10**400}, "lr: expected a number"),
        ({"lr": math.nan}, "lr: expected a number"),
        ({"lr": None}, "lr: expected a number"),
        ({"0.exp_avg": np.ones((8, 1))}, "exp_avg: expected shape"),
        ({"0.exp_avg": "zeros"}, "exp_avg: expected shape"),
        (
            {"0.steps": np.ones(3, np.int64)},
            r"0\.steps: expected \(2,\) integers, got int64 \(3,\)",
        ),
        ({"0.steps": np.ones(2)}, r"0\.steps: expected \(2,\) integers, got float64"),
        ({"0.steps": np.array([True, True])}, r"0\.steps: expected \(2,\) integers, got bool"),
        ({"0.steps": np.array([0, 4])}, r"0\.steps: expected 0 to 3, .* got 0 to 4"),
        ({"0.steps": np.array([-1, 3])}, r"0\.steps: expected 0 to 3, .* got -1 to 3"),
        ({"1.steps": np.array([3, 3])}, r"unexpected 1\.steps"),
    ],
    ids=range(14),
)
def test_an_invalid_optimizer_file_is_refused(
    changed: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "adam.safetensors"
    optimizer = Adam([linear()], lr=0.5)
    good = {**optimizer.state_dict(), "steps": 3}
    state = {**good, **changed}
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    options = {name: value for name, value in state.items() if name not in arrays}
    io.write(path, "Adam", options, arrays)
    with pytest.raises(ValueError, match=text):
        optimizer.load(path)
    assert (optimizer.steps, optimizer.lr) == (0, 0.5)
    assert not any(np.any(value) for name, value in optimizer.state_dict().items() if name != "lr")
    optimizer.load_state_dict(good)
    assert optimizer.steps == 3


# -- copies and pickles


class Slotted(SGD):
    """A user's subclass with a slot and a dictionary."""

    __slots__ = ("extra",)


def test_copies_are_independent() -> None:
    for make in (lambda m: Slotted(m, lr=0.5, momentum=0.5), AdamW):
        optimizer = make([linear()])
        decay = CosineDecay(optimizer, 4)
        optimizer.note = "kept"
        if isinstance(optimizer, Slotted):
            optimizer.extra = [1]
        optimizer.modules[0].freeze("bias")
        for module in optimizer.modules:
            module.grads.flat[...] = 1.0
        optimizer.step()
        for other in (copy.deepcopy(decay), pickle.loads(pickle.dumps(decay))):
            own = other.optimizer
            assert own.note == "kept"
            assert getattr(own, "extra", None) == getattr(optimizer, "extra", None)
            expected, stored = optimizer.state_dict(), own.state_dict()
            assert all(np.array_equal(stored[name], expected[name]) for name in expected)
            own.modules[0].unfreeze()
            own.step()
            other.step()
            assert (own.steps, own.state_dict()["0.steps"].tolist()) == (2, [2, 1])
            assert optimizer.state_dict()["0.steps"].tolist() == [1, 0]


def test_pickles_of_the_first_version_continue() -> None:
    """SGD with momentum and AdamW after three steps; the expected numbers are those of 0.1.0."""
    data = (Path(__file__).parents[1] / "data" / "optimisers_0.1.0.pickle").read_bytes()
    wanted = (
        [-2.2590056467850435, 1.0417456881671325],
        [-1.0501280103872872, 0.8800635156274875],
    )
    for (optimizer, decay), weights in zip(pickle.loads(data), wanted, strict=True):
        assert decay.optimizer is optimizer
        assert (optimizer.steps, decay.done, decay.steps) == (3, 3, 4)
        optimizer.modules[0].grads["weight"][...] = [[0.5, 0.25]]
        optimizer.step()
        np.testing.assert_allclose(
            optimizer.modules[0].parameters["weight"][0], weights, rtol=1e-14
        )
        decay.step()
        assert optimizer.lr == 0.0


def test_a_schedules_state_must_be_a_mapping() -> None:
    decay = CosineDecay(SGD([linear()], lr=0.1), 5)
    with pytest.raises(TypeError, match="state: expected a mapping, got list"):
        decay.load_state_dict([1])  # type: ignore[arg-type]
    assert decay.done == 0
