"""Packed weights: packed once for each version of the parameters, and never out of date."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.implementations import SelectKernels
from tests.support.numba_cases import SEQUENCE, needs_numba
from tests.support.targets import arguments, arrays, assert_same, forward, make, normal, run
from tests.unit.test_parameters import WAYS
from xprnn.core.passes import PackedWeightsCache
from xprnn.nn.parameters import Parameters

pytestmark = needs_numba


@pytest.fixture(autouse=True)
def sequences(select_kernels: SelectKernels) -> None:
    """Force the sequence kernels, which use packed weights."""
    select_kernels("sequence")


def results(layer: Any) -> list[np.ndarray]:
    """All results of a layer for the same arguments: in eval mode, recorded, and in segments."""
    inputs = arguments(layer)
    layer.training = False  # eval() would drop the packed weights
    actual = arrays(forward(layer, inputs))
    layer.train()
    for k in (None, 2):
        layer.recompute = k
        actual += run(layer, inputs)
    layer.recompute = None
    return actual


def assert_as_fresh(layer: Any, name: str, **options: Any) -> list[np.ndarray]:
    """Fail unless a layer gives the bits of a new layer with the same parameters."""
    fresh = make(name, num_layers=2, bidirectional=True, seed=99, **options)
    fresh.load_state_dict(layer.state_dict())
    actual = results(layer)
    assert_same(actual, results(fresh))
    return actual


# -- every permitted way of writing


def by_update(layer: Any, values: dict[str, np.ndarray]) -> None:
    layer.parameters.update(values)


def by_write(layer: Any, values: dict[str, np.ndarray]) -> None:
    layer.parameters.write(values)


def by_draw(layer: Any, values: dict[str, np.ndarray]) -> None:
    layer.parameters.draw(3, 0.5)


def by_optimizer(layer: Any, values: dict[str, np.ndarray]) -> None:
    layer.grads.update(values)
    xprnn.optim.SGD([layer], 0.1).step()


def while_frozen(layer: Any, values: dict[str, np.ndarray]) -> None:
    layer.grads.update(values)
    layer.freeze("weight_ih_l0", "bias_hh_l1_reverse")
    xprnn.optim.Adam([layer], 0.1).step()
    layer.unfreeze()


def in_nested_blocks(layer: Any, values: dict[str, np.ndarray]) -> None:
    with layer.writable() as flat:
        with layer.writable() as inner:
            inner *= 0.5
        eval_call(layer)
        flat *= 0.5


def around_a_call(layer: Any, values: dict[str, np.ndarray]) -> None:
    with layer.writable() as flat:
        flat *= 0.5
        eval_call(layer)
        flat *= 0.5


def before_an_error(layer: Any, values: dict[str, np.ndarray]) -> None:
    with pytest.raises(KeyboardInterrupt), layer.writable() as flat:
        flat *= 0.5
        raise KeyboardInterrupt


def eval_call(layer: Any) -> None:
    layer.training = False
    forward(layer, arguments(layer))
    layer.train()


EVERY: dict[str, Callable[[Any, dict[str, np.ndarray]], None]] = {
    **WAYS,
    "update": by_update,
    "write": by_write,
    "draw": by_draw,
    "optimizer": by_optimizer,
    "optimizer, some frozen": while_frozen,
    "nested blocks": in_nested_blocks,
    "a call in a block": around_a_call,
    "an error in a block": before_an_error,
}


def warm(name: str) -> tuple[Any, list[np.ndarray]]:
    """A layer with packed weights, and its results."""
    layer = make(name, num_layers=2, bidirectional=True)
    actual = results(layer)
    packed = layer.parameters.packed_weights.values()
    assert len(packed) == 4 and all(
        {*each.entries} == {"forward", "backward", "input"} for each in packed
    )
    return layer, actual


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("name", SEQUENCE)
def test_written_parameters_take_effect_at_the_next_call(name: str, way: str) -> None:
    layer, before = warm(name)
    EVERY[way](layer, {n: normal(k, *p.shape) for k, (n, p) in enumerate(layer.parameters.items())})
    actual = assert_as_fresh(layer, name)
    assert not any(np.array_equal(one, other) for one, other in zip(actual, before, strict=True))


@pytest.mark.parametrize("way", EVERY)
def test_stale_packed_weights_are_detected(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: packed weights that are never invalidated."""
    monkeypatch.setattr(
        Parameters,
        "packed_weights",
        property(lambda self: self.__dict__.setdefault("p", PackedWeightsCache())),
    )
    with pytest.raises(AssertionError):
        test_written_parameters_take_effect_at_the_next_call("gru", way)


def test_packed_weights_of_an_open_block_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: weights packed inside a block are kept until it ends."""
    monkeypatch.setattr(Parameters, "packed_weights", property(lambda self: self._packed_weights))
    with pytest.raises(AssertionError):
        test_a_call_inside_a_block_reads_the_current_values()


def check_inside(layer: Any) -> None:
    """Fail unless an unrecorded call reads the current parameters."""
    fresh = make("gru", num_layers=2, bidirectional=True)
    fresh.load_state_dict(layer.state_dict())
    inputs = arguments(layer)
    layer.training = fresh.training = False
    assert_same(forward(layer, inputs), forward(fresh, inputs))
    layer.train()


def test_a_call_inside_a_block_reads_the_current_values() -> None:
    layer, _ = warm("gru")
    with layer.writable() as flat:
        for _ in range(2):
            flat *= 0.5
            check_inside(layer)


# -- copies, files, moves

OTHERS: dict[str, Callable[[Any, Path], Any]] = {
    "copy": lambda layer, path: copy.copy(layer),
    "deepcopy": lambda layer, path: copy.deepcopy(layer),
    "pickle": lambda layer, path: pickle.loads(pickle.dumps(layer)),
    "load": lambda layer, path: loaded(layer, path / "layer.safetensors"),
}


def loaded(layer: Any, path: Path) -> Any:
    layer.save(path)
    return xprnn.load(path).train()


@pytest.mark.parametrize("which", ["copy", "original"])
@pytest.mark.parametrize("way", OTHERS)
def test_a_copy_has_its_own_packed_weights(way: str, which: str, tmp_path: Path) -> None:
    layer, before = warm("gru")
    other = OTHERS[way](layer, tmp_path)
    assert not other.parameters.packed_weights
    assert_same(results(other), before)
    written, unchanged = (other, layer) if which == "copy" else (layer, other)
    with written.writable() as flat:
        flat *= 0.5
    assert_same(results(unchanged), before)
    assert_as_fresh(written, "gru")


def test_a_moved_layer_packs_again() -> None:
    layer, _ = warm("gru")
    layer.to(dtype="float32")
    assert not layer.parameters.packed_weights
    assert_as_fresh(layer, "gru", dtype="float32")
    layer.to(dtype="float64")
    assert_as_fresh(layer, "gru")


def test_shared_packed_weights_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The injected fault: one cache for the packed weights of all parameters."""
    every = PackedWeightsCache()
    monkeypatch.setattr(Parameters, "packed_weights", property(lambda self: every))
    for way in OTHERS:
        with pytest.raises(AssertionError):
            test_a_copy_has_its_own_packed_weights(way, "copy", tmp_path)
        every.clear()
    with pytest.raises(AssertionError):
        test_a_moved_layer_packs_again()


def test_functions_pack_for_each_call() -> None:
    """A function cannot know when explicit weights change."""
    function = make("gru_function")
    inputs = arguments(function)
    run(function, inputs)
    function.weights = [np.array(weight) for weight in function.weights]
    for _ in range(2):
        function.weights[1] *= 0.5
        with function.layer.writable():
            function.layer.parameters["weight_hh_l0"] = function.weights[1]
        assert_same(run(function, inputs), run(function.layer, inputs))
