"""How often kernels pack the parameters, in how much memory, and what threads see of it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import xprnn
from tests.endurance.test_memory import traced
from tests.kernels.numba.test_packed_weights import results, sequences, warm
from tests.support.implementations import Pool
from tests.support.numba_cases import needs_numba
from tests.support.targets import arguments, assert_same, backward, forward, make, normal
from xprnn.core.passes import PackedWeights, PackedWeightsCache
from xprnn.nn.parameters import Parameters

pytestmark = needs_numba
__all__ = ["sequences"]


# -- how often, and how much memory


def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each matrix is packed from now on, in a list that grows."""
    from xprnn.kernels.numba.sequence import NumbaRunner

    found: list[str] = []
    genuine = NumbaRunner._panels

    def counted(self: NumbaRunner, how: str, matrix: Any, panels: Any) -> Any:
        found.append(how)
        return genuine(self, how, matrix, panels)

    monkeypatch.setattr(NumbaRunner, "_panels", counted)
    return found


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packings(monkeypatch)
    layer = make("gru", num_layers=2, bidirectional=True)
    for versions in (1, 2):
        for _ in range(3):
            results(layer)
        assert found.count("pack_transposed") == versions * 4 * 2
        assert found.count("pack") == versions * 4 * 2
        layer.parameters["weight_ih_l0"] = layer.parameters["weight_ih_l0"] * 0.5


def test_steps_with_weights_that_change_do_not_grow() -> None:
    layer = make("gru", num_layers=2)
    given, descent = arguments(layer), xprnn.optim.SGD([layer], 1e-3)

    def step() -> None:
        forward(layer, given)
        backward(layer, given)
        descent.step()

    assert traced(step, 200, warm=200) < 200 * object().__sizeof__()


def test_packs_of_another_version_stand_in_the_same_memory() -> None:
    layer, _ = warm("gru")
    places = addresses(layer)
    with layer.writable():
        pass
    assert not addresses(layer)
    results(layer)
    assert addresses(layer) == places


def addresses(layer: Any) -> list[int]:
    """Where the packed weights stand."""
    made = [packs.entries for packs in layer.parameters.packed_weights.values()]
    return [
        panels.ctypes.data
        for each in made
        for use in sorted(each)
        for panels in (each[use][:3] if use == "forward" else [each[use]])
    ]


def test_packs_of_old_versions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: packs of every version are kept."""
    every: dict[Any, dict[Any, Any]] = {}
    monkeypatch.setattr(
        Parameters,
        "packed_weights",
        property(lambda self: every.setdefault((id(self), self.version), PackedWeightsCache())),
    )
    with pytest.raises(AssertionError):
        test_steps_with_weights_that_change_do_not_grow()


def test_eval_drops_them() -> None:
    layer, before = warm("lstm")
    assert not layer.eval().parameters.packed_weights
    assert_same(results(layer.train()), before)


# -- threads


def test_what_is_put_there_is_complete() -> None:
    """Of two threads that come first each makes it, in memory of its own, and sees no half."""
    packs, both = (
        PackedWeights(reusable={"forward": [0], "backward": [0]}),
        threading.Barrier(2, timeout=10),
    )
    given: list[Any] = []

    def make_slowly(old: Any) -> list[int]:
        given.append(old)
        both.wait()
        assert not packs.entries
        both.wait()
        return [1]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: packs.get("forward", make_slowly), range(2)))
    assert found == [[1], [1]] and packs.entries == {"forward": [1]}
    assert None in given and [0] in given
    assert packs.get("forward", make_slowly) is packs.entries["forward"]
    assert packs.invalidated() == PackedWeights(reusable={"forward": [1], "backward": [0]})


def test_threads_that_call_one_layer_after_a_write() -> None:
    layer = make("gru", 32, 64, num_layers=2)
    layer.training = False
    x, threads = normal(0, 6, 3, 32), 4
    for version in range(20):
        layer.parameters["weight_hh_l0"] = normal(version, 192, 64) / 8
        fresh = make("gru", 32, 64, num_layers=2)
        fresh.load_state_dict(layer.state_dict())
        expected = fresh(x)
        together = threading.Barrier(threads, timeout=10)

        def serve(_: int, together: threading.Barrier = together) -> Any:
            together.wait()
            return layer(x)

        with Pool(threads) as pool:
            for found in pool.map(serve, range(threads)):
                assert_same(found, expected)


def test_a_write_ends_what_is_kept_before_the_block_counts_as_ended() -> None:
    """A thread that finds no block open must not find packs of what stood there before."""
    layer, _ = warm("gru")
    seen: list[bool] = []

    class Watched(Parameters):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_open" and value == 0:
                seen.append(not any(packs.entries for packs in self.packed_weights.values()))

    layer.parameters.__class__ = Watched
    with layer.writable():
        pass
    assert seen == [True]
