"""A cell called with one batch size after another: one buffer, and captured calls for each size."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import numpy as np
import pytest

from tests.layers.test_cell_steps import arguments, arrays, make
from tests.layers.test_stepper_memory import switch_threads_often
from tests.support.cases import CELLS
from tests.support.implementations import Pool
from tests.support.targets import normal
from xprnn.engine import step
from xprnn.engine.step import StepExecutor

MANY = 64  # sizes whose captured calls are kept
__all__ = ["switch_threads_often"]
each_implementation = pytest.mark.usefixtures("implementation")


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the functions that create or capture steps, in order of their calls."""
    names: list[str] = []

    def count_calls(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            names.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count_calls(StepExecutor, "__init__")
    count_calls(step, "capture")
    return names


def executor_of(cell: Any) -> StepExecutor:
    """The step executor of a cell that one thread has called."""
    (free,) = cell._steps._free.values()
    (steps,) = free
    return steps


def same(actual: Any, expected: Any) -> None:
    for one, other in zip(arrays(actual), arrays(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@each_implementation
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_results_do_not_depend_on_previous_sizes(name: str, bias: bool, dtype: str) -> None:
    """To the last bit, for sizes that shrink, grow and return."""
    cell = make(name, 7, 9, bias=bias, dtype=dtype)
    for N in (6, 5, 3, 1, 0, 8, 7, 6, 1, 9, 8):
        x, hx = arguments(name, N, 7, 9, seed=N)
        x = x.astype(dtype)
        hx = tuple([state.astype(dtype) for state in arrays(hx)])
        hx = hx if len(hx) > 1 else hx[0]
        same(cell(x, hx), make(name, 7, 9, bias=bias, dtype=dtype)(x, hx))
    executor_of(cell)


def test_biases_of_another_size_are_detected(
    reference: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The injected fault: a size reuses the biases of another one in the shared memory.

    Compiled steps read one bias for all rows.
    """

    def work_on(self: StepExecutor, captured: Any) -> None:
        self.sides, self._x, self._inputs, self._biases, self._calls = captured

    monkeypatch.setattr(StepExecutor, "_select", work_on)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        test_results_do_not_depend_on_previous_sizes("gru", True, "float64")


@each_implementation
def test_repeated_sizes_create_nothing(created: list[str]) -> None:
    """As in a decoder whose hypotheses end one after the other."""
    cell, inputs = make("gru"), [arguments("gru", N) for N in range(MANY, 0, -1)]
    for x, h in inputs:
        cell(x, h)
    assert created.count("__init__") == 1
    created.clear()
    for x, h in inputs + inputs[::-1]:
        cell(x, h)
    assert not created


def test_a_larger_size_keeps_the_weights(implementation: str) -> None:
    cell = make("gru")
    cell(*arguments("gru", 2))
    before = [array for array, _ in executor_of(cell)._copies]
    assert bool(before) is (implementation == "reference")
    cell(*arguments("gru", 3))
    steps = executor_of(cell)
    assert [*steps._captured] == [3], "the calls of the smaller size used the smaller buffer"
    for one, (other, _) in zip(before, steps._copies, strict=True):
        assert one is other


@each_implementation
def test_all_sizes_share_one_buffer() -> None:
    cell = make("lstm")
    for N in (5, 4, 1):
        cell(*arguments("lstm", N))
    steps = executor_of(cell)
    assert [*steps._captured] == [5, 4, 1]
    largest = steps._captured[5]
    for captured in steps._captured.values():
        for one, other in zip(captured.sides, largest.sides, strict=True):
            for state, full in zip(one, other, strict=True):
                assert state.ctypes.data == full.ctypes.data


@each_implementation
def test_memory_stays_within_bounds() -> None:
    """Sizes 1 to 200 in order: a further round allocates nothing that stays."""
    cell = make("gru", 16, 16)

    def round_trip() -> int:
        for N in range(1, 201):
            cell(*arguments("gru", N, 16, 16))
        assert len(executor_of(cell)._captured) <= step.MAX_SIZES
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
    steps = executor_of(cell)
    held = [*steps._memory.values(), *steps._constants.values()]
    assert sum(array.nbytes for array in held) < 200 * 30 * 16 * 8


@each_implementation
def test_written_parameters_take_effect_at_every_size() -> None:
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


@each_implementation
def test_threads_with_different_sizes(switch_threads_often: None) -> None:
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
