"""The programs of steps, run element by element, against plain evaluation of their cells."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.support.definitions import DEFINITIONS, SIZES
from tests.support.program_interpreter import Interpreter
from tests.unit.test_random_definitions import random_definition
from xprnn.cells import Buffers
from xprnn.cells.definition.defined_cell import DefinedCell
from xprnn.cells.definition.step_program import Loop, ProductOp, backward_program, forward_program

N, H = 3, 4


def make(name: str) -> DefinedCell:
    return DEFINITIONS[name].cell(H, SIZES.get(name, {}), {}, True)


def weights_of(cell: DefinedCell, rng: np.random.Generator) -> Any:
    shapes = cell.weight_shapes(2, H, True)
    arrays = {name: rng.standard_normal(shape) * 0.5 for name, shape in shapes.items()}
    return cell.weights_type(**{name: arrays.get(name) for name in cell.weights_type._fields})


def buffers_of(cell: DefinedCell, masked: bool, rng: np.random.Generator) -> Buffers:
    sizes = cell.state_sizes(H)
    states = [rng.standard_normal((N, size)) for size in sizes]
    if "n" in cell.state_names:  # a divisor
        states[2] = abs(states[2]) + 0.5
    extra = [abs(rng.standard_normal((N, 1))) for _ in cell.extra_inputs]
    if masked:
        extra += [(rng.random((N, H)) < 0.5) * 1.0 for _ in cell.masks]
    return Buffers(
        rng.standard_normal((N, cell.gates * H)),
        np.full((N, cell.saved_size(H)), np.nan),
        tuple(states),
        tuple([np.full((N, size), np.nan) for size in sizes]),
        tuple([rng.standard_normal((N, size)) for size in sizes]),
        (),
        tuple(extra),
    )


def copy_of(step: Buffers) -> Buffers:
    return Buffers(
        *[
            tuple([a.copy() for a in each]) if isinstance(each, tuple) else each.copy()
            for each in step
        ]
    )


def assert_equal(step: Buffers, expected: Buffers, fields: tuple[str, ...]) -> None:
    for name in fields:
        ours, theirs = getattr(step, name), getattr(expected, name)
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=name)


def check(cell: DefinedCell, masked: bool, low_precision: bool) -> None:
    rng = np.random.default_rng(0)
    weights, step = weights_of(cell, rng), buffers_of(cell, masked, rng)
    options = {"masked": masked, "low_precision": low_precision}
    unrecorded, recorded, expected = (copy_of(step) for _ in range(3))
    cell.forward(np, weights, expected)
    for record, own in ((False, unrecorded), (True, recorded)):
        Interpreter(cell, forward_program(cell, record=record, **options), own, weights).run()
        assert_equal(own, expected, ("next_states", "states", "extra", "dstates"))
    assert_equal(unrecorded, step, ("gates", "saved"))
    backward = copy_of(expected)
    cell.backward(np, weights, backward)
    Interpreter(cell, backward_program(cell, **options), recorded, weights).run()
    assert_equal(recorded, backward, ("gates", "saved", "dstates", "states", "next_states"))


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_programs(name: str, low_precision: bool) -> None:
    cell = make(name)
    for masked in (False, True) if cell.masks else (False,):
        check(cell, masked, low_precision)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradients_of_vectors_are_added_up(name: str) -> None:
    """To what there is, and what `gradient_terms` sums is the same as without sums."""
    plain, rng = make(name), np.random.default_rng(0)
    cell = plain.adding_up()
    weights, step = weights_of(cell, rng), buffers_of(plain, False, rng)
    expected, start = copy_of(step), rng.standard_normal((N, cell.sums_size))
    own, sums = step._replace(saved=np.full((N, cell.saved_size(H)), np.nan)), start.copy()
    plain.forward(np, weights, expected)
    plain.backward(np, weights, expected)
    Interpreter(cell, forward_program(cell, record=True, masked=False), own, weights).run()
    Interpreter(cell, backward_program(cell, masked=False), own, weights, sums).run()
    assert_equal(own, expected, ("gates", "dstates"))

    def gradients(each: DefinedCell, buffers: Buffers, added: Any) -> dict[str, Any]:
        targets = each.weights_type(
            **{
                key: None if value is None else np.full_like(value, np.nan)
                for key, value in weights._asdict().items()
            }
        )
        states = lambda k: step.states[k], lambda k: expected.next_states[k]
        terms = each.gradient_terms(states, buffers.gates, buffers.saved, targets)
        if each is cell:
            terms += each.terms_of_sums(added, targets)
        for d, inputs, dweight, dbias in terms:
            if dweight is not None:
                dweight[...] = 0.0 if d is None else d.T @ inputs
            if dbias is not None:
                dbias[...] = 0.0 if d is None else d.sum(axis=0)
        return {key: v for key, v in targets._asdict().items() if v is not None}

    ours, theirs = gradients(cell, own, sums - start), gradients(plain, expected, None)
    for key, value in theirs.items():
        if key not in ("weight_ih", "bias_ih"):
            np.testing.assert_allclose(ours[key], value, rtol=1e-12, atol=1e-12, err_msg=key)


def test_layer_norm_saves_less_where_sums_are_added_up() -> None:
    """Of 18 numbers a unit, those of 14 vectors are left out but for the places of others."""
    cell = make("layer_norm_lstm")
    assert cell.saved_size(H) == 18 * H
    adding = cell.adding_up()
    assert (adding.saved_size(H), adding.sums_size) == (9 * H + 4, 14 * H)
    assert adding != cell


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    definition = random_definition(random.Random(seed))
    check(definition.cell(H, {}, {}, True), False, False)


def test_programs_of_the_gru() -> None:
    """Those of the hand-written kernels: one loop forward, two backward for dh and the product."""
    cell = make("gru")
    forward = forward_program(cell, record=True, masked=False)
    assert [type(each) for each in forward.operations] == [ProductOp, Loop]
    assert [each.width for each in forward.scratch] == [3 * H]
    backward = backward_program(cell, masked=False)
    assert [type(each) for each in backward.operations] == [Loop, ProductOp, Loop]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_in_low_precision_products_read_rounded_values_and_loops_accurate_ones(name: str) -> None:
    cell = make(name)
    for program in (
        forward_program(cell, record=True, masked=False, low_precision=True),
        backward_program(cell, masked=False, low_precision=True),
    ):
        operands = {
            ("scratch", k) for k, scratch in enumerate(program.scratch) if scratch.is_operand
        }
        low = {("gates", 0), ("saved", 0), ("states", 0), ("next_states", 0), *operands}
        for operation in program.operations:
            if isinstance(operation, ProductOp):
                assert operation.operand[:2] in low
            else:
                loaded = (
                    operation.loads.values() if isinstance(operation, Loop) else operation.operands
                )
                assert not {place[:2] for place in loaded} & operands


def test_gradients_of_gates_are_stored_once_in_low_precision() -> None:
    loop, *_ = backward_program(make("lstm"), masked=False, low_precision=True).operations
    assert isinstance(loop, Loop)
    assert [place.buffer for _, place in loop.stores] == ["gates"] * 4 + ["dstates"]
