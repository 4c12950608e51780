"""A layer called with one step at a time in eval mode: it is taken as a stepper's step is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers.test_stepper_memory import hurry
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
__all__ = ["hurry"]
pytestmark = pytest.mark.usefixtures("implementation")


def make(cell: str, *sizes: int, **options: Any) -> Any:
    kind, own = LAYERS[cell]
    return kind(*sizes, seed=0, **{"dtype": "float64", **own, **options})


def arguments(cell: str, layers: int, N: int = 2, seed: int = 0) -> tuple[Any, Any]:
    """x (1, N, 3) and states (L, N, 5)."""
    x = normal(3 * seed, 1, N, 3)
    given = tuple([normal(3 * seed + k, layers, N, 5) for k in (1, 2)])
    return x, given if cell == "lstm" else given[0]


def flat(found: tuple[Any, Any]) -> list[np.ndarray]:
    """Output, h_n and c_n."""
    return [found[0], *states(found[1])]


def sequence(layer: Any, *given: Any, **options: Any) -> list[np.ndarray]:
    """What the plain code of the recorded call finds, all steps in one go."""
    with use("reference"):
        return flat(copy.deepcopy(layer).train()(*given, **options))


def taken(layer: Any) -> int:
    """How many steps are kept ready."""
    steps = layer._steps  # None where no call can be one
    return 0 if steps is None else sum(len(free) for free in steps._free.values())


def assert_right(layer: Any, *given: Any) -> None:
    expected, dtype = sequence(layer, *given), layer.dtype.name
    for _ in range(2):  # the first is made ready, the second is repeated
        for name, one, other in zip("yhc", flat(layer(*given)), expected, strict=False):
            assert one.flags.c_contiguous
            if dtype == "float64":
                assert error_of(one, other) <= STEPWISE, name
            assert_close(one, other.astype("f8"), dtype, name)
    assert taken(layer)


# -- by value


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case}-N{case.N}")
def test_every_layer(case: Case) -> None:
    layer, problem = build(case).eval(), draw(case)
    assert_right(layer, problem.x, packed(problem.initial) if case.states else None)


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
def test_torch_agrees(cell: str, dtype: str) -> None:
    """A sequence given step by step, as a port from torch does it."""
    torch = pytest.importorskip("torch")
    layer = make(cell, 19, 33, 2, dtype=dtype)
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell.split("_")[0]]
    other = kind(19, 33, 2, **LAYERS[cell][1]).double()
    other.load_state_dict({n: torch.tensor(p) for n, p in layer.state_dict().items()})
    x, hx, wanted = normal(0, 12, 3, 19).astype(dtype), None, None
    for x_t in x:
        output, hx = layer(x_t[None], hx)
        with torch.inference_mode():
            y, wanted = other(torch.tensor(x_t[None].astype("f8")), wanted)
        sizes = {"steps": 12, "width": 66, "layers": 2}
        for one, theirs in zip(flat((output, hx)), flat((y, wanted)), strict=True):
            assert_close(one, theirs.numpy(), dtype, **sizes)
    assert taken(layer)


def test_arrays_as_callers_have_them() -> None:
    """Read-only, strided, and of another order in memory."""
    layer, (x, (h, c)) = make("lstm", 3, 5, 2), arguments("lstm", 2, 4)
    expected = flat(layer(x, (h, c)))
    for change in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=2)[:, :, ::2]):
        given = [change(a) for a in (x, h, c)]
        for array in given:
            array.flags.writeable = False
        for one, other in zip(flat(layer(given[0], tuple(given[1:]))), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layers", [1, 2])
def test_results_are_the_callers(layers: int) -> None:
    layer, (x, hx) = make("lstm", 3, 5, layers), arguments("lstm", layers)
    first = flat(layer(x, hx))
    kept = [array.copy() for array in first]
    for k, array in enumerate(first):
        for other in first[k + 1 :]:
            assert not np.shares_memory(array, other)
    second = flat(layer(2 * x, hx))
    for array, copied in zip(first, kept, strict=True):
        np.testing.assert_array_equal(array, copied)
        array[...] = 7.0
    for one, other in zip(second, flat(layer(2 * x, hx)), strict=True):
        np.testing.assert_array_equal(one, other)


# -- the parameters, and threads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cell", LAYERS)
def test_what_is_written_counts_from_the_next_call(cell: str, way: str) -> None:
    layer, given = make(cell, 3, 5, 2), arguments(cell, 2)
    before, _ = layer(*given)
    WAYS[way](layer, {n: normal(k, *p.shape) for k, (n, p) in enumerate(layer.parameters.items())})
    assert_right(layer, *given)
    assert not np.array_equal(before, layer(*given)[0])


def test_inside_a_writable_block_the_numbers_count_as_they_are() -> None:
    layer, given = make("gru", 3, 5), arguments("gru", 1)
    layer(*given)
    with layer.writable() as flat_parameters:
        flat_parameters *= 0.5
        half, _ = layer(*given)
    np.testing.assert_allclose(layer(*given)[0], half, rtol=1e-12)


def test_eight_threads_on_one_layer(hurry: None) -> None:
    layer, threads, rounds = make("lstm", 3, 5, 2), 8, 40
    given = [arguments("lstm", 2, 1 + k % 3, seed=k) for k in range(threads)]
    expected = [flat(make("lstm", 3, 5, 2)(*one)) for one in given]

    def call(k: int) -> None:
        for _ in range(rounds):
            for one, other in zip(flat(layer(*given[k])), expected[k], strict=True):
                np.testing.assert_array_equal(one, other)

    with Pool(threads) as pool:
        for _ in pool.map(call, range(threads)):
            pass
    assert 1 <= taken(layer) <= threads


# -- which calls go this way


@pytest.mark.parametrize(
    "change",
    ["two steps", "both directions", "train mode", "a row of no step", "narrow", "many rows"],
)
def test_other_calls_go_the_sequences_way(change: str) -> None:
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
    assert not taken(layer)
    for one, other in zip((output, h_n), sequence(layer, x, lengths=lengths), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    if not lengths:
        assert f"T={len(x)} N={N}" in layer.explain(x.shape)
    if lengths:
        layer(x, lengths=[1, 1])
        assert taken(layer), "every row has its step"


def test_large_products_of_the_plain_code_do_not(implementation: str) -> None:
    layer, x = make("gru", 400, 400, dtype="float32"), np.ones((1, 8, 400), "f4")
    layer(x)
    assert bool(taken(layer)) is (implementation == "numba")


@pytest.mark.parametrize("forced", ["pointwise", "sequence"])
def test_forced_kernels_take_the_call(forced: str) -> None:
    pytest.importorskip("numba")
    layer, given = make("gru", 3, 5), arguments("gru", 1)
    expected = sequence(layer, *given)
    with use(forced):
        assert f"T=1 N=2: {forced}" in layer.explain((1, 2, 3))
        for one, other in zip(flat(layer(*given)), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9)
    assert not taken(layer)


def test_the_plain_code_can_be_forced() -> None:
    layer = make("gru", 3, 5)
    with use("reference"):
        assert_right(layer, *arguments("gru", 1))
    assert {name for name, _ in layer._steps._free} == {"reference"}


def test_explain_says_which_way_and_what_is_fastest(implementation: str) -> None:
    layer = make("gru", 3, 5, 2)
    lines = layer.explain((1, 4, 3)).splitlines()
    selected = "sequence" if implementation == "numba" else "reference"
    assert lines[0] == f"GRU(3, 5) on numpy, float64, L=2 N=4, one step: {selected}"
    assert lines[-1] == "  faster still, for it keeps the states: layer.stepper(4)"
    assert "stepper" not in layer.explain((2, 4, 3))
    assert "stepper" not in layer.train().explain((1, 4, 3))
    assert "layer.stepper" not in xprnn.GRUCell(3, 5).explain((4, 3))


def test_a_device_takes_its_own_way(fake_cupy: Backend) -> None:
    layer = make("gru", 3, 5, backend="fake_cupy")
    layer(fake_cupy.from_host(np.ones((1, 2, 3))))
    assert not taken(layer)
