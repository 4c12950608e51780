"""Faults planted in the CPU's kernels: each must show in the parity with the equations.

Each is a substitution in a source that fits in one place; the kernels are compiled anew with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import Case
from numba_parts import compare, faulty, needs_numba, uncached

pytestmark = needs_numba

GATES = {
    "a sign of n": ("gru", "tanh(n[j] + reset * inner)", "tanh(n[j] - reset * inner)"),
    "two gates exchanged": ("gru", "sigmoid(z[j] + gh_z[j])", "sigmoid(z[j] + gh_r[j])"),
    "no recurrent bias": ("gru", "inner = gh_n[j] + bias_n[j]", "inner = gh_n[j]"),
    "dgx_z without z": ("gru", "(h[j] - new) * share * update", "(h[j] - new) * share"),
    "dgh_n that is dgx_n": ("gru", "n[j] = dgx_n * reset", "n[j] = dgx_n"),
    "dh that is not carried past": ("gru", "dh[j] = down * update", "dh[j] = 0 * down"),
    "a forget gate of 1": ("lstm", "cell = keep * c[j] + enter", "cell = c[j] + enter"),
    "dc of the next step alone": ("lstm", "down = dc[j] + (one -", "down = dc[j] + 0 * (one -"),
    "a factor of 1.001": ("lstm", "dc[j] = down * keep", "dc[j] = down * keep * 1.001"),
    "no slope of tanh": ("rnn_tanh", "(one - h_next[j] * h_next[j]) * dh[j]", "dh[j]"),
    "relu's slope everywhere": ("rnn_relu", "slope = one if h > zero else h", "slope = one"),
}
LOOPS = {
    "the wrong rows of gx": ("gx[at - ready : at - ready + rows]", "gx[0:rows]"),
    "rows that join at zero": ("_copy(initial, states, joined, rows, before)",
                               "_copy(initial, states, 0 * joined, 0 * rows, before)"),
    "rows that join again": ("            joined = rows\n", ""),
    "forward's blocks in reverse": (
        "before, after = (high, low) if reverse else (low, high)\n            _copy",
        "before, after = low, high\n            _copy"),
    "no gradient of the output": ("            if doutput.shape[0]:\n",
                                  "            if doutput.shape[0] < 0:\n"),
    "the output's gradient of step 0": ("_add(doutput[at : at + rows], dnext[0])",
                                        "_add(doutput[:rows], dnext[0])"),
    "dh that only adds": ("            if beside:\n", "            if True:\n"),
    "weights the wrong way": ("        pack(weight_hh, panels)\n",
                              "        pack(weight_hh[::-1], panels)\n"),
}  # fmt: skip
PRODUCTS = {
    "the last column of a panel": ("filled = min(width, columns - first)",
                                   "filled = min(width, columns - first) - 1"),
    "the rest of a transpose": ("for k in range(whole, K):", "for k in range(whole, K - 1):"),
    "a row too few": ("        if n < rows:\n", "        if n + 1 < rows:\n"),
    "sums that begin at another panel's bias": ("begin = at(start, p)", "begin = at(start, 0)"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Kernels are compiled anew, before a test without its faults and after it without them."""
    from xprnn.kernels.numba import sequence

    def forget() -> None:
        for made in (sequence._forward, sequence._backward):
            made.cache_clear()

    forget()
    yield
    forget()


def check(cell: str) -> None:
    """Cases that pass without a fault."""
    compare(Case(cell, directions=2, lengths="zero", dtype="float32", H=40, I=20), "sequence")
    compare(Case(cell, directions=2, dtype="float32", N=15, H=33, I=34), "sequence")


def assert_shows(cell: str) -> None:
    # where nobody wrote there may be anything: a NaN, of which NumPy warns
    with pytest.raises(
        (AssertionError, RuntimeWarning), match=r"relative error|not finite|invalid"
    ):
        check(cell)


@pytest.mark.parametrize("fault", GATES)
def test_a_fault_in_the_gates_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import gates, sequence

    cell, old, new = GATES[fault]
    check(cell)
    sequence._forward.cache_clear()
    sequence._backward.cache_clear()
    monkeypatch.setattr(sequence, "by_element", faulty(gates, (old, new)))
    monkeypatch.setattr(sequence, "compile_for", uncached)
    assert_shows(cell)


@pytest.mark.parametrize("fault", LOOPS)
def test_a_fault_in_the_loops_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import loops, sequence

    broken = faulty(loops, LOOPS[fault])
    monkeypatch.setattr(sequence, "forward_loop", broken.forward_loop)
    monkeypatch.setattr(sequence, "backward_loop", broken.backward_loop)
    monkeypatch.setattr(sequence, "compile_for", uncached)
    assert_shows("lstm")


@pytest.mark.parametrize("fault", PRODUCTS)
def test_a_fault_in_the_products_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import loops, product, sequence

    broken = faulty(product, PRODUCTS[fault])
    for name in ("pack", "pack_transposed", "product"):
        monkeypatch.setattr(loops, name, getattr(broken, name))
    monkeypatch.setattr(sequence, "compile_for", uncached)
    assert_shows("gru")
