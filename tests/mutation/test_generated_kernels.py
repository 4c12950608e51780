"""Faults injected into the generation of CUDA kernels: each is caught by a layer's values."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import xprnn
from tests.layers.test_defined_layers import Case, check
from tests.mutation.test_definitions import faulty
from tests.support.definitions import DEFINITIONS
from tests.support.emulator.elementwise import needs_compiler
from tests.support.implementations import SelectKernels
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels.codegen import accumulation, cuda, launches
from xprnn.kernels.cuda import generated

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def generated_anew(fake_cupy: Backend, select_kernels: SelectKernels) -> Iterator[None]:
    """Cells are generated in each test, and not kept."""

    def forget() -> None:
        kernels.forget_plans()
        generated.generated_cell.cache_clear()

    forget()
    select_kernels("pointwise")
    yield
    forget()


@xprnn.cell(gates=("n",), states=("h", "k"))
def two_states(f: Any, x: Any, s: Any) -> Any:
    """The gradients of both states are one product."""
    n = f.tanh(x.n + f.recurrent(s.h + s.k).n)
    return n, f.sigmoid(n)


def assert_detected(name: str, fake_cupy: Backend) -> None:
    with pytest.raises(
        (AssertionError, RuntimeError), match=r": (\d|nan)|g\+\+ refuses(?s:.)*\bv\d+"
    ):
        check(Case(name), fake_cupy.name)


EXPRESSIONS = {  # the operation, the definition, and another expression
    "add": ("gru", "{0} - {1}"),
    "sub": ("gru", "{0} + {1}"),
    "mul": ("gru", "{0} + {1}"),
    "div": ("slstm", "{0} * {1}"),
    "neg": ("gru", "{0}"),
    "sigmoid": ("lstm", "tanh_of({0})"),
    "tanh": ("lstm", "sigmoid({0})"),
    "exp": ("slstm", "expm1_of({0})"),
    "expm1": ("every_function", "exp_of({0})"),
    "log": ("every_function", "log1p_of({0})"),
    "sqrt": ("every_function", "abs_of({0})"),
    "softplus": ("slstm", "softplus(-{0})"),
    "softsign": ("every_function", "tanh_of({0})"),
    "elu": ("every_function", "elu({0}, A(1.0))"),
    "relu": ("li_gru", "abs_of({0})"),
    "leaky_relu": ("every_function", "leaky_relu({0}, A(0.1))"),
    "hard_sigmoid": ("hard_gru", "hard_sigmoid({0}, {2}, {1})"),
    "abs": ("every_function", "{0}"),
    "minimum": ("every_function", "maximum({0}, {1})"),
    "maximum": ("every_function", "minimum({0}, {1})"),
    "clip": ("onnx_lstm", "clip({0}, {1}, -{1} + {2})"),
    "where": ("awkward", "{0} ? {2} : {1}"),
    "gt": ("awkward", "{0} <= {1}"),
    "ge": ("onnx_lstm", "{0} < {1}"),
    "lt": ("every_function", "{0} >= {1}"),
    "le": ("every_function", "{0} > {1}"),
    "columns": ("layer_norm_gru", "-{0}"),
}


@pytest.mark.parametrize("op", EXPRESSIONS)
def test_another_expression_is_detected(
    op: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, wrong = EXPRESSIONS[op]
    assert cuda.EXPRESSIONS[op] != wrong
    monkeypatch.setitem(cuda.EXPRESSIONS, op, wrong)
    assert_detected(name, fake_cupy)


def test_a_fault_is_for_every_expression() -> None:
    """No definition here compares for equality but at a tie, which random values do not have."""
    assert cuda.EXPRESSIONS.keys() - EXPRESSIONS.keys() == {"eq", "ne"}


TEXTS = {  # the definition, and a line of codegen/cuda.py with the fault
    "a store in another column": ("lstm", "if view.start:", "if False:"),
    "the row of another array": ("gru", 'setdefault(columns, f"r', 'setdefault(0, f"r'),
    "an element that counts other rows": (
        "gru",
        "(view.start, view.width, columns) == (0, width, width)",
        "(view.start, view.width) == (0, width)",
    ),
    "a condition stored as another one": ("awkward", "= {value} != 0;", "= {value} == 0;"),
    "another constant": ("onnx_lstm", 'text, f"A({text})"', 'text, f"A(1.01 * {text})"'),
    "a variance around 0": (
        "layer_norm_lstm",
        "({0} - mean) * ({0} - mean)",
        "({0} + mean) * ({0} + mean)",
    ),
    "a sum instead of a mean": ("layer_norm_gru", 'op.node.op != "row_sum"', "False"),
    "no eps": ("layer_norm_gru", " + {_literal(op.node.detail)}", ""),
    "the mean of one array": (
        "layer_norm_lstm",
        "for view in views:\n            value",
        "for view in views[:1]:\n            value",
    ),
}


def use(monkeypatch: pytest.MonkeyPatch, wrong: ModuleType) -> None:
    """Use the functions of a faulty module, with the types of the right ones."""
    for right in (cuda, launches):
        for name in ("Source", "KernelCall", "StepArrays", "Product", "Launches"):
            if hasattr(wrong, name) and hasattr(right, name):
                monkeypatch.setattr(wrong, name, getattr(right, name))
    for name in ("emit", "step_arrays", "launches"):
        if hasattr(wrong, name):
            monkeypatch.setattr(generated, name, getattr(wrong, name))


@pytest.mark.parametrize("fault", TEXTS)
def test_a_faulty_text_is_detected(
    fault: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = TEXTS[fault]
    use(monkeypatch, faulty(cuda, old, new))
    assert_detected(name, fake_cupy)


def test_a_load_after_a_store_is_detected(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = []

    def again(self: Any, loop: Any, is_alone: bool = False) -> list[str]:
        """All lines again after the first store."""
        lines = original(self, loop, is_alone)
        first, *rest = lines[-len(loop.stores) :]
        head = lines[: -len(loop.stores)]
        applied.append(bool(rest))
        if not rest:
            return lines
        head = [line.replace("const", "[[maybe_unused]] const") for line in head]
        return [*head, first, "{", *head, *rest, "}"]

    original = cuda._Emitter._loop
    monkeypatch.setattr(cuda._Emitter, "_loop", again)
    assert_detected("gru", fake_cupy)
    assert any(applied)


LAUNCHES = {  # the definition, and a line of codegen/launches.py with the fault
    "a part over another one": ("awkward", "start += width", "start += 0"),
    "the last part alone": ("awkward", "adds or start > 0", "adds"),
    "a product that is not added": ("gru", "op.out in added_to", "False"),
    "values over each other": ("layer_norm_gru", "sum(widths[:n])", "0"),
    "other rows": (
        "gru2014",
        "else (first, end), end - first",
        "else (0, end - first), end - first",
    ),
    "launches in another order": ("gru2014", "and not _depends(op, waiting)", ""),
}


@pytest.mark.parametrize("fault", LAUNCHES)
def test_faulty_launches_are_detected(
    fault: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = LAUNCHES[fault]
    use(monkeypatch, faulty(launches, old, new))
    assert_detected(name, fake_cupy)


SUMS = {  # the definition, and a line of codegen/accumulation.py with the fault
    "a gradient replaced before it is read": (
        "projected",
        "if any(view.overlaps(out) for view in reads):",
        "if False:",
    ),
    "a product that is read twice": ("two_states", "_uses(loop, each) == 1 for", "True for"),
    "a value that is not stored": ("gru", "out if p == value else p", "p"),
    "a term lost": (
        "li_gru",
        "if value is not None:\n            self.added_to",
        "if False:\n            self.added_to",
    ),
}


@pytest.mark.parametrize("fault", SUMS)
def test_a_faulty_sum_is_detected(
    fault: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, old, new = SUMS[fault]
    monkeypatch.setitem(DEFINITIONS, "two_states", two_states)
    check(Case("two_states"), fake_cupy.name)
    generated.generated_cell.cache_clear()
    kernels.forget_plans()
    wrong = faulty(accumulation, old, new)
    monkeypatch.setattr(launches, "accumulated", wrong.accumulated)
    assert_detected(name, fake_cupy)
