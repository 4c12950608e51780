"""Users' subclasses are copied and pickled as Python objects are; old pickles still load."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest

import xprnn

DATA = Path(__file__).parents[1] / "data"
X = np.random.default_rng(1).standard_normal((5, 2, 3))

DEEP: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda thing, protocol=protocol: pickle.loads(
            pickle.dumps(thing, protocol)
        )
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}
WAYS = {"copy": copy.copy, **DEEP}


class Tagger(xprnn.GRU):
    """A module with modules in its attributes, and a constructor with arguments of its own."""

    built = 0

    def __init__(self, tags: list[str]) -> None:
        Tagger.built += 1
        self.tags = tags  # before the base is built
        super().__init__(3, 4, dtype="float64", seed=0)
        self.head = xprnn.Linear(4, len(tags), dtype="float64", seed=1)
        self.also_head = self.head
        self.heads = {"first": self.head, "second": xprnn.LSTMCell(4, 2, dtype="float64", seed=2)}

    def tag(self, x: np.ndarray) -> np.ndarray:
        return self.head(self(x)[0])


class Slotted(xprnn.LSTM):
    __slots__ = ("note",)


class Cell(xprnn.RNNCell):
    def __init__(self, scale: float, /) -> None:
        super().__init__(3, 4, dtype="float64", seed=0)
        self.scale = scale


class Scaled(xprnn.Linear):
    def __init__(self, scale: float, /) -> None:
        super().__init__(3, 4, dtype="float64", seed=0)
        self.scale = scale


class Extending(xprnn.GRU):
    """Its state has an entry more, which it removes again."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mine": self.__dict__.pop("_mine")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._mine = state.pop("mine")
        super().__setstate__(state)


class Choosing(xprnn.GRU):
    """It selects its state itself, and Python restores it."""

    def __getstate__(self) -> Any:
        return {"kept": self.kept}


@pytest.mark.parametrize("way", WAYS)
def test_attributes_and_modules_in_them_stay(way: str) -> None:
    layer = Tagger(["a", "b"])
    layer.later = np.arange(3)  # set after the constructor
    layer.train()
    built = Tagger.built
    twin = WAYS[way](layer)
    assert Tagger.built == built, "no constructor is called"
    assert type(twin) is Tagger and twin.training
    assert twin.tags == ["a", "b"]
    np.testing.assert_array_equal(twin.later, [0, 1, 2])
    assert twin.also_head is twin.head is twin.heads["first"]
    np.testing.assert_array_equal(twin.tag(X), layer.tag(X))
    shared = way == "copy"
    assert (twin.head is layer.head) is (twin.tags is layer.tags) is shared
    with twin.writable() as flat:
        flat[...] = 0.0
    assert layer.parameters.flat.any(), "the module's own arrays are never shared"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Cell, Scaled])
def test_attributes_of_cells_and_linear_layers_stay(kind: Any, way: str) -> None:
    module = kind(0.5)
    twin = WAYS[way](module)
    assert twin.scale == 0.5
    np.testing.assert_array_equal(twin(X[0]), module(X[0]))


@pytest.mark.parametrize("way", WAYS)
def test_attributes_of_plain_instances_stay(way: str) -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    layer.name = "encoder"
    assert WAYS[way](WAYS[way](layer)).name == "encoder"


@pytest.mark.parametrize("way", WAYS)
def test_slots_are_copied(way: str) -> None:
    layer = Slotted(3, 4, seed=0)
    assert not hasattr(WAYS[way](layer), "note")
    layer.note = "in a slot"
    assert WAYS[way](layer).note == "in a slot"


@pytest.mark.parametrize("way", WAYS)
def test_states_that_subclasses_define(way: str) -> None:
    layer = Extending(3, 4, dtype="float64", seed=0)
    layer._mine = 7
    twin = WAYS[way](layer)
    assert twin._mine == 7
    np.testing.assert_array_equal(twin(X)[0], layer(X)[0])

    choosing = Choosing(3, 4, dtype="float64", seed=0)
    choosing.kept, choosing.left_out = [1], lambda: None
    twin = WAYS[way](choosing)
    assert twin.kept == [1] and not hasattr(twin, "left_out")
    np.testing.assert_array_equal(twin(X)[0], choosing(X)[0])


@pytest.mark.parametrize("way", DEEP)
def test_cycles(way: str) -> None:
    layer = Tagger(["a"])
    layer.itself, layer.head.owner = layer, layer
    layer.stream = layer.stepper(2)
    y = layer.stream.step(X[0])
    for twin in (DEEP[way](layer), DEEP[way](layer.stream)._layer, DEEP[way](layer.head).owner):
        assert twin is not layer
        assert twin.itself is twin.head.owner is twin.stream._layer is twin
        np.testing.assert_array_equal(twin.stream.state()[-1], y)
        np.testing.assert_array_equal(twin.stream.step(X[1]), DEEP[way](layer.stream).step(X[1]))
    stream = DEEP[way](layer.stream)
    assert stream._layer.stream is stream


@pytest.mark.parametrize("way", WAYS)
def test_steppers_keep_attributes(way: str) -> None:
    stepper = xprnn.GRU(3, 4, dtype="float64", seed=0).stepper(2)
    stepper.source = "microphone"
    stepper.step(X[0])
    twin = WAYS[way](stepper)
    assert twin.source == "microphone"
    assert (twin._layer is stepper._layer) is (way == "copy")
    np.testing.assert_array_equal(twin.step(X[1]), stepper.step(X[1]))


@pytest.mark.parametrize("way", DEEP)
@pytest.mark.parametrize("first", ["layer", "optimizer"])
def test_a_model_and_its_optimizer_are_copied_together(first: str, way: str) -> None:
    """Copied at once, they refer to each other and continue as the originals do."""
    layer = Tagger(["a", "b"]).train()
    optimizer = xprnn.optim.Adam([layer, layer.head], lr=0.1)
    decay = xprnn.optim.CosineDecay(optimizer, 4)
    optimizer.name = "mine"

    def learn(layer: Any, optimizer: Any, decay: Any) -> np.ndarray:
        layer.train(), layer.head.train()
        layer.backward(layer.head.backward(layer.tag(X)))
        optimizer.step()
        decay.step()
        return layer.parameters.flat.copy()

    learn(layer, optimizer, decay)
    both = [layer, optimizer] if first == "layer" else [optimizer, layer]
    twins = DEEP[way]([*both, decay])
    twin, other = twins[:2] if first == "layer" else twins[1::-1]
    assert other.modules[0] is twin and other.modules[1] is twin.head
    assert twins[2].optimizer is other and other.name == "mine"
    before = layer.parameters.flat.copy()
    results = learn(twin, other, twins[2])
    np.testing.assert_array_equal(layer.parameters.flat, before)
    np.testing.assert_array_equal(learn(layer, optimizer, decay), results)
    assert other.lr == optimizer.lr


def test_the_checks_of_a_layer_copy_no_attribute() -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    layer.lock = Lock()  # it cannot be copied
    x = X.astype(np.float32)
    assert xprnn.gradcheck(layer, x, directions=1).worst.excess <= 1
    assert xprnn.gradient_flow(layer, x).norms.shape == (1, 5)
    assert xprnn.verify(layer, x.shape).ok


class Mixed:
    def __init_subclass__(cls, *, label: str, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.label = label


def test_classes_with_arguments_of_their_own() -> None:
    class Labelled(xprnn.GRU, Mixed, label="b"):
        pass

    assert Labelled.label == "b"


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_the_first_version_load(protocol: int) -> None:
    """Written by xprnn 0.1.0 with NumPy 2; their next results are stored beside them."""
    things = pickle.loads((DATA / f"pickle_protocol_{protocol}.pickle").read_bytes())
    expected = json.loads((DATA / "pickle_expected.json").read_text("utf-8"))
    x, gru = things["x"], things["gru"]
    assert gru.training and gru.recompute == 2 and gru.frozen == {"bias_hh_l1"}
    results = {
        "gru": gru(x)[0],
        "cell": things["cell"](x[:, 0])[1],
        "linear": things["linear"](np.ones((1, 3), "f")),
        "stepper": things["stepper"].step(x[:, 3]),
    }
    gru.eval()
    things["adam"].step()
    assert things["adam"].modules[0] is gru and things["decay"].optimizer is things["adam"]
    results["weight_ih_l0"] = gru.state_dict()["weight_ih_l0"]
    results["lr"] = things["adam"].lr
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(results[name], value, rtol=1e-6, err_msg=name)
