"""Steps by array calls with `out`, on rows and on columns, against plain evaluation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.definitions import DEFINITIONS
from tests.unit.test_programs import H, N, buffers_of, make, weights_of
from tests.unit.test_random_definitions import random_definition
from xprnn.cells import Buffers
from xprnn.cells.definition.defined_cell import DefinedCell
from xprnn.engine.replay import capture
from xprnn.kernels.codegen.numpy_cell import NumpyCell, on_numpy


@xprnn.cell(gates=("a", "b"), vectors=("u", "v"))
def apart(f: Any, x: Any, s: Any) -> Any:
    """A layer norm over values that are not side by side."""
    gh = f.recurrent(s.h)
    a, b = f.norm([f.tanh(x.a + gh.b), f.sigmoid(x.b) * gh.a], [f.u, f.v])
    return a + b * s.h


@xprnn.cell(gates=("a", "b"))
def quotients(f: Any, x: Any, s: Any) -> Any:
    """Divisions of columns side by side, one of them in place."""
    return f.softsign(x.a) + x.b / (1.5 + f.tanh(s.h))


OWN = {"apart": apart, "quotients": quotients}
# whose sums or products have other terms, or in another order; columns are multiplied differently
REORDERED = ("layer_norm_lstm", "layer_norm_gru", "every_function", "awkward")
# a step adds up to 16 terms, a dozen times: rounding errors of 200 units in the last place at most
UNITS = 200


def copied(step: Buffers, dtype: str, order: Any, in_place: bool = False) -> Buffers:
    """The buffers in a dtype and order; `in_place`: the next states are the states."""

    def convert(each: Any) -> Any:
        if isinstance(each, tuple):
            return tuple([convert(array) for array in each])
        return np.array(each, dtype, order=order)

    new = Buffers(*[convert(each) for each in step])
    return new._replace(next_states=new.states) if in_place else new


def scratch(cell: NumpyCell, backward: bool, like: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scratch arrays of NaN, and of conditions that hold."""
    sizes, order = cell.scratch_sizes(H, backward), "F" if like.flags.f_contiguous else "C"
    numbers = [np.full((N, width), np.nan, like.dtype, order=order) for width in sizes.numbers]
    conditions = [np.ones((N, width), bool, order=order) for width in sizes.conditions]
    return (*numbers, *conditions)


def run(cell: NumpyCell, weights: Any, step: Buffers, backward: bool) -> None:
    """A step; with arrays by columns by captured calls."""
    step = step._replace(scratch=scratch(cell, backward, step.gates))
    function = cell.backward if backward else cell.forward
    if step.gates.flags.c_contiguous:
        function(np, weights, step)
        return
    for call in capture(function, weights, step):
        call()


def assert_same(step: Buffers, expected: Buffers, fields: tuple[str, ...], exact: bool) -> None:
    for name in fields:
        ours, theirs = getattr(step, name), getattr(expected, name)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for a, b in pairs:
            if exact:
                np.testing.assert_array_equal(a, b, err_msg=name)
            else:
                bound = UNITS * np.finfo(b.dtype).eps
                np.testing.assert_allclose(a, b, rtol=bound, atol=bound, err_msg=name)


def check(cell: DefinedCell, dtype: str, order: str, record: bool, exact: bool) -> None:
    rng = np.random.default_rng(0)
    masked = record and bool(cell.masks)
    weights = [None if w is None else w.astype(dtype) for w in weights_of(cell, rng)]
    weights = cell.weights_type(*weights)
    step = buffers_of(cell, masked, rng)
    if "m" in cell.state_names and cell.initial_values[-1] == -np.inf:
        step.states[-1][0] = -np.inf  # a row that begins
    expected = copied(step, dtype, "C")
    cell.forward(np, weights, expected)
    ours = NumpyCell(cell, record)
    for in_place in (False, True):
        own = copied(step, dtype, order, in_place)
        run(ours, weights, own, False)
        assert_same(own, expected, ("next_states", "extra"), exact)
        if not record:
            assert_same(own, copied(step, dtype, "C"), ("gates", "saved"), True)
    if not record:
        return
    # the forward step left what backward reads, whatever it computed first
    own = copied(step, dtype, order)
    run(ours, weights, own, False)
    backward = copied(expected, dtype, "C")
    cell.backward(np, weights, backward)
    run(ours, weights, own, True)
    fields = ("gates", "saved", "dstates", "states", "next_states", "extra")
    assert_same(own, backward, fields, exact)


@pytest.mark.parametrize("order", ["C", "F"], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_steps_of_definitions(name: str, dtype: str, order: str) -> None:
    exact = order == "C" and name not in REORDERED
    for record in (False, True):
        check(make(name), dtype, order, record, exact)


@pytest.mark.parametrize("name", OWN)
def test_steps_of_other_definitions(name: str) -> None:
    for order in "CF":
        check(OWN[name].cell(H, {}, {}, True), "float64", order, True, False)


@pytest.mark.parametrize("seed", range(40))
def test_steps_of_random_definitions(seed: int) -> None:
    cell = random_definition(random.Random(seed)).cell(H, {}, {}, True)
    for order in "CF":
        check(cell, "float64", order, True, False)


def test_scratch_arrays_are_shared() -> None:
    """As many as values are in use at one time: of the GRU gh, r and z, and two more."""
    cell = NumpyCell(make("gru"), False)
    assert sorted(cell.scratch_sizes(H, False).numbers) == [H, H, 2 * H, 3 * H]


def test_gates_side_by_side_are_computed_together() -> None:
    """The LSTM's sigmoids by one call for each function, in the memory of the gates."""
    calls = NumpyCell(make("lstm"), True)._forward.calls
    assert [
        (call.function, call.out.buffer, call.out.width) for call in calls if call.out.width > H
    ] == [
        ("matmul", "scratch", 4 * H),
        ("add", "scratch", 4 * H),
        *((name, "gates", 2 * H) for name in ("multiply", "minimum", "exp", "add", "divide")),
    ]


def test_only_definitions_are_computed_so() -> None:
    cell = make("gru")
    assert isinstance(on_numpy(cell, True), NumpyCell) and on_numpy(cell, True).is_captured
    assert on_numpy(cell, True) is on_numpy(make("gru"), True) != on_numpy(cell, False)
    built_in = object()
    assert on_numpy(built_in, True) is built_in  # type: ignore[arg-type, comparison-overlap]


def test_what_backward_reads_and_writes() -> None:
    reads = {name: NumpyCell(make(name), True).backward_reads for name in DEFINITIONS}
    assert reads["lstm"] == ("gates", "saved", "c")
    assert reads["min_gru"] == ("gates",)
    assert reads["min_lstm"] == ("gates", "h", "h'")
    # the operands of products stay in `saved`, beside gradients that are written to it
    assert "saved" in reads["projected"]
    assert NumpyCell(make("projected"), True).backward_writes == ("gates", "saved")
