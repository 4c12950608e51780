"""Captured feature-major steps of the reference code against its batch-major steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support.implementations import SelectKernels
from tests.support.on_device import run
from tests.support.targets import LAYERS, arguments, arrays, make
from tests.support.tolerances import assert_close
from xprnn.cells import CELLS
from xprnn.engine import replay
from xprnn.engine.replay import ReplayLoop

T = 3 * replay.MIN_STEPS
# batch sizes: small, and large enough for an input product in each step
ROWS = (1, 3, replay.MIN_INPUT_ROWS)
LENGTHS: dict[str, Callable[[int], Any]] = {
    "full": lambda N: None,
    "some end": lambda N: [T - replay.MIN_STEPS * (n % 3) for n in range(N)],
    "short runs too": lambda N: [T - 3 * (n % 5) for n in range(N)],
}

READ = [(name, part) for name, cell in CELLS.items() for part in cell.backward_reads]


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels) -> list[str]:
    """The names of the feature-major loops that have run."""
    select_kernels("reference")
    calls: list[str] = []
    for name in ("replay_steps", "replay_backward_steps"):
        original = getattr(ReplayLoop, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(*args)

        monkeypatch.setattr(ReplayLoop, name, counted)
    return calls


def both(name: str, N: int, lengths: Any, replayed: list[str], **options: Any) -> tuple[Any, Any]:
    """Results and gradients, feature-major and batch-major."""
    layer = make(name, 3, 5, **options)
    inputs = arguments(layer, T, N)
    feature_major = run(layer, inputs, lengths=lengths)
    assert {"replay_steps", "replay_backward_steps"} <= {*replayed}
    replayed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "MIN_STEPS", T + 1)
        batch_major = run(layer, inputs, lengths=lengths)
    assert not replayed
    return feature_major, batch_major


def check(feature_major: Any, batch_major: Any) -> None:
    for k, (one, other) in enumerate(zip(feature_major, batch_major, strict=True)):
        assert_close(one, other, "float64", f"result {k}")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_feature_major_equals_batch_major(
    name: str, N: int, lengths: str, replayed: list[str]
) -> None:
    options = {"bidirectional": True, "num_layers": 2}
    check(*both(name, N, LENGTHS[lengths](N), replayed, **options))
    check(*both(name, N, LENGTHS[lengths](N), replayed, bias=False))


@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_unrecorded_call_agrees(name: str, N: int, replayed: list[str]) -> None:
    layer = make(name, bidirectional=True)
    inputs = arguments(layer, T, N)
    recorded = arrays(layer(inputs["x"]))
    layer.eval()
    for one, other in zip(arrays(layer(inputs["x"])), recorded, strict=True):
        assert_close(one, other, "float64", "eval")


@pytest.mark.parametrize("name", LAYERS)
def test_only_what_a_step_reads_is_copied_in(
    name: str, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    """Otherwise a wrong declaration of a cell would only cost time."""
    original, captured = replay.replay, replay.repeating
    operands: list[np.ndarray] = []

    def noting_operands(calls: Any) -> Any:
        operands[:] = [item for call in calls for item in call.args[:-1]]
        return captured(calls)

    def checked(calls: Any, copied: Any, results: Any, run: Any) -> None:
        for array, _, _ in copied:
            assert any(np.may_share_memory(array, item) for item in operands)
        original(calls, copied, results, run)

    select_kernels("reference")
    layer = make(name)
    inputs = arguments(layer, T, 2)
    layer(inputs["x"])
    monkeypatch.setattr(replay, "repeating", noting_operands)
    monkeypatch.setattr(replay, "replay", checked)
    layer.backward(inputs["doutput"])


@pytest.mark.parametrize(("name", "part"), READ)
def test_an_input_that_is_not_copied_is_detected(
    name: str, part: str, replayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(one for one in CELLS[name].backward_reads if one != part)
    monkeypatch.setattr(CELLS[name], "backward_reads", others)
    # uninitialised memory may hold any value
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check(*both(name, 3, None, replayed))


def test_a_result_that_is_not_copied_is_detected(
    replayed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CELLS["gru"], "backward_writes", ("gates",))
    with pytest.raises(AssertionError):
        check(*both("gru", 3, None, replayed))


def test_each_call_reads_the_current_weights(replayed: list[str]) -> None:
    """No copy is kept between calls: every permitted write takes effect at the next call."""
    layer = make("lstm").eval()
    x = arguments(layer, T, 2)["x"]

    def scale() -> None:
        with layer.writable() as flat:
            flat *= 0.5

    state = layer.state_dict()
    for write in (
        scale,
        lambda: layer.parameters.update({"weight_hh_l0": 2 * layer.parameters["weight_hh_l0"]}),
        lambda: layer.parameters.__setitem__("bias_hh_l0", layer.parameters["bias_ih_l0"]),
        lambda: layer.load_state_dict(state),
    ):
        before = layer(x)[0]
        write()
        after = layer(x)[0]
        fresh = make("lstm").eval()
        fresh.load_state_dict(layer.state_dict())
        np.testing.assert_array_equal(after, fresh(x)[0])
        assert not np.array_equal(after, before)


def test_other_backends_and_kernels_are_batch_major(replayed: list[str]) -> None:
    """Only NumPy itself replays calls; pointwise kernels need batch-major arrays."""
    layer = make("gru")
    plan = layer._plan(T, 2)
    assert plan.replays and isinstance(plan.forward, ReplayLoop)
    for other in ({"xp": object()}, {"implementation": "pointwise"}):
        assert not replace(plan, **other).replays
