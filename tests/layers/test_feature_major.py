"""Steps of the plain code by column, recorded, against the same steps on the packed rows."""

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

T = 3 * replay.ENOUGH
# rows: few; many, whose input side the steps take on themselves
ROWS = (1, 3, replay.WIDE)
LENGTHS: dict[str, Callable[[int], Any]] = {
    "full": lambda N: None,
    "some end": lambda N: [T - replay.ENOUGH * (n % 3) for n in range(N)],
    "short runs too": lambda N: [T - 3 * (n % 5) for n in range(N)],
}

READ = [(name, part) for name, cell in CELLS.items() for part in cell.backward_reads]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels) -> list[str]:
    """What was taken by column."""
    select_kernels("reference")
    calls: list[str] = []
    for name in ("replay_steps", "replay_backward_steps"):
        real = getattr(ReplayLoop, name)

        def counted(*given: Any, name: str = name, real: Any = real) -> None:
            calls.append(name)
            real(*given)

        monkeypatch.setattr(ReplayLoop, name, counted)
    return calls


def both(name: str, N: int, lengths: Any, taken: list[str], **options: Any) -> tuple[Any, Any]:
    """Results and gradients, by column and by row."""
    layer = make(name, 3, 5, **options)
    given = arguments(layer, T, N)
    by_column = run(layer, given, lengths=lengths)
    assert {"replay_steps", "replay_backward_steps"} <= {*taken}
    taken.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "ENOUGH", T + 1)
        by_row = run(layer, given, lengths=lengths)
    assert not taken
    return by_column, by_row


def check(by_column: Any, by_row: Any) -> None:
    for k, (one, other) in enumerate(zip(by_column, by_row, strict=True)):
        assert_close(one, other, "float64", f"result {k}")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_columns_and_rows_agree(name: str, N: int, lengths: str, taken: list[str]) -> None:
    options = {"bidirectional": True, "num_layers": 2}
    check(*both(name, N, LENGTHS[lengths](N), taken, **options))
    check(*both(name, N, LENGTHS[lengths](N), taken, bias=False))


@pytest.mark.parametrize("N", ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_an_unrecorded_call_agrees(name: str, N: int, taken: list[str]) -> None:
    layer = make(name, bidirectional=True)
    given = arguments(layer, T, N)
    recorded = arrays(layer(given["x"]))
    layer.eval()
    for one, other in zip(arrays(layer(given["x"])), recorded, strict=True):
        assert_close(one, other, "float64", "eval")


@pytest.mark.parametrize("name", LAYERS)
def test_no_more_is_copied_in_than_a_step_reads(
    name: str, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    """Else what a cell says of itself costs time, and nobody notices."""
    real, captured = replay.replay, replay.repeating
    operands: list[np.ndarray] = []

    def kept(calls: Any) -> Any:
        operands[:] = [item for call in calls for item in call.args[:-1]]
        return captured(calls)

    def noted(calls: Any, given: Any, left: Any, run: Any) -> None:
        for array, _, _ in given:
            assert any(np.may_share_memory(array, item) for item in operands)
        real(calls, given, left, run)

    select_kernels("reference")
    layer = make(name)
    given = arguments(layer, T, 2)
    layer(given["x"])
    monkeypatch.setattr(replay, "repeating", kept)
    monkeypatch.setattr(replay, "replay", noted)
    layer.backward(given["doutput"])


@pytest.mark.parametrize(("name", "part"), READ)
def test_what_is_not_copied_in_is_missed(
    name: str, part: str, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = tuple(one for one in CELLS[name].backward_reads if one != part)
    monkeypatch.setattr(CELLS[name], "backward_reads", others)
    # memory that nobody wrote may hold anything
    with pytest.raises(AssertionError), np.errstate(all="ignore"):
        check(*both(name, 3, None, taken))


def test_what_is_not_copied_out_is_missed(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CELLS["gru"], "backward_writes", ("gates",))
    with pytest.raises(AssertionError):
        check(*both("gru", 3, None, taken))


def test_weights_are_read_as_they_are_now(taken: list[str]) -> None:
    """Nothing of them is kept between calls: a write by any permitted way counts at the next."""
    layer = make("lstm").eval()
    x = arguments(layer, T, 2)["x"]

    def written() -> None:
        with layer.writable() as flat:
            flat *= 0.5

    state = layer.state_dict()
    for write in (
        written,
        lambda: layer.parameters.update({"weight_hh_l0": 2 * layer.parameters["weight_hh_l0"]}),
        lambda: layer.parameters.__setitem__("bias_hh_l0", layer.parameters["bias_ih_l0"]),
        lambda: layer.load_state_dict(state),
    ):
        before = layer(x)[0]
        write()
        found = layer(x)[0]
        fresh = make("lstm").eval()
        fresh.load_state_dict(layer.state_dict())
        np.testing.assert_array_equal(found, fresh(x)[0])
        assert not np.array_equal(found, before)


def test_a_stand_in_for_a_gpu_takes_rows(taken: list[str]) -> None:
    """Only NumPy itself repeats calls; kernels by element want rows."""
    layer = make("gru")
    plan = layer._plan(T, 2)
    assert plan.replays and isinstance(plan.forward, ReplayLoop)
    for other in ({"xp": object()}, {"implementation": "pointwise"}):
        assert not replace(plan, **other).replays
