"""What kernels pack of the parameters: once for each version of them, and never an old one's."""

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
    """Compiled sequences serve, whose packs these are."""
    select_kernels("sequence")


def results(layer: Any) -> list[np.ndarray]:
    """All that a layer gives for the same arguments: in eval mode, recorded, and in segments."""
    given = arguments(layer)
    layer.training = False  # eval() would drop what is kept
    found = arrays(forward(layer, given))
    layer.train()
    for k in (None, 2):
        layer.recompute = k
        found += run(layer, given)
    layer.recompute = None
    return found


def assert_as_fresh(layer: Any, name: str, **options: Any) -> list[np.ndarray]:
    """Fail unless a layer gives bit for bit what one gives that was made with its numbers."""
    fresh = make(name, num_layers=2, bidirectional=True, seed=99, **options)
    fresh.load_state_dict(layer.state_dict())
    found = results(layer)
    assert_same(found, results(fresh))
    return found


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
    """A layer that keeps packs, and what it gives."""
    layer = make(name, num_layers=2, bidirectional=True)
    found = results(layer)
    packs = layer.parameters.packed_weights.values()
    assert len(packs) == 4 and all(
        {*each.entries} == {"forward", "backward", "input"} for each in packs
    )
    return layer, found


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("name", SEQUENCE)
def test_what_is_written_counts_in_the_next_call(name: str, way: str) -> None:
    layer, before = warm(name)
    EVERY[way](layer, {n: normal(k, *p.shape) for k, (n, p) in enumerate(layer.parameters.items())})
    found = assert_as_fresh(layer, name)
    assert not any(np.array_equal(one, other) for one, other in zip(found, before, strict=True))


@pytest.mark.parametrize("way", EVERY)
def test_stale_packs_are_found(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: packs that live as long as the parameters."""
    monkeypatch.setattr(
        Parameters,
        "packs",
        property(lambda self: self.__dict__.setdefault("p", PackedWeightsCache())),
    )
    with pytest.raises(AssertionError):
        test_what_is_written_counts_in_the_next_call("gru", way)


def test_packs_of_an_open_block_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: what is packed inside a block is kept until it ends."""
    monkeypatch.setattr(Parameters, "packed_weights", property(lambda self: self._packs))
    with pytest.raises(AssertionError):
        test_inside_a_block_the_numbers_count_as_they_are()


def check_inside(layer: Any) -> None:
    """Fail unless an unrecorded call takes the numbers as they are now."""
    fresh = make("gru", num_layers=2, bidirectional=True)
    fresh.load_state_dict(layer.state_dict())
    given = arguments(layer)
    layer.training = fresh.training = False
    assert_same(forward(layer, given), forward(fresh, given))
    layer.train()


def test_inside_a_block_the_numbers_count_as_they_are() -> None:
    layer, _ = warm("gru")
    with layer.writable() as flat:
        for _ in range(2):
            flat *= 0.5
            check_inside(layer)


# -- copies, files, other places

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
def test_a_copy_has_packs_of_its_own(way: str, which: str, tmp_path: Path) -> None:
    layer, before = warm("gru")
    other = OTHERS[way](layer, tmp_path)
    assert not other.parameters.packed_weights
    assert_same(results(other), before)
    written, left = (other, layer) if which == "copy" else (layer, other)
    with written.writable() as flat:
        flat *= 0.5
    assert_same(results(left), before)
    assert_as_fresh(written, "gru")


def test_a_layer_that_moves_packs_anew() -> None:
    layer, _ = warm("gru")
    layer.to(dtype="float32")
    assert not layer.parameters.packed_weights
    assert_as_fresh(layer, "gru", dtype="float32")
    layer.to(dtype="float64")
    assert_as_fresh(layer, "gru")


def test_packs_that_modules_share_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: one place for the packs of all parameters."""
    every = PackedWeightsCache()
    monkeypatch.setattr(Parameters, "packed_weights", property(lambda self: every))
    for way in OTHERS:
        with pytest.raises(AssertionError):
            test_a_copy_has_packs_of_its_own(way, "copy", tmp_path)
        every.clear()
    with pytest.raises(AssertionError):
        test_a_layer_that_moves_packs_anew()


def test_functions_pack_for_each_call() -> None:
    """Nobody says when explicit weights change."""
    function = make("gru_function")
    given = arguments(function)
    run(function, given)
    function.weights = [np.array(weight) for weight in function.weights]
    for _ in range(2):
        function.weights[1] *= 0.5
        with function.layer.writable():
            function.layer.parameters["weight_hh_l0"] = function.weights[1]
        assert_same(run(function, given), run(function.layer, given))
