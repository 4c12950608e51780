"""A layer called with one step at a time in eval mode runs prepared steps, as a stepper does."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers.test_stepper_memory import switch_threads_often
from tests.support.cases import LAYERS, TORCH_CELLS, Case, build, draw, product
from tests.support.implementations import Pool, use
from tests.support.streaming import packed, states
from tests.support.targets import normal
from tests.support.tolerances import assert_close, error_of
from tests.unit.test_parameters import WAYS
from xprnn.backend import Backend
from xprnn.diagnostics.tolerances import STEPWISE

CASES = tuple(
    replace(case, T=1, N=1 if case.states == case.batch_first else 4)
    for case in product(
        cell=LAYERS,
        layers=(1, 3),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        states=(True, False),
    )
)
__all__ = ["switch_threads_often"]
pytestmark = pytest.mark.usefixtures("implementation")


def make(cell: str, *sizes: int, **options: Any) -> Any:
    kind, defaults = LAYERS[cell]
    return kind(*sizes, seed=0, **{"dtype": "float64", **defaults, **options})


def arguments(cell: str, layers: int, N: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """x (1, N, 3) and states (L, N, 5)."""
    x = normal(3 * seed, 1, N, 3)
    hx = tuple([normal(3 * seed + k, layers, N, 5) for k in (1, 2)])
    return x, hx if cell == "lstm" else hx[0]


def flat(results: tuple[Any, Any]) -> list[np.ndarray]:
    """Output, h_n and c_n."""
    return [results[0], *states(results[1])]


def sequence(layer: Any, *args: Any, **options: Any) -> list[np.ndarray]:
    """Output and states of one recorded call by the reference code."""
    with use("reference"):
        return flat(copy.deepcopy(layer).train()(*args, **options))


def prepared_steps(layer: Any) -> int:
    """The number of prepared steps."""
    steps = layer._steps  # None if no call can be a single step
    return 0 if steps is None else sum(len(free) for free in steps._free.values())


def assert_equals_recorded(layer: Any, *args: Any) -> None:
    expected, dtype = sequence(layer, *args), layer.dtype.name
    for _ in range(2):  # the first call prepares the step, the second replays it
        for name, one, other in zip("yhc", flat(layer(*args)), expected, strict=False):
            assert one.flags.c_contiguous
            if dtype == "float64":
                assert error_of(one, other) <= STEPWISE, name
            assert_close(one, other.astype("f8"), dtype, name)
    assert prepared_steps(layer)


# -- by value


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-N{case.N}")
def test_every_layer(case: Case) -> None:
    layer, problem = build(case).eval(), draw(case)
    assert_equals_recorded(layer, problem.x, packed(problem.initial) if case.states else None)


@pytest.mark.parametrize("cell", LAYERS)
def test_without_a_batch_and_without_rows(cell: str) -> None:
    layer = make(cell, 3, 5, 2)
    x, hx = arguments(cell, 2, 1)
    alone = tuple([state[:, 0] for state in states(hx)])
    for one, other in zip(flat(layer(x[:, 0], packed(alone))), flat(layer(x, hx)), strict=True):
        np.testing.assert_array_equal(one, other[:, 0], strict=True)
    output, final = layer(np.zeros((1, 0, 3)))
    assert output.shape == (1, 0, 5)
    assert states(final)[0].shape == (2, 0, 5)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("cell", TORCH_CELLS)
def test_steps_equal_torch(cell: str, dtype: str) -> None:
    """A sequence passed step by step, as code ported from torch does."""
    torch = pytest.importorskip("torch")
    layer = make(cell, 19, 33, 2, dtype=dtype)
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell.split("_")[0]]
    other = kind(19, 33, 2, **LAYERS[cell][1]).double()
    other.load_state_dict({n: torch.tensor(p) for n, p in layer.state_dict().items()})
    x, hx, torch_hx = normal(0, 12, 3, 19).astype(dtype), None, None
    for x_t in x:
        output, hx = layer(x_t[None], hx)
        with torch.inference_mode():
            y, torch_hx = other(torch.tensor(x_t[None].astype("f8")), torch_hx)
        sizes = {"steps": 12, "width": 66, "layers": 2}
        for one, theirs in zip(flat((output, hx)), flat((y, torch_hx)), strict=True):
            assert_close(one, theirs.numpy(), dtype, **sizes)
    assert prepared_steps(layer)


def test_unusual_memory_layouts() -> None:
    """Read-only, strided, and of another order in memory."""
    layer, (x, (h, c)) = make("lstm", 3, 5, 2), arguments("lstm", 2, 4)
    expected = flat(layer(x, (h, c)))
    for change in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=2)[:, :, ::2]):
        args = [change(a) for a in (x, h, c)]
        for array in args:
            array.flags.writeable = False
        for one, other in zip(flat(layer(args[0], tuple(args[1:]))), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layers", [1, 2])
def test_results_belong_to_the_caller(layers: int) -> None:
    layer, (x, hx) = make("lstm", 3, 5, layers), arguments("lstm", layers)
    first = flat(layer(x, hx))
    copies = [array.copy() for array in first]
    for k, array in enumerate(first):
        for other in first[k + 1 :]:
            assert not np.shares_memory(array, other)
    second = flat(layer(2 * x, hx))
    for array, copied in zip(first, copies, strict=True):
        np.testing.assert_array_equal(array, copied)
        array[...] = 7.0
    for one, other in zip(second, flat(layer(2 * x, hx)), strict=True):
        np.testing.assert_array_equal(one, other)


# -- the parameters, and threads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", LAYERS)
def test_written_parameters_take_effect_at_the_next_call(cell: str, way: str) -> None:
    layer, args = make(cell, 3, 5, 2), arguments(cell, 2)
    before, _ = layer(*args)
    WAYS[way](layer, {n: normal(k, *p.shape) for k, (n, p) in enumerate(layer.parameters.items())})
    assert_equals_recorded(layer, *args)
    assert not np.array_equal(before, layer(*args)[0])


def test_a_call_inside_a_writable_block_reads_the_current_values() -> None:
    layer, args = make("gru", 3, 5), arguments("gru", 1)
    layer(*args)
    with layer.writable() as flat_parameters:
        flat_parameters *= 0.5
        half, _ = layer(*args)
    np.testing.assert_allclose(layer(*args)[0], half, rtol=1e-12)


def test_eight_threads_on_one_layer(switch_threads_often: None) -> None:
    layer, threads, rounds = make("lstm", 3, 5, 2), 8, 40
    args = [arguments("lstm", 2, 1 + k % 3, seed=k) for k in range(threads)]
    expected = [flat(make("lstm", 3, 5, 2)(*one)) for one in args]

    def call(k: int) -> None:
        for _ in range(rounds):
            for one, other in zip(flat(layer(*args[k])), expected[k], strict=True):
                np.testing.assert_array_equal(one, other)

    with Pool(threads) as pool:
        for _ in pool.map(call, range(threads)):
            pass
    assert 1 <= prepared_steps(layer) <= threads


# -- which calls run prepared steps


@pytest.mark.parametrize(
    "change",
    ["two steps", "both directions", "train mode", "a row of no step", "narrow", "many rows"],
)
def test_other_calls_run_as_sequences(change: str) -> None:
    options = {"bidirectional": True} if change == "both directions" else {}
    if change == "narrow":
        options |= {"dtype": "float32", "compute_dtype": "float16"}
    N = 65 if change == "many rows" else 2
    layer = make("gru", 3, 5, **options)
    if change == "train mode":
        layer.train()
    x = normal(0, 2 if change == "two steps" else 1, N, 3).astype(layer.dtype)
    lengths = [1, 0] if change == "a row of no step" else None
    output, h_n = layer(x, lengths=lengths)
    assert not prepared_steps(layer)
    for one, other in zip((output, h_n), sequence(layer, x, lengths=lengths), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    if not lengths:
        assert f"T={len(x)} N={N}" in layer.explain(x.shape)
    if lengths:
        layer(x, lengths=[1, 1])
        assert prepared_steps(layer), "every row has one step"


def test_large_products_of_the_reference_code_run_as_sequences(implementation: str) -> None:
    layer, x = make("gru", 400, 400, dtype="float32"), np.ones((1, 8, 400), "f4")
    layer(x)
    assert bool(prepared_steps(layer)) is (implementation == "numba")


@pytest.mark.parametrize("forced", ["pointwise", "sequence"])
def test_forced_kernels_run_the_call(forced: str) -> None:
    pytest.importorskip("numba")
    layer, args = make("gru", 3, 5), arguments("gru", 1)
    expected = sequence(layer, *args)
    with use(forced):
        assert f"T=1 N=2: {forced}" in layer.explain((1, 2, 3))
        for one, other in zip(flat(layer(*args)), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
    assert not prepared_steps(layer)


def test_the_reference_code_can_be_forced() -> None:
    layer = make("gru", 3, 5)
    with use("reference"):
        assert_equals_recorded(layer, *arguments("gru", 1))
    assert {name for name, _ in layer._steps._free} == {"reference"}


def test_explain_names_the_implementation_and_the_stepper(implementation: str) -> None:
    layer = make("gru", 3, 5, 2)
    lines = layer.explain((1, 4, 3)).splitlines()
    selected = "sequence" if implementation == "numba" else "reference"
    assert lines[0] == f"GRU(3, 5) on numpy, float64, L=2 N=4, one step: {selected}"
    assert lines[-1] == "  layer.stepper(4) is faster still: it keeps the states"
    assert "stepper" not in layer.explain((2, 4, 3))
    assert "stepper" not in layer.train().explain((1, 4, 3))
    assert "layer.stepper" not in xprnn.GRUCell(3, 5).explain((4, 3))


def test_a_device_prepares_no_steps(fake_cupy: Backend) -> None:
    layer = make("gru", 3, 5, backend="fake_cupy")
    layer(fake_cupy.from_host(np.ones((1, 2, 3))))
    assert not prepared_steps(layer)
