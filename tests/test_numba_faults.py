"""Faults planted in the CPU's kernels: each must show in the parity with the equations.

Each is a substitution in a source that fits in one place; the kernels are compiled anew with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cases import Case
from numba_parts import SEQUENCE, compare, faulty, needs_numba, several, uncached

pytestmark = needs_numba

# each by the pass that it shows in, which alone is compiled anew
GATES = {
    "a sign of n": ("gru", "forward", "tanh(n[j] + reset * inner)", "tanh(n[j] - reset * inner)"),
    "two gates exchanged": ("gru", "forward", "sigmoid(z[j] + gh_z[j])",
                            "sigmoid(z[j] + gh_r[j])"),
    "no recurrent bias": ("gru", "forward", "inner = gh_n[j] + bias_n[j]", "inner = gh_n[j]"),
    "dgx_z without z": ("gru", "backward", "(h[j] - new) * share * update", "(h[j] - new) * share"),
    "dgh_n that is dgx_n": ("gru", "backward", "n[j] = dgx_n * reset", "n[j] = dgx_n"),
    "dh that is not carried past": ("gru", "backward", "dh[j] = down * update", "dh[j] = 0 * down"),
    "a forget gate of 1": ("lstm", "forward", "cell = keep * c[j] + enter", "cell = c[j] + enter"),
    "dc of the next step alone": ("lstm", "backward", "down = dc[j] + (one -",
                                  "down = dc[j] + 0 * (one -"),
    "a factor of 1.001": ("lstm", "backward", "dc[j] = down * keep", "dc[j] = down * keep * 1.001"),
    "no slope of tanh": ("rnn_tanh", "backward", "(one - h_next[j] * h_next[j]) * dh[j]", "dh[j]"),
    "relu's slope everywhere": ("rnn_relu", "backward", "slope = one if h > zero else h",
                                "slope = one"),
}  # fmt: skip
LOOPS = {
    "the wrong rows of gx": ("forward", "mine = gx[place : place + rows]", "mine = gx[0:rows]"),
    "rows that join at zero": (
        "forward",
        "states[k][before + n] = initial[k][n]",
        "states[k][before + n] = initial[k][n] - initial[k][n]",
    ),
    "rows that join again": ("forward", "                joined = rows\n", ""),
    "forward's blocks in reverse": (
        "forward",
        "return (end, start) if reverse else (start, end)",
        "return (start, end)",
    ),
    "a slice that takes the first rows": (
        "forward",
        "take(x[at + low :], taken",
        "take(x[at:], taken",
    ),
    "a slice without its last row": (
        "forward",
        "rows = min(counts[t], high) - low\n            at -= counts[t] if reverse",
        "rows = min(counts[t], high - 1) - low\n            at -= counts[t] if reverse",
    ),
    "no gradient of the output": (
        "backward",
        "                if doutput.shape[0]:\n",
        "                if doutput.shape[0] < 0:\n",
    ),
    "the output's gradient of step 0": (
        "backward",
        "_add(doutput[first : first + rows], dnext[0])",
        "_add(doutput[:rows], dnext[0])",
    ),
    "dh that only adds": ("backward", "                if beside:\n", "                if True:\n"),
    "a slice that undoes the first rows": ("backward", "first = at + low\n", "first = at\n"),
}
PRODUCTS = {
    "the last column of a panel": ("packing", "filled = min(width, columns.shape[1])",
                                   "filled = min(width, columns.shape[1]) - 1"),
    "rows that are packed again": ("packing", "panels[p, rows])", "panels[p, : rows.stop - k])"),
    "the rest of a transpose": ("packing", "for k in range(whole, K):",
                                "for k in range(whole, K - 1):"),
    "weights the wrong way": ("packing", "source, place = columns[k], panel[k]",
                              "source, place = columns[-1 - k], panel[k]"),
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
    "dgx for dgh": ("        previous = layout.previous(",
                    "        cell.to_input_side(each.activations.gates, each.activations.saved)\n"
                    "        previous = layout.previous("),
    "dgh for dgx": ("        cell.to_input_side(each.activations.gates, each.activations.saved)\n",
                    "        pass\n"),
    "the states that follow": ("layout.previous(each.activations.states[0], each.reverse)",
                               "layout.previous(each.activations.states[0], not each.reverse)"),
    "rows of dx that stay": ("range(low, high, ROWS)", "range(low, high - ROWS, ROWS)"),
    "dx of the first rows": ("product.product(dgates[some], ", "product.product(dgates[:ROWS], "),
    "threads without the last columns": ("pairwise([*bounds, size])",
                                         "pairwise([*bounds, size - 1])"),
}  # fmt: skip
SUMS = {
    "rows below the last tile": ("for n in range(whole, rows):\n        _one_transposed",
                                 "for n in range(whole, rows - 1):\n        _one_transposed"),
    "a tile in another's place": ("_most_transposed(a[:, n:], panel, out[n:])",
                                  "_most_transposed(a[:, n:], panel, out[0:])"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Three threads; no kernel of a test before, none of this one for those after."""
    forget("forward", "backward", "packing", "gradients")
    with several(3):
        yield
    forget("forward", "backward", "packing", "gradients")


def forget(*passes: str) -> None:
    """Compile anew what serves these passes."""
    from xprnn.kernels.numba import gradients, sequence

    for name in passes:
        if name == "gradients":
            gradients._weights.cache_clear()
            gradients._input.cache_clear()
        else:
            getattr(sequence, f"_{name}").cache_clear()


def load(cell: str) -> None:
    """Have all that serves `check`; run nothing, for memory would hold what a fault leaves out."""
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
    """The fault that has been planted shows in this pass."""
    from xprnn.kernels.numba import gradients, sequence

    forget(where)
    for module in (gradients, sequence):
        monkeypatch.setattr(module, "compile_for", uncached)
    # where nobody wrote there may be anything: a NaN, of which NumPy warns
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
        if fault.startswith(("dg", "the states", "threads")):  # what is compiled has none
            monkeypatch.setattr(broken, name, getattr(gradients, name))
    monkeypatch.setattr(broken, "compile_for", uncached)
    monkeypatch.setattr(sequence, "gradients", broken)
    assert_shows("gru", "gradients", monkeypatch)


@pytest.mark.parametrize("fault", SUMS)
def test_a_fault_in_their_products_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import gradients, product

    load("gru")
    monkeypatch.setattr(gradients, "product", faulty(product, SUMS[fault]))
    assert_shows("gru", "gradients", monkeypatch)
