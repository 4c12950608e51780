"""How often weights are packed, in how much memory, and concurrently."""

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
    """A list to which each packing from now on adds the layout of its panels."""
    from xprnn.kernels.numba.sequence import NumbaRunner

    layouts: list[str] = []
    original = NumbaRunner._panels

    def counted(self: NumbaRunner, layout: str, matrix: Any, panels: Any) -> Any:
        layouts.append(layout)
        return original(self, layout, matrix, panels)

    monkeypatch.setattr(NumbaRunner, "_panels", counted)
    return layouts


def test_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = packings(monkeypatch)
    layer = make("gru", num_layers=2, bidirectional=True)
    for versions in (1, 2):
        for _ in range(3):
            results(layer)
        assert layouts.count("pack_transposed") == versions * 4 * 2
        assert layouts.count("pack") == versions * 4 * 2
        layer.parameters["weight_ih_l0"] = layer.parameters["weight_ih_l0"] * 0.5


def test_steps_with_changing_weights_retain_no_memory() -> None:
    layer = make("gru", num_layers=2)
    inputs, optimizer = arguments(layer), xprnn.optim.SGD([layer], 1e-3)

    def step() -> None:
        forward(layer, inputs)
        backward(layer, inputs)
        optimizer.step()

    assert traced(step, 200, warm=200) < 200 * object().__sizeof__()


def test_a_new_version_is_packed_into_the_same_memory() -> None:
    layer, _ = warm("gru")
    before = addresses(layer)
    with layer.writable():
        pass
    assert not addresses(layer)
    results(layer)
    assert addresses(layer) == before


def addresses(layer: Any) -> list[int]:
    """The addresses of the packed weights."""
    entries = [packed.entries for packed in layer.parameters.packed_weights.values()]
    panels = []
    for each in entries:
        ih, bias, matrices, _ = each.get("forward", (None, None, (), ()))
        panels += [ih, bias, *matrices, *each.get("backward", [()])[0], each.get("input")]
    return [array.ctypes.data for array in panels if array is not None]


def test_packed_weights_of_old_versions_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: the packed weights of every version are kept."""
    every: dict[Any, dict[Any, Any]] = {}
    monkeypatch.setattr(
        Parameters,
        "packed_weights",
        property(lambda self: every.setdefault((id(self), self.version), PackedWeightsCache())),
    )
    with pytest.raises(AssertionError):
        test_steps_with_changing_weights_retain_no_memory()


def test_eval_drops_packed_weights() -> None:
    layer, before = warm("lstm")
    assert not layer.eval().parameters.packed_weights
    assert_same(results(layer.train()), before)


# -- threads


def test_threads_that_pack_at_once_see_complete_weights() -> None:
    """Two threads that pack at once use separate memory; neither sees unfinished weights."""
    packed, both = (
        PackedWeights(reusable={"forward": [0], "backward": [0]}),
        threading.Barrier(2, timeout=10),
    )
    reused: list[Any] = []

    def make_slowly(old: Any) -> list[int]:
        reused.append(old)
        both.wait()
        assert not packed.entries
        both.wait()
        return [1]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: packed.get("forward", make_slowly), range(2)))
    assert results == [[1], [1]] and packed.entries == {"forward": [1]}
    assert None in reused and [0] in reused
    assert packed.get("forward", make_slowly) is packed.entries["forward"]
    assert packed.invalidated() == PackedWeights(reusable={"forward": [1], "backward": [0]})


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

        def call(_: int, together: threading.Barrier = together) -> Any:
            together.wait()
            return layer(x)

        with Pool(threads) as pool:
            for actual in pool.map(call, range(threads)):
                assert_same(actual, expected)


def test_packed_weights_are_dropped_before_the_block_ends() -> None:
    """A thread that sees no open block must not see weights packed before the write."""
    layer, _ = warm("gru")
    seen: list[bool] = []

    class Watched(Parameters):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_open" and value == 0:
                seen.append(not any(packed.entries for packed in self.packed_weights.values()))

    layer.parameters.__class__ = Watched
    with layer.writable():
        pass
    assert seen == [True]
