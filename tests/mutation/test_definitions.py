"""Definitions with injected faults: each is caught by the tests of layers or of what is derived."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.layers import test_defined_layers as layers
from tests.layers import test_defined_replay as memory
from tests.layers.test_defined_layers import Case, check, plain_code  # noqa: F401 - a fixture
from tests.support.definitions import DEFINITIONS
from tests.unit import test_array_calls as arrays
from tests.unit import test_definitions as steps
from tests.unit import test_programs as programs
from xprnn import kernels
from xprnn.cells.definition import (
    defined_cell,
    definition,
    derived_step,
    gradient,
    phases,
    saving,
    step_program,
)
from xprnn.engine import checkpointing, loop, replay, stack
from xprnn.kernels import dispatch, shared
from xprnn.kernels.codegen import array_calls, numpy_cell


@pytest.fixture(autouse=True)
def derived_anew() -> Iterator[None]:
    """Cells are derived in each test, and not kept."""

    def forget() -> None:
        kernels.forget_plans()  # they have cells that are equal to the faulty ones
        shared.activation_shapes.cache_clear()
        numpy_cell._numpy_cell.cache_clear()
        for each in DEFINITIONS.values():
            each._bound.cache_clear()

    forget()
    yield
    forget()


def faulty(module: ModuleType, old: str, new: str) -> ModuleType:
    """A copy of a module with a fault, which occurs once in its source."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, source.count(old)
    copy = ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(source.replace(old, new), copy.__dict__)
    return copy


CELLS = {
    "a gradient overwritten before it is read": (
        "awkward",
        'value.copy() if node.op in ("upstream", "columns") else value',
        "value",
    ),
    "operands over each other": (
        "awkward",
        'self.operand_columns[product.operand] = "saved", start, end',
        'self.operand_columns[product.operand] = "saved", 0, end - start',
    ),
    "values saved over a pre-activation": (
        "multiplicative_lstm",
        "blocks.items() if gate not in spans",
        "blocks.items() if True",
    ),
    "b_hh that is not folded": ("lstm", "+= weights.bias_hh[", "+= 0.0 * weights.bias_hh["),
    "b_hh from dgx": (
        "gru",
        "if gate in derived.bias_folded",
        "if gate",
    ),
}


@pytest.mark.parametrize("fault", CELLS)
def test_a_faulty_cell_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = CELLS[fault]
    wrong = faulty(defined_cell, old, new)
    monkeypatch.setattr(definition, "DefinedCell", wrong.DefinedCell)
    with pytest.raises(AssertionError, match=r": \d"):
        check(Case(name, layers=2, directions=2))


GRADIENTS = {
    "a term lost": ("lstm", "adjoints[node] + share if node in adjoints else share", "share"),
    "parts in another order": (
        "gru",
        "adjoints.get(part, zero) for part in products[node].parts]",
        "adjoints.get(part, zero) for part in products[node].parts[::-1]]",
    ),
    "a part of another block": ("gru", "detail=(k * width, (k + 1) * width)", "detail=(0, width)"),
}


@pytest.mark.parametrize("fault", GRADIENTS)
def test_a_faulty_gradient_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = GRADIENTS[fault]
    wrong = faulty(gradient, old, new)
    for function in ("expand", "differentiate", "bias_folded_gates"):
        monkeypatch.setattr(derived_step, function, getattr(wrong, function))
    with pytest.raises(AssertionError, match=r": \d"):
        check(Case(name, layers=2, directions=2))


def test_a_branch_decided_by_rounding_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = faulty(saving, "again is Again.ROUNDED and node not in deciding", "again is not None")
    monkeypatch.setattr(derived_step, "choose", wrong.choose)
    with pytest.raises(AssertionError, match="="):
        steps.test_a_branch_is_decided_by_saved_bits("onnx_lstm")


PHASES = {
    "a product in the phase of what it reads": (
        "before + 1 if node.op in BARRIERS",
        "max(before, 0) if node.op in BARRIERS",
    ),
    "an operation after the sum that reads it": ("number[node] - is_barrier", "number[node]"),
    "an operation after one that reads it": ("target = min([first", "target = 1 + min([first"),
}


@pytest.mark.parametrize("fault", PHASES)
def test_a_faulty_phase_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = faulty(phases, *PHASES[fault])
    monkeypatch.setattr(derived_step, "phases", wrong.phases)
    with pytest.raises(AssertionError):
        steps.test_phases()


PROGRAMS = {
    "a value replaced before a later loop reads it": (
        "awkward",
        "first = max(first, k if same and before[read] == view else k + 1)",
        "pass",
    ),
    "parts of an operand over each other": ("gru", "start += width", "start += 0"),
}


@pytest.mark.parametrize("fault", PROGRAMS)
def test_a_faulty_program_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = PROGRAMS[fault]
    wrong = faulty(step_program, old, new)
    for each in ("Place", "Scratch", "ProductOp", "ReductionOp", "Loop", "Program"):
        setattr(wrong, each, getattr(step_program, each))
    monkeypatch.setattr(step_program, "_Builder", wrong._Builder)
    with pytest.raises((AssertionError, ValueError), match=r"tolerance|shape"):
        programs.test_programs(name, False)


ARRAY_CALLS = {  # the definition, and a line with the fault
    "another function": ("gru", '"tanh": "tanh"', '"tanh": "sin"'),
    "another comparison": ("every_function", '"le": "less_equal"', '"le": "greater"'),
    "a value that is not negated": ("slstm", "multiply", "add", "_neg"),
    "a sigmoid of another value": ("lstm", "exp", "exp2", "_sigmoid"),
    "another logarithm": ("slstm", "logaddexp", "logaddexp2", "_softplus"),
    "a softsign without sign": ("every_function", 'divide", a, y', 'divide", y, y', "_softsign"),
    "another bound of relu": ("li_gru", "0.0", "0.1", "_relu"),
    "another slope": ("every_function", "a, slope", "a, 1.0", "_leaky_relu"),
    "another side of elu": ("every_function", '"greater", a', '"less", a', "_elu"),
    "another slope of hard_sigmoid": ("hard_gru", "detail[0]", "detail[1]", "_hard_sigmoid"),
    "bounds that change places": ("onnx_lstm", "a, low", "a, high", "_clip"),
    "a selection without condition": ("awkward", ", where=condition", "", "_where"),
    "a sum of the first values": ("apart", "values[1:]", "values[2:]", "_row_sum"),
    "a mean of another number": (
        "apart",
        "sum(value.width",
        "max(value.width",
        "_row_mean",
    ),
    "no eps": ("layer_norm_lstm", '"add", y, eps', '"add", y, 1.0', "_row_rstd"),
    "blocks over each other": ("awkward", "column += stop - start", "column += 0"),
    "one block of several": ("awkward", 'emit("add", out, more', 'emit("add", out, out'),
    "sums over fewer columns": (
        "layer_norm_lstm",
        "width=joined[-1].width + view.width",
        "width=joined[-1].width",
    ),
    "a condition of other bits": ("awkward", '"not_equal", value', '"equal", value'),
    "states replaced before they are read": (
        "awkward",
        'return view._replace(buffer="states") if view.buffer == "next_states" else view',
        "return view",
    ),
    "a value replaced before it is read": (
        "gru",
        "if _overlap(read, out) and not (is_first and same) and not is_value:",
        "if False:",
    ),
    "a value stored over another one": ("awkward", "if _overlap(each.out, out):", "if False:"),
    "copies of another width": (
        "layer_norm_gru",
        "key = operand, width",
        "key = operand[:2], width",
    ),
    "values in the same array": ("gru", "if last.get(_array(view)) == k}", "}"),
    "values stored in turn": (
        "awkward",
        "if any(isinstance(value, Place) and value.overlaps(out) for _, out in loop.stores):",
        "if False:",
    ),
    "calls joined over what is between": (
        "gru",
        "if not any(_conflict(calls[last], each) for each in calls[first:last]):",
        "if True:",
    ),
    "calls joined after what is between": (
        "gru",
        "if not any(_conflict(calls[first], each) for each in calls[first + 1 : last + 1]):",
        "if True:",
    ),
    "calls joined that differ": ("gru", "if repr(one) != repr(other):", "if False:"),
    "arrays joined in another order": (
        "lstm",
        "both.part(one.width, other.width)",
        "both.part(0, other.width)",
    ),
    "an array joined to two": (
        "quotients",
        "pairs.setdefault(one, other) != other",
        "pairs.update({one: other})",
    ),
    "an array joined to itself": (
        "lstm",
        "once = len({*pairs, *pairs.values()}) == 2 * len(pairs)",
        "once = True",
    ),
    "conditions joined to numbers": ("awkward", "one.buffer != other.buffer or", ""),
    "columns joined to several": (
        "layer_norm_lstm",
        "if (one.width, other.width) != (a.out.width, b.out.width):",
        "if False:",
    ),
    "calls that are left out": ("gru", "read |= {_array(view) for view in call.reads}", "pass"),
}


@pytest.mark.parametrize("fault", ARRAY_CALLS)
def test_faulty_array_calls_are_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new, *where = ARRAY_CALLS[fault]
    if where:  # in one function
        source = inspect.getsource(getattr(array_calls, where[0]))
        assert source.count(old) >= 1, fault
        old, new = source, source.replace(old, new)
    wrong = faulty(array_calls, old, new)
    wrong.__dict__["Matrix"] = array_calls.Matrix
    monkeypatch.setattr(numpy_cell, "array_code", wrong.array_code)
    with pytest.raises((AssertionError, ValueError, KeyError, TypeError)):
        cell = {**DEFINITIONS, **arrays.OWN}[name].cell(arrays.H, {}, {}, True)
        for order in "CF":
            for record in (False, True):
                arrays.check(cell, "float64", order, record, False)


def test_no_fault_in_array_calls_is_not_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above fail because of the faults."""
    wrong = faulty(array_calls, "_FOLDED = (", "_FOLDED  = (")
    wrong.__dict__["Matrix"] = array_calls.Matrix
    monkeypatch.setattr(numpy_cell, "array_code", wrong.array_code)
    for name in DEFINITIONS:
        arrays.check(arrays.make(name), "float64", "F", True, False)


REPLAYS = {
    "inputs of the first step": (
        "continuous",
        "run.gates) for array, packed in pairs]\n        results:",
        "[0] * len(run.gates)) for array, packed in pairs]\n        results:",
    ),
    "vectors of an older call": (
        "onnx_lstm",
        "vector[...] = getattr(weights, name)\n        source",
        "pass\n        source",
    ),
    "assignments without conditions": (
        "li_gru",
        'call if where is None else partial(call, "same_kind", where.array)',
        "call",
    ),
    "sums over rows": (
        "layer_norm_gru",
        "np.add.reduce, item.array, axis",
        "np.add.reduce, item.array, 0",
    ),
    "conditions in the memory of others": (
        "every_function",
        "scratch = (*numbers, *as_bools(conditions))\n        step",
        "scratch = (*numbers, *as_bools(conditions[:1] * len(conditions)))\n        step",
    ),
}


@pytest.mark.parametrize("fault", REPLAYS)
def test_faulty_replays_are_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = REPLAYS[fault]
    wrong = faulty(replay, old, new)
    monkeypatch.setattr(stack, "ReplayLoop", wrong.ReplayLoop)
    with pytest.raises((AssertionError, ValueError), match=r": \d|broadcast|dimension"):
        check(Case(name, layers=2, T=16, lengths=None))


def test_steps_captured_for_an_unrecorded_call_are_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = faulty(replay, "with_input, threads, cell.records", "with_input, threads")
    monkeypatch.setattr(stack, "ReplayLoop", wrong.ReplayLoop)
    with pytest.raises(AssertionError):
        memory.test_a_recorded_call_after_an_unrecorded_one([])


def test_products_in_the_memory_of_operands_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy copies the operands."""
    wrong = faulty(array_calls, 'return self.function != "matmul"', "return True")
    wrong.__dict__["Matrix"] = array_calls.Matrix
    monkeypatch.setattr(numpy_cell, "array_code", wrong.array_code)
    with pytest.raises(AssertionError):
        memory.test_a_step_allocates_no_array("gru2014", 8)


@pytest.mark.parametrize("name", ["min_lstm", "projected"])
def test_a_buffer_that_is_not_declared_is_detected(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = faulty(numpy_cell, "return tuple(reads), tuple(writes)", "return (), tuple(writes)")
    monkeypatch.setattr(dispatch, "on_numpy", lambda cell, record: wrong.NumpyCell(cell, record))
    with pytest.raises(AssertionError, match=r": (\d|nan)"):
        check(Case(name, layers=2, T=16, lengths=None))


ENGINE = {
    "a mask of a sequence for each step": (
        shared,
        "extra_arrays",
        "recurrent_dropout",
        "key, time = extra.sequence_key, time * 0",
        "pass",
    ),
    "states that begin at zero": (
        stack,
        "_sorted_states",
        "awkward",
        "elif begin[k]:",
        "elif False:",
    ),
    "masks of another direction": (
        stack,
        "_extra_of",
        "zoneout",
        "which = layer, direction",
        "which = layer, 0",
    ),
}


@pytest.mark.parametrize("fault", ENGINE)
def test_a_fault_in_the_engine_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, attribute, name, old, new = ENGINE[fault]
    wrong: Any = getattr(faulty(module, old, new), attribute)
    for each in (stack, loop, replay):
        monkeypatch.setattr(each, attribute, wrong, raising=False)
    with pytest.raises(AssertionError, match=r": \d"):
        check(Case(name, layers=2, directions=2, states=False))


@pytest.mark.parametrize("name", ["zoneout", "continuous"])
def test_masks_and_inputs_of_another_segment_are_detected(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = faulty(checkpointing, "direction.extra.part(rows)", "direction.extra")
    monkeypatch.setattr(stack, "Checkpointed", wrong.Checkpointed)
    with pytest.raises(AssertionError, match=r": \d"):
        layers.test_recompute(name)
