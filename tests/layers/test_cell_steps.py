"""Calls of a cell that are not recorded: a prepared step that equals the recorded call."""

from __future__ import annotations

import copy
import pickle
from time import sleep
from typing import Any

import numpy as np
import pytest

from tests.layers.test_stepper_memory import peak, switch_threads_often
from tests.support.cases import CELLS
from tests.support.implementations import Pool, use
from tests.support.targets import normal
from tests.support.tolerances import assert_close
from tests.unit.test_parameters import WAYS
from xprnn.engine.step import StepExecutor
from xprnn.nn import step_pool
from xprnn.nn.parameters import Parameters

__all__ = ["switch_threads_often"]
pytestmark = pytest.mark.usefixtures("implementation")


def make(name: str, I: int = 3, H: int = 5, **options: Any) -> Any:  # noqa: E741
    kind, defaults = CELLS[name]
    return kind(I, H, seed=0, **{"dtype": "float64", **defaults, **options})


def arguments(name: str, N: int, I: int = 3, H: int = 5, seed: int = 0) -> tuple[Any, Any]:  # noqa: E741
    x, h, c = (normal(3 * seed + k, N, width) for k, width in enumerate((I, H, H)))
    return x, (h, c) if name == "lstm" else h


def arrays(result: Any) -> list[np.ndarray]:
    return list(result) if isinstance(result, tuple) else [result]


def recorded(cell: Any, *args: Any) -> list[np.ndarray]:
    """The result of the recorded call by the reference code."""
    with use("reference"):
        return arrays(copy.deepcopy(cell).train()(*args))


def assert_equals_recorded(cell: Any, *args: Any) -> None:
    expected, dtype = recorded(cell, *args), cell.dtype.name
    for _ in range(2):  # the first call prepares the step, the second replays it
        for k, (actual, expected_state) in enumerate(
            zip(arrays(cell(*args)), expected, strict=True)
        ):
            assert actual.flags.c_contiguous
            assert_close(actual, expected_state.astype("f8"), dtype, f"state {k}")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_every_cell(name: str, bias: bool, dtype: str) -> None:
    for N, I, H in ((1, 3, 5), (4, 20, 33), (0, 3, 5)):  # noqa: E741
        cell = make(name, I, H, bias=bias, dtype=dtype)
        x, hx = arguments(name, N, I, H)
        x, hx = x.astype(dtype), tuple([state.astype(dtype) for state in arrays(hx)])
        hx = hx if len(hx) > 1 else hx[0]
        assert_equals_recorded(cell, x, hx)
        assert_equals_recorded(cell, x)
        if N == 1:
            alone = tuple([state[0] for state in arrays(hx)])
            actual = cell(x[0], alone if len(alone) > 1 else alone[0])
            for one, other in zip(arrays(actual), arrays(cell(x, hx)), strict=True):
                np.testing.assert_array_equal(one, other[0])


@pytest.mark.parametrize("name", CELLS)
def test_results_belong_to_the_caller(name: str) -> None:
    cell = make(name)
    x, hx = arguments(name, 2)
    first = arrays(cell(x, hx))
    copies = [state.copy() for state in first]
    cell(2 * x, hx)
    for one, other in zip(first, copies, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CELLS)
def test_written_parameters_take_effect_at_the_next_call(name: str, way: str) -> None:
    cell, args = make(name), arguments(name, 2)
    before = arrays(cell(*args))[0]
    WAYS[way](cell, {n: normal(k, *p.shape) for k, (n, p) in enumerate(cell.parameters.items())})
    assert_equals_recorded(cell, *args)
    assert not np.array_equal(before, arrays(cell(*args))[0])


def test_stale_weights_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: steps that copy the parameters only once."""
    original = StepExecutor.follow

    def follow(self: StepExecutor, parameters: Parameters) -> None:
        if self._version < 0:
            original(self, parameters)

    monkeypatch.setattr(StepExecutor, "follow", follow)
    with pytest.raises(AssertionError, match="relative error"):
        test_written_parameters_take_effect_at_the_next_call("gru", "writable")


def test_a_call_inside_a_writable_block_reads_the_current_values() -> None:
    cell, (x, h) = make("gru"), arguments("gru", 2)
    cell(x, h)
    with cell.writable() as flat:
        flat *= 0.5
        half = cell(x, h)
        flat *= 0.5
        quarter = cell(x, h)
    assert not np.allclose(half, quarter)
    np.testing.assert_allclose(cell(x, h), quarter, rtol=1e-12)


def test_a_moved_cell_prepares_new_steps() -> None:
    cell, (x, h) = make("gru"), arguments("gru", 2)
    cell(x, h)
    cell.to(dtype="float32")
    assert_equals_recorded(cell, x.astype("f4"), h.astype("f4"))
    cell.to(dtype="float64", precision="ieee")
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        np.testing.assert_array_equal(other(x, h), cell(x, h))


def test_eval_drops_prepared_steps() -> None:
    cell = make("gru")
    cell(*arguments("gru", 2))
    assert cell._steps._free
    cell.eval()
    assert not cell._steps._free


def test_calls_retain_no_memory() -> None:
    cell = make("gru", 64, 64)
    x, h = arguments("gru", 8, 64, 64)
    assert peak(lambda: cell(x, h)) < 2 * h.nbytes, "the result, and a view or two"


@pytest.mark.parametrize("shared", [False, True])
def test_each_thread_has_its_own_steps(
    shared: bool, switch_threads_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the injected fault, shared steps, results are wrong.

    Each thread waits before it reads the results of its step, so that others overwrite them.
    """
    original = StepExecutor.run

    def run_slowly(self: StepExecutor, *arguments: Any) -> Any:
        result = original(self, *arguments)
        sleep(1e-4)
        return result

    monkeypatch.setattr(StepExecutor, "run", run_slowly)
    if shared:
        alone: list[Any] = []

        class Shared(list[Any]):
            def pop(self, index: Any = -1) -> Any:
                if not alone:
                    alone.append(super().pop())
                return alone[0]

        monkeypatch.setattr(
            step_pool.StepPool,
            "_size",
            lambda self, *_: self.__dict__.setdefault("l", step_pool._Size(Shared(), True)),
        )
    cell, threads = make("lstm", 32, 32), 4
    args = [arguments("lstm", 3, 32, 32, seed=k) for k in range(threads)]
    expected = [cell(*one) for one in args]

    def call(k: int) -> bool:
        return all(np.array_equal(cell(*args[k]), expected[k]) for _ in range(100))

    with Pool(threads) as pool:
        equal = list(pool.map(call, range(threads)))
    assert all(equal) is not shared


def test_explain_names_the_implementation_of_the_step(implementation: str) -> None:
    cell = make("gru", dtype="float32")
    selected = "sequence" if implementation == "numba" else "reference"
    with use(selected):
        lines = cell.explain((2, 3)).splitlines()
    assert lines[0] == f"GRUCell(3, 5) on numpy, float32, L=1 N=2, one step: {selected}"
    assert lines[1].startswith("  reason: ") and selected in lines[1]
    assert "T=1 N=2" in cell.train().explain((2, 3)), "a recorded call is planned as of a layer"
    cell.eval()
    if implementation == "numba":
        assert "one step: sequence" in cell.explain((2, 3))
        with use("pointwise"):
            assert "T=1 N=2: pointwise" in cell.explain((2, 3))
            assert_equals_recorded(cell, *[a.astype("f4") for a in arguments("gru", 2)])


def test_compiled_steps_share_packed_weights(implementation: str) -> None:
    """Steps of all threads share them; steps of the reference code hold copies."""
    cell, every = make("gru"), []
    for N in (1, 2, 3):
        cell(*arguments("gru", N))
        (free,) = cell._steps._free.values()
        every.append(free.pop())  # as if another thread had acquired it
    if implementation == "reference":
        assert not cell.parameters.packed_weights
        return
    (packed,) = cell.parameters.packed_weights.values()
    assert {*packed.entries} == {"step"}
    for steps in every:
        arrays = steps._compiled._arrays
        assert all(one is other for one, other in zip(arrays, packed.entries["step"], strict=True))
