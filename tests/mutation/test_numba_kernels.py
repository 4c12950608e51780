"""Faults injected into the CPU kernels: each must show in the parity with the reference code.

Each is a substitution of text that occurs once in a source; the kernels are recompiled with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

import xprnn
from tests.kernels.numba import test_definitions as definitions
from tests.support.cases import Case
from tests.support.numba_cases import (
    SEQUENCE,
    compare,
    faulty,
    forget_kernels,
    needs_numba,
    several,
    uncached,
)
from xprnn.cells import CELLS

pytestmark = needs_numba

# with the pass in which each shows: only this pass is recompiled
# none reads or writes beyond an array: that would harm later tests
EMITTER = {
    "a difference of the other sign": ("gru", '"{0} - {1}"', '"{1} - {0}"'),
    "a sum without its second term": ("lstm", '"{0} + {1}"', '"{0}"'),
    "a product that is a sum": ("rnn_tanh", '"{0} * {1}"', '"{0} + {1}"'),
    "a value that is not negated": ("gru", '"-{0}"', '"{0}"'),
    "another function": ("lstm", '"tanh({0})"', '"sigmoid({0})"'),
    "a selection of the other value": ("rnn_relu", '"{1} if {0} else {2}"', '"{2}"'),
    "values of another row": ("lstm", '[s]"', '[0]"'),
    "a factor of 1.001": ("lstm", "text = repr(float(value))",
                          "text = repr(1.001 * value)"),
    "what is stored in another array": ("lstm", "{names[view]}[j] {sign} {value}",
                                        "{first}[j] {sign} {value}"),
}  # fmt: skip
LOOPS = {
    "the wrong rows of gx": (
        "forward",
        "copy_leading(gx[gx_row : gx_row + rows], gates_t)",
        "copy_leading(gx[0:rows], gates_t)",
    ),
    "rows that join at zero": (
        "forward",
        "states[k][before + n, j] = initial[k][n, j]",
        "states[k][before + n, j] = initial[k][n, j] - initial[k][n, j]",
    ),
    "rows that join again": ("forward", "                active = rows\n", ""),
    "forward's blocks in reverse": (
        "forward",
        "return (end, begin) if reverse else (begin, end)",
        "return (begin, end)",
    ),
    "a slice that takes the first rows": (
        "forward",
        "copy_leading(x[start + low :], x_block",
        "copy_leading(x[start:], x_block",
    ),
    "a slice without its last row": (
        "forward",
        "rows = min(counts[t], high) - low\n            start -= counts[t] if reverse",
        "rows = min(counts[t], high - 1) - low\n            start -= counts[t] if reverse",
    ),
    "no gradient of the output": (
        "backward",
        "                if doutput.shape[0]:\n",
        "                if doutput.shape[0] < 0:\n",
    ),
    "the output's gradient of step 0": (
        "backward",
        "_add_leading(doutput[first : first + rows], dstates_t[0])",
        "_add_leading(doutput[:rows], dstates_t[0])",
    ),
    "a slice whose backward starts at the first row": (
        "backward",
        "first = start + low\n",
        "first = start\n",
    ),
}
PRODUCTS = {
    "the last column of a panel": ("filled = min(width, columns.shape[1])",
                                   "filled = min(width, columns.shape[1]) - 1"),
    "rows that are packed again": ("panels[p, rows])", "panels[p, : rows.stop - k])"),
    "the rest of a transpose": ("for k in range(full, K):",
                                "for k in range(full, K - 1):"),
    "weights the wrong way": ("source, target = columns[k], panel[k]",
                              "source, target = columns[-1 - k], panel[k]"),
    "a row too few": ("        if n < rows:\n", "        if n + 1 < rows:\n"),
    "sums that begin at another panel's bias": ("_four(a[n:], panel, start, p,",
                                                "_four(a[n:], panel, start, 0,"),
}  # fmt: skip
GRADIENTS = {
    "a lost last block": ("range(0, S, BLOCK)", "range(0, S - BLOCK, BLOCK)"),
    "the first block alone": ("range(0, S, BLOCK)", "range(0, min(S, BLOCK), BLOCK)"),
    "a step too few": ("block = dgates[s : s + BLOCK, low",
                       "block = dgates[s : min(s + BLOCK, S - 15), low"),
    "a block that begins where the one before did not end": ("block = dgates[s : s + BLOCK, low",
                                                             "block = dgates[s : s + 255, low"),
    "the first block's input": ("inputs[s : s + BLOCK, first:]", "inputs[:BLOCK, first:]"),
    "a slice that takes the first rows": ("s + BLOCK, low:high]", "s + BLOCK, : high - low]"),
    "the columns of a broken panel": ("    if K % width:\n        copy_leading",
                                      "    if K % width > 1:\n        copy_leading"),
    "a bias without its last block": ("last = s + BLOCK >= S or", "last ="),
    "the terms of another direction": ("[term for each in terms for term in each]",
                                       "[term for each in terms for term in terms[0]]"),
    "rows of dx that stay": ("range(low, high, ROWS)", "range(low, high - ROWS, ROWS)"),
    "dx of the first rows": ("product.product(dgates[rows], ", "product.product(dgates[:ROWS], "),
    "threads without the last columns": ("pairwise([*bounds, size])",
                                         "pairwise([*bounds, size - 1])"),
}  # fmt: skip
SUMS = {
    "rows below the last tile": ("for n in range(full, rows):\n        _one_transposed",
                                 "for n in range(full, rows - 1):\n        _one_transposed"),
    "a tile in another's place": ("_largest_transposed(a[:, n:], panel, out[n:])",
                                  "_largest_transposed(a[:, n:], panel, out[0:])"),
}  # fmt: skip


ADDED_UP = {  # the module, and a line with the fault
    "gradients that replace each other": ("emitter", 'sign = "+=" if', 'sign = "=" if'),
    "steps after the last block": ("loops", "== BLOCK - 1 or i == counts.size - 1:",
                                   "== BLOCK - 1:"),
    "a block that is added twice": ("loops", "            sums[n, j] = 0.0\n", ""),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Three threads; kernels are not shared with the tests before and after."""
    forget_kernels()
    with several(3):
        yield
    forget_kernels()


def load(cell: str) -> None:
    """Load all kernels of `check` but run none: memory would hold what a fault leaves out."""
    from xprnn.kernels.numba import sequence

    for compilation in sequence.needed(CELLS[cell], np.dtype("float32"), True):
        compilation()


def check(cell: str) -> None:
    """Cases that pass without a fault."""
    compare(Case(cell, directions=2, lengths="zero", dtype="float32", H=40, I=20), "sequence")
    compare(Case(cell, directions=2, dtype="float32", N=15, H=33, I=34), "sequence")
    compare(Case(cell, dtype="float32", N=15, H=33, I=34), "sequence")
    compare(Case(cell, dtype="float32", N=65, T=5, H=33, I=34), "sequence")


def assert_shows(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the injected fault shows in this pass."""
    from xprnn.kernels.numba import generated, gradients, sequence

    forget_kernels()
    for module in (generated, gradients, sequence):
        monkeypatch.setattr(module, "compile_for", uncached)
    # uninitialised memory may hold a NaN, of which NumPy warns
    with pytest.raises(
        (AssertionError, RuntimeWarning), match=r"relative error|not finite|invalid"
    ):
        check(cell)


@pytest.mark.parametrize("cell", SEQUENCE)
def test_without_a_fault_nothing_shows(cell: str) -> None:
    check(cell)


@pytest.mark.parametrize("fault", EMITTER)
def test_a_fault_in_the_emitter_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels import codegen
    from xprnn.kernels.numba import generated

    cell, old, new = EMITTER[fault]
    load(cell)
    broken = faulty(codegen.numba, (old, new))
    monkeypatch.setattr(generated, "emit", broken.emit)
    assert_shows(cell, monkeypatch)


@pytest.mark.parametrize("fault", LOOPS)
def test_a_fault_in_the_loops_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import generated, loops

    where, *change = LOOPS[fault]
    load("lstm")
    broken = faulty(loops, tuple(change))
    monkeypatch.setattr(generated, f"{where}_loop", getattr(broken, f"{where}_loop"))
    assert_shows("lstm", monkeypatch)


@pytest.mark.parametrize("fault", ADDED_UP)
def test_a_fault_in_what_is_added_up_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels import codegen
    from xprnn.kernels.numba import generated, loops

    where, *change = ADDED_UP[fault]
    broken = faulty(codegen.numba if where == "emitter" else loops, tuple(change))
    name = "emit" if where == "emitter" else "backward_loop"
    case = definitions.Case("layer_norm_gru", T=140, N=24, H=40, lengths=None)
    with xprnn.use_kernels("sequence"):
        definitions.compare(case, "float32")
        forget_kernels()
        monkeypatch.setattr(generated, name, getattr(broken, name))
        monkeypatch.setattr(generated, "compile_for", uncached)
        with pytest.raises(AssertionError, match="relative error"):
            definitions.compare(case, "float32")


@pytest.mark.parametrize("fault", PRODUCTS)
def test_a_fault_in_the_products_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import loops, product, sequence

    load("gru")
    broken = faulty(product, PRODUCTS[fault])
    monkeypatch.setitem(sys.modules, product.__name__, broken)  # generated code imports it
    monkeypatch.setattr(sequence, "product", broken)
    monkeypatch.setattr(loops, "product", broken.product)
    assert_shows("gru", monkeypatch)


@pytest.mark.parametrize("fault", GRADIENTS)
def test_a_fault_in_the_gradients_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import gradients, sequence

    load("gru")
    broken = faulty(gradients, GRADIENTS[fault])
    for name in ("_weights", "_input"):
        if fault.startswith(("the terms", "threads")):  # the compiled functions are correct
            monkeypatch.setattr(broken, name, getattr(gradients, name))
    monkeypatch.setattr(broken, "compile_for", uncached)
    monkeypatch.setattr(sequence, "gradients", broken)
    assert_shows("gru", monkeypatch)


@pytest.mark.parametrize("fault", SUMS)
def test_a_fault_in_the_products_of_the_gradients_shows(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xprnn.kernels.numba import gradients, product

    load("gru")
    monkeypatch.setattr(gradients, "product", faulty(product, SUMS[fault]))
    assert_shows("gru", monkeypatch)
