"""Faults injected into the CPU kernels: each must show in the parity with the reference code.

Each is a substitution of text that occurs once in a source; the kernels are recompiled with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from tests.support.cases import Case
from tests.support.numba_cases import SEQUENCE, compare, faulty, needs_numba, several, uncached

pytestmark = needs_numba

# with the pass in which each shows: only this pass is recompiled
GATES = {
    "a sign of n": ("gru", "forward", "tanh(n_row[j] + r * gh_n)", "tanh(n_row[j] - r * gh_n)"),
    "two gates exchanged": ("gru", "forward", "sigmoid(z_row[j] + gh_z_row[j])",
                            "sigmoid(z_row[j] + gh_r_row[j])"),
    "no recurrent bias": ("gru", "forward", "gh_n = gh_n_row[j] + bias_n_row[j]",
                          "gh_n = gh_n_row[j]"),
    "dgx_z without z": ("gru", "backward", "(h - n) * dn * z", "(h - n) * dn"),
    "dgh_n that is dgx_n": ("gru", "backward", "n_row[j] = dgx_n * r", "n_row[j] = dgx_n"),
    "dh that is not carried past": ("gru", "backward", "dh_row[j] = dh_next * z",
                                    "dh_row[j] = 0 * dh_next"),
    "a forget gate of 1": ("lstm", "forward", "c_next = f * c_row[j] + i", "c_next = c_row[j] + i"),
    "dc of the next step alone": ("lstm", "backward", "dc_next = dc_row[j] + (one -",
                                  "dc_next = dc_row[j] + 0 * (one -"),
    "a factor of 1.001": ("lstm", "backward", "dc_row[j] = dc_next * f",
                          "dc_row[j] = dc_next * f * 1.001"),
    "no slope of tanh": ("rnn_tanh", "backward", "(one - h_next * h_next) * dh", "dh"),
    "relu's slope everywhere": ("rnn_relu", "backward", "slope = one if h_next > zero else h_next",
                                "slope = one"),
}  # fmt: skip
LOOPS = {
    "the wrong rows of gx": ("forward", "gx_t = gx[gx_row : gx_row + rows]", "gx_t = gx[0:rows]"),
    "rows that join at zero": (
        "forward",
        "states[k][before + n] = initial[k][n]",
        "states[k][before + n] = initial[k][n] - initial[k][n]",
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
    "dh that only adds": ("backward", "                if direct:\n", "                if True:\n"),
    "a slice whose backward starts at the first row": (
        "backward",
        "first = start + low\n",
        "first = start\n",
    ),
}
PRODUCTS = {
    "the last column of a panel": ("packing", "filled = min(width, columns.shape[1])",
                                   "filled = min(width, columns.shape[1]) - 1"),
    "rows that are packed again": ("packing", "panels[p, rows])", "panels[p, : rows.stop - k])"),
    "the rest of a transpose": ("packing", "for k in range(full, K):",
                                "for k in range(full, K - 1):"),
    "weights the wrong way": ("packing", "source, target = columns[k], panel[k]",
                              "source, target = columns[-1 - k], panel[k]"),
    "a row too few": ("forward", "        if n < rows:\n", "        if n + 1 < rows:\n"),
    "sums that begin at another panel's bias": ("forward", "begin = at(start, p)",
                                                "begin = at(start, 0)"),
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
    "the columns of a broken panel": ("    if K % width:\n", "    if K % width > 1:\n"),
    "a bias without its last block": ("last = s + BLOCK >= S or", "last ="),
    "dgx for dgh": ("        previous = batch.previous(",
                    "        cell.to_input_side(each.activations.gates, each.activations.saved)\n"
                    "        previous = batch.previous("),
    "dgh for dgx": ("        cell.to_input_side(each.activations.gates, each.activations.saved)\n",
                    "        pass\n"),
    "the states that follow": ("batch.previous(each.activations.states[0], each.reverse)",
                               "batch.previous(each.activations.states[0], not each.reverse)"),
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


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Three threads; kernels are not shared with the tests before and after."""
    forget("forward", "backward", "packing", "gradients")
    with several(3):
        yield
    forget("forward", "backward", "packing", "gradients")


def forget(*passes: str) -> None:
    """Drop the compiled kernels of these passes."""
    from xprnn.kernels.numba import gradients, sequence

    for name in passes:
        if name == "gradients":
            gradients._weights.cache_clear()
            gradients._input.cache_clear()
        else:
            getattr(sequence, f"_{name}").cache_clear()


def load(cell: str) -> None:
    """Load all kernels of `check` but run none: memory would hold what a fault leaves out."""
    from xprnn.kernels.numba import gradients, sequence

    float32 = np.dtype("float32")
    gradients._weights(float32)
    gradients._input(float32)
    sequence._forward(cell, float32, True)
    sequence._backward(cell, float32)
    for name in ("pack", "pack_transposed"):
        sequence._packing(name, float32)


def check(cell: str) -> None:
    """Cases that pass without a fault."""
    compare(Case(cell, directions=2, lengths="zero", dtype="float32", H=40, I=20), "sequence")
    compare(Case(cell, directions=2, dtype="float32", N=15, H=33, I=34), "sequence")
    compare(Case(cell, dtype="float32", N=15, H=33, I=34), "sequence")
    compare(Case(cell, dtype="float32", N=65, T=5, H=33, I=34), "sequence")


def assert_shows(cell: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless the injected fault shows in this pass."""
    from xprnn.kernels.numba import gradients, sequence

    forget(where)
    for module in (gradients, sequence):
        monkeypatch.setattr(module, "compile_for", uncached)
    # uninitialised memory may hold a NaN, of which NumPy warns
    with pytest.raises(
        (AssertionError, RuntimeWarning), match=r"relative error|not finite|invalid"
    ):
        check(cell)


@pytest.mark.parametrize("cell", SEQUENCE)
def test_without_a_fault_nothing_shows(cell: str) -> None:
    check(cell)


@pytest.mark.parametrize("fault", GATES)
def test_a_fault_in_the_gates_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import gates, sequence

    cell, where, old, new = GATES[fault]
    load(cell)
    monkeypatch.setattr(sequence, "by_element", faulty(gates, (old, new)))
    assert_shows(cell, where, monkeypatch)


@pytest.mark.parametrize("fault", LOOPS)
def test_a_fault_in_the_loops_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import loops, sequence

    where, *change = LOOPS[fault]
    load("lstm")
    broken = faulty(loops, tuple(change))
    monkeypatch.setattr(sequence, f"{where}_loop", getattr(broken, f"{where}_loop"))
    assert_shows("lstm", where, monkeypatch)


@pytest.mark.parametrize("fault", PRODUCTS)
def test_a_fault_in_the_products_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import loops, product, sequence

    where, *change = PRODUCTS[fault]
    load("gru")
    broken = faulty(product, tuple(change))
    monkeypatch.setattr(sequence, "product", broken)
    monkeypatch.setattr(loops, "product", broken.product)
    assert_shows("gru", where, monkeypatch)


@pytest.mark.parametrize("fault", GRADIENTS)
def test_a_fault_in_the_gradients_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import gradients, sequence

    load("gru")
    broken = faulty(gradients, GRADIENTS[fault])
    for name in ("_weights", "_input"):
        if fault.startswith(("dg", "the states", "threads")):  # the compiled functions are correct
            monkeypatch.setattr(broken, name, getattr(gradients, name))
    monkeypatch.setattr(broken, "compile_for", uncached)
    monkeypatch.setattr(sequence, "gradients", broken)
    assert_shows("gru", "gradients", monkeypatch)


@pytest.mark.parametrize("fault", SUMS)
def test_a_fault_in_the_products_of_the_gradients_shows(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xprnn.kernels.numba import gradients, product

    load("gru")
    monkeypatch.setattr(gradients, "product", faulty(product, SUMS[fault]))
    assert_shows("gru", "gradients", monkeypatch)
