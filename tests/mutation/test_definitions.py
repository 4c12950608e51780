"""Definitions with injected faults: each is caught by the tests of layers or of what is derived."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.layers import test_defined_layers as layers
from tests.layers.test_defined_layers import Case, check
from tests.support.definitions import DEFINITIONS
from tests.unit import test_definitions as steps
from tests.unit import test_programs as programs
from xprnn import kernels
from xprnn.cells.definition import (
    defined_cell,
    definition,
    derived_step,
    gradient,
    phases,
    program,
    saving,
)
from xprnn.engine import checkpointing, loop, stack
from xprnn.kernels import shared


@pytest.fixture(autouse=True)
def derived_anew() -> Iterator[None]:
    """Cells are derived in each test, and not kept."""

    def forget() -> None:
        kernels.forget_plans()  # they have cells that are equal to the faulty ones
        shared.activation_shapes.cache_clear()
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
        "min_lstm",
        "blocks.items() if node not in self.saved_columns",
        "blocks.items()",
    ),
    "b_hh that is not folded": ("lstm", "+= weights.bias_hh[", "+= 0.0 * weights.bias_hh["),
    "b_hh from dgx": (
        "gru",
        'key = "gates" if gate in derived.bias_folded else',
        'key = "gates" if True else',
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


def test_a_faulty_phase_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = faulty(phases, "before + 1 if is_barrier", "max(before, 0) if is_barrier")
    monkeypatch.setattr(derived_step, "phases", wrong.phases)
    with pytest.raises(AssertionError, match="gru"):
        steps.test_phases()


PROGRAMS = {
    "a value replaced before a later loop reads it": (
        "awkward",
        "first = max(first, k if same and before[read] == place else k + 1)",
        "pass",
    ),
    "parts of an operand over each other": ("gru", "start += width", "start += 0"),
}


@pytest.mark.parametrize("fault", PROGRAMS)
def test_a_faulty_program_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = PROGRAMS[fault]
    wrong = faulty(program, old, new)
    for each in ("Place", "Scratch", "ProductOp", "ReductionOp", "Loop", "Program"):
        setattr(wrong, each, getattr(program, each))
    monkeypatch.setattr(program, "_Builder", wrong._Builder)
    with pytest.raises((AssertionError, ValueError), match=r"tolerance|shape"):
        programs.test_programs(name, False)


ENGINE = {
    "a mask of a sequence for each step": (
        loop,
        "StepLoop",
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
    monkeypatch.setattr(stack, attribute, wrong)
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
