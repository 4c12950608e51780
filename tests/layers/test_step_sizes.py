"""A cell called with one batch size after another: one buffer, and calls kept for each size."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tests.layers.test_cell_steps import arguments, arrays, make
from tests.layers.test_stepper_memory import hurry
from tests.support.cases import CELLS
from tests.support.implementations import Pool
from tests.support.targets import normal
from xprnn.engine import step
from xprnn.engine.step import StepExecutor

MANY = 64  # sizes whose calls are kept
__all__ = ["hurry"]
pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the steps make anew, by name, in order."""
    found: list[str] = []

    def noting(owner: Any, name: str) -> None:
        genuine = getattr(owner, name)

        def note(*arguments: Any, **options: Any) -> Any:
            found.append(name)
            return genuine(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    noting(StepExecutor, "__init__")
    noting(step, "capture")
    return found


def only(cell: Any) -> StepExecutor:
    """The steps that a cell keeps ready, where one thread has called it."""
    (free,) = cell._steps._free.values()
    (steps,) = free
    return steps


def same(found: Any, expected: Any) -> None:
    for one, other in zip(arrays(found), arrays(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_each_size_gives_what_it_gives_alone(name: str, bias: bool, dtype: str) -> None:
    """To the last bit, whichever sizes came before: shrinking, growing and back."""
    cell = make(name, 7, 9, bias=bias, dtype=dtype)
    for N in (6, 5, 3, 1, 0, 8, 7, 6, 1, 9, 8):
        x, hx = arguments(name, N, 7, 9, seed=N)
        x = x.astype(dtype)
        hx = tuple([state.astype(dtype) for state in arrays(hx)])
        hx = hx if len(hx) > 1 else hx[0]
        same(cell(x, hx), make(name, 7, 9, bias=bias, dtype=dtype)(x, hx))
    only(cell)


def test_biases_of_another_size_are_found(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The injected fault: what a size has in the shared memory is taken for another's."""
    if implementation != "reference":
        pytest.skip("compiled steps read one bias for all rows")

    def work_on(self: StepExecutor, captured: Any) -> None:
        self.sides, self._x, self._biases, self._calls = captured

    monkeypatch.setattr(StepExecutor, "_work_on", work_on)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        test_each_size_gives_what_it_gives_alone("gru", True, "float64")


def test_sizes_in_turn_make_nothing_anew(made: list[str]) -> None:
    """As a decoder whose hypotheses end one after the other, again and again."""
    cell, given = make("gru"), [arguments("gru", N) for N in range(MANY, 0, -1)]
    for x, h in given:
        cell(x, h)
    assert made.count("__init__") == 1
    made.clear()
    for x, h in given + given[::-1]:
        cell(x, h)
    assert not made


def test_a_larger_size_keeps_the_weights(implementation: str) -> None:
    cell = make("gru")
    cell(*arguments("gru", 2))
    before = [place for place, _ in only(cell)._copies]
    assert bool(before) is (implementation == "reference")
    cell(*arguments("gru", 3))
    steps = only(cell)
    assert [*steps._captured] == [3], "the smaller one's calls had the smaller buffer"
    for one, (other, _) in zip(before, steps._copies, strict=True):
        assert one is other


def test_all_sizes_share_one_buffer() -> None:
    cell = make("lstm")
    for N in (5, 4, 1):
        cell(*arguments("lstm", N))
    steps = only(cell)
    assert [*steps._captured] == [5, 4, 1]
    largest = steps._captured[5]
    for captured in steps._captured.values():
        for one, other in zip(captured.sides, largest.sides, strict=True):
            for state, whole in zip(one, other, strict=True):
                assert state.ctypes.data == whole.ctypes.data


def test_memory_stays_within_bounds() -> None:
    """Sizes 1 to 200 in turn: the second round leaves nothing that the first did not."""
    cell = make("gru", 16, 16)

    def round_trip() -> int:
        for N in range(1, 201):
            cell(*arguments("gru", N, 16, 16))
        assert len(only(cell)._captured) <= step.SIZES
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        round_trip()
        first = round_trip()
        assert round_trip() - first < 200 * 200  # bytes a call, less than any array takes
    finally:
        tracemalloc.stop()
    # states, x, gates, what is saved, scratch, biases and constants, for 200 rows
    steps = only(cell)
    held = [*steps._memory.values(), *steps._constants.values()]
    assert sum(array.nbytes for array in held) < 200 * 30 * 16 * 8


def test_what_is_written_counts_in_every_size() -> None:
    cell = make("gru")
    for N in (4, 2):
        cell(*arguments("gru", N))
    cell.load_state_dict(
        {name: normal(k, *p.shape) for k, (name, p) in enumerate(cell.parameters.items())}
    )
    fresh = make("gru")
    fresh.load_state_dict(cell.state_dict())
    for N in (2, 4, 3):
        same(cell(*arguments("gru", N)), fresh(*arguments("gru", N)))


def test_threads_with_sizes_of_their_own(hurry: None) -> None:
    cell, threads, rounds = make("lstm", 16, 16), 8, 40
    sizes = [[1 + (k + r) % 7 for r in range(rounds)] for k in range(threads)]
    expected = {N: make("lstm", 16, 16)(*arguments("lstm", N, 16, 16)) for N in range(1, 8)}

    def call(k: int) -> None:
        for N in sizes[k]:
            same(cell(*arguments("lstm", N, 16, 16)), expected[N])

    with Pool(threads) as pool:
        for _ in pool.map(call, range(threads)):
            pass
    (free,) = cell._steps._free.values()
    assert 1 <= len(free) <= threads
