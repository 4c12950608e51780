"""Edge cases: empty arguments, sizes of one, saturation, infinities, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.control_bits import callers_environment
from tests.support.on_host import backward, forward, run
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    make,
    module_of,
)
from tests.support.tolerances import assert_close
from xprnn.backend import Backend, to_numpy
from xprnn.cells.numerics import sigmoid

DEEP = {"num_layers": 2, "bidirectional": True}
SEQUENCES = (*LAYERS, *FUNCTIONS)


def build(name: str, backend: Backend, **options: Any) -> Any:
    return make(name, **(DEEP if name in LAYERS else {}), backend=backend.name, **options)


def grads_of(subject: Any) -> np.ndarray:
    return to_numpy(module_of(subject).grads.flat)


def named(inputs: dict[str, np.ndarray], prefix: str, suffix: str) -> list[np.ndarray]:
    return [inputs[f"{prefix}{s}{suffix}"] for s in ("h", "c") if f"{prefix}{s}{suffix}" in inputs]


# -- empty arguments


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("T", "N"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("name", SEQUENCES)
def test_no_steps_or_no_rows(
    name: str, T: int, N: int, batch_first: bool, backend: Backend, implementation: str
) -> None:
    """Empty output, h_n = h0, and the gradient of h_n is that of h0; parameters get none."""
    subject = build(name, backend, batch_first=batch_first)
    inputs = arguments(subject, T, N)
    for lengths in (None, [0] * N if T == 0 else [T] * N):
        output, final = forward(subject, inputs, lengths=lengths)
        assert_same(output, inputs["doutput"])
        assert_same(final, named(inputs, "", "0"))
        dx, dinitial = backward(subject, inputs)
        assert_same(dx, inputs["x"])
        assert_same(dinitial, named(inputs, "d", "_n"))
        np.testing.assert_array_equal(grads_of(subject), 0.0)


@pytest.mark.parametrize("name", SEQUENCES)
def test_all_lengths_zero(name: str, backend: Backend, implementation: str) -> None:
    subject = build(name, backend)
    inputs = arguments(subject)
    output, final = forward(subject, inputs, lengths=[0, 0, 0])
    np.testing.assert_array_equal(output, np.zeros_like(inputs["doutput"]), strict=True)
    assert_same(final, named(inputs, "", "0"))
    dx, dinitial = backward(subject, inputs)
    np.testing.assert_array_equal(dx, np.zeros_like(inputs["x"]), strict=True)
    assert_same(dinitial, named(inputs, "d", "_n"))
    np.testing.assert_array_equal(grads_of(subject), 0.0)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_row_of_length_zero_keeps_its_state(
    name: str, backend: Backend, implementation: str
) -> None:
    """It returns h0 and passes its gradient on; the other rows are as without it."""
    subject = build(name, backend)
    inputs = arguments(subject, T=4, N=3)
    results = run(subject, inputs, lengths=[2, 0, 4])
    others = {n: np.ascontiguousarray(a[:, [0, 2]]) for n, a in inputs.items()}
    alone = run(subject, others, lengths=[2, 4])
    states = len(named(inputs, "", "0"))
    output, final, dx, dinitial = (
        results[0],
        results[1 : 1 + states],
        results[1 + states],
        results[2 + states : 2 + 2 * states],
    )
    np.testing.assert_array_equal(output[:, 1], 0.0)
    np.testing.assert_array_equal(dx[:, 1], 0.0)
    assert_same([a[:, 1] for a in final], [a[:, 1] for a in named(inputs, "", "0")])
    assert_same([a[:, 1] for a in dinitial], [a[:, 1] for a in named(inputs, "d", "_n")])
    for k, (one, other) in enumerate(zip(results, alone, strict=True)):
        rest = one[:, [0, 2]] if k < 2 + 2 * states else one
        assert_close(rest, other, "float64", f"array {k}")


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_without_rows(name: str, backend: Backend, implementation: str) -> None:
    cell = make(name, backend=backend.name)
    inputs = arguments(cell, N=0)
    state = arrays(forward(cell, inputs))
    assert all(array.shape == (0, 5) for array in state)
    dx, dstate = backward(cell, inputs)
    assert dx.shape == (0, 3)
    assert all(array.shape == (0, 5) for array in arrays(dstate))
    np.testing.assert_array_equal(grads_of(cell), 0.0)


# -- sizes of one


@pytest.mark.parametrize("name", LAYERS)
def test_one_step_equals_the_cell(name: str, backend: Backend, implementation: str) -> None:
    layer, cell = make(name, backend=backend.name), make(f"{name}_cell", backend=backend.name)
    cell.load_state_dict({n: layer.parameters[f"{n}_l0"] for n in cell.parameters})
    inputs = arguments(layer, T=1)
    results = run(layer, inputs)
    one = {n.removesuffix("0").replace("_n", "_next"): a[0] for n, a in inputs.items()}
    for n in [n for n in one if n.endswith("_next")]:
        one[n] = one[n] + (inputs["doutput"][0] if n == "dh_next" else 0.0)
    del one["doutput"]
    expected = run(cell, one)
    assert_same(results[0][0], expected[0])
    for k, (ours, theirs) in enumerate(zip(results[1:], expected, strict=True)):
        alike = ours[0] if ours.ndim > theirs.ndim else ours
        assert_close(alike, theirs, "float64", f"array {k}")


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("I", "H"), [(1, 1), (1, 5), (3, 1), (2, 17)])
@pytest.mark.parametrize("name", SEQUENCES)
def test_small_and_odd_sizes(
    name: str,
    I: int,  # noqa: E741
    H: int,
    T: int,
    backend: Backend,
    implementation: str,
) -> None:
    """A batch equals its rows one by one, and a batch of one row equals an unbatched call."""
    subject = build(name, backend, I=I, H=H)
    inputs = arguments(subject, T, N=3)
    results = run(subject, inputs)
    states = len(named(inputs, "", "0"))
    rows = [run(subject, {n: a[:, k : k + 1] for n, a in inputs.items()}) for k in range(3)]
    for k, full in enumerate(results):
        batched = k < 2 + 2 * states
        parts = [row[k] for row in rows]
        joined = np.concatenate(parts, axis=1) if batched else np.sum(parts, axis=0)
        assert_close(full, joined, "float64", f"array {k}")
    unbatched = run(subject, {n: a[:, 0] for n, a in inputs.items()})
    assert_same([a[:, 0] for a in rows[0][: 2 + 2 * states]], unbatched[: 2 + 2 * states])


# -- edge values


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sigmoid_at_edge_values(dtype: str) -> None:
    """No warning at any input; exact to a few units in the last place, however small σ is."""
    info = np.finfo(dtype)
    least = np.log(float(info.tiny))  # below it σ is subnormal
    ends = [info.max, 1e30, 1000.0, 89.0, 50.0, 17.0, 1.0, info.eps, info.tiny]
    ends += [float(info.smallest_subnormal), 0.0, np.inf]
    a = np.array([*ends, *(-end for end in ends), np.nan], dtype)
    a = np.concatenate([a, np.linspace(least, -least, 10_001).astype(dtype)])
    actual = a.copy()
    with np.errstate(all="raise", under="ignore"):
        sigmoid(np, actual)
    assert actual.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(a))

    higher = a.astype(np.longdouble)
    with np.errstate(all="ignore"):
        small = np.exp(-np.abs(higher))  # cannot overflow
        expected = np.where(higher >= 0, 1 / (1 + small), small / (1 + small))
    regular = np.abs(a) <= -least
    assert np.max(np.abs(actual[regular] / expected[regular] - 1)) <= 4 * info.eps
    assert np.nanmax(np.abs(actual - expected)) <= 4 * info.eps
    for value in (0.0, 1000.0, info.max, np.inf):
        np.testing.assert_array_equal(actual[a == value], 0.5 if value == 0.0 else 1.0)
        assert (actual[a == -value] <= max(info.tiny, 0.5 * (value == 0.0))).all()
    assert (np.diff(actual[-10_001:]) >= 0.0).all()
    assert np.nanmin(actual) >= 0.0
    assert np.nanmax(actual) <= 1.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_saturated_gates_do_not_warn(
    name: str, dtype: str, backend: Backend, implementation: str
) -> None:
    """Inputs far beyond saturation give finite results and gradients."""
    subject = make(name, dtype=dtype, backend=backend.name)
    inputs = arguments(subject)
    inputs["x"] *= np.dtype(dtype).type(1e6)
    with callers_environment(), np.errstate(all="raise", under="ignore"):
        results = run(subject, inputs)
    assert all(np.isfinite(array).all() for array in results)


@pytest.mark.parametrize("lengths", [None, [4, 3, 2]], ids=["full", "ragged"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", SEQUENCES)
def test_nan_in_a_row_stays_in_the_row(
    name: str, bad: float, lengths: Any, backend: Backend, implementation: str
) -> None:
    subject = build(name, backend)
    inputs = arguments(subject, T=4, N=3)
    expected = run(subject, inputs, lengths=lengths)
    with_bad = {n: a.copy() for n, a in inputs.items()}
    with_bad["x"][1, 1, 0] = bad
    with np.errstate(invalid="ignore"):
        results = run(subject, with_bad, lengths=lengths)
    with_rows = 2 + 2 * len(named(inputs, "", "0"))
    for k in range(with_rows):
        assert_same(results[k][:, [0, 2]], expected[k][:, [0, 2]], f"array {k}")
    if np.isnan(bad):
        assert np.isnan(results[0][1:3, 1]).all()
        assert np.isnan(results[-1]).any()  # and so are the parameters' gradients


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", SEQUENCES)
def test_padding_is_not_read(
    name: str, batch_first: bool, bad: float, backend: Backend, implementation: str
) -> None:
    """Values past the end of a row in x or doutput change no result."""
    subject = build(name, backend, batch_first=batch_first)
    inputs, lengths = arguments(subject, T=4, N=4), np.array([2, 0, 4, 1])
    past = np.arange(4)[:, None] >= lengths
    past = past.T if batch_first else past
    zeroed, filled = ({n: a.copy() for n, a in inputs.items()} for _ in range(2))
    for name_of_padded in ("x", "doutput"):
        zeroed[name_of_padded][past] = 0.0
        filled[name_of_padded][past] = bad
    with callers_environment(), np.errstate(all="raise", under="ignore"):
        results = run(subject, filled, lengths=lengths)
    assert all(np.isfinite(array).all() for array in results)
    assert_same(results, run(subject, zeroed, lengths=lengths))
    np.testing.assert_array_equal(results[0][past], 0.0)
    dx = results[1 + len(named(inputs, "", "0"))]
    np.testing.assert_array_equal(dx[past], 0.0)
    assert np.abs(dx[~past]).min() > 0.0
