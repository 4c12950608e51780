"""σ and tanh of the CPU kernels: their accuracy, edge values, and generated code."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.numba_cases import SEQUENCE, faulty, needs_numba

pytestmark = needs_numba

ULPS = 4.0  # stated in the docstrings
LARGEST = {"float32": 88.0, "float64": 709.0}
UPCAST = {"float32": np.float64, "float64": np.longdouble}


def applied(module: Any, name: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function of one number, compiled over arrays."""
    import numba

    from xprnn.kernels.numba.jit import OPTIONS

    of_one = getattr(module, name)

    @numba.njit(**OPTIONS)
    def over(x: Any, out: Any) -> None:
        for i in range(x.size):
            out[i] = of_one(x[i])

    def call(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        over(x, out)
        return out

    return call


def exact(name: str, x: np.ndarray) -> np.ndarray:
    upcast = x.astype(UPCAST[x.dtype.name])
    return np.tanh(upcast) if name == "tanh" else 1 / (1 + np.exp(-upcast))


def sweep(dtype: str) -> np.ndarray:
    """A million and a half numbers: evenly, by magnitude down to subnormals, and near the ends."""
    most = LARGEST[dtype]
    tiny = np.log10(float(np.finfo(dtype).smallest_subnormal))
    apart = np.logspace(tiny + 1, np.log10(most) - 1e-6, 300_000)
    even = [np.linspace(-most, most, 500_001), np.linspace(-2, 2, 400_001)]
    return np.concatenate([*even, apart, -apart]).astype(dtype)


def largest_error(module: Any, name: str, dtype: str) -> float:
    """The largest error of normal results, in units in the last place."""
    x = sweep(dtype)
    actual, expected = applied(module, name)(x), exact(name, x)
    normal = np.abs(expected) >= np.finfo(dtype).tiny
    unit = np.spacing(np.abs(expected[normal]).astype(dtype)).astype(expected.dtype)
    return float((np.abs(actual[normal] - expected[normal]) / unit).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_errors_stay_below_the_stated_bound(name: str, dtype: str) -> None:
    from xprnn.kernels.numba import elementary

    if dtype == "float64" and np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("no type here is wider than float64")
    assert largest_error(elementary, name, dtype) <= ULPS


FAULTS = {
    "a coefficient in its fourth digit": ("q * r + of_type(y, 1.66666667e-1)",
                                         "q * r + of_type(y, 1.666e-1)"),
    "the second part of ln 2": ("-2.12194440e-4", "-2.12094440e-4"),
    "an absolute sigmoid": ("one / (one + (power * rest + power))",
                            "one - one / (one + one / (power * rest + power))"),
    "tanh without its own small numbers": ("e / (e + (one + one))",
                                           "one - (one + one) / (e + (one + one))"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_detected(fault: str) -> None:
    from xprnn.kernels.numba import elementary

    broken = faulty(elementary, FAULTS[fault])
    assert max(largest_error(broken, name, "float32") for name in ("sigmoid", "tanh")) > ULPS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_edges(dtype: str) -> None:
    from xprnn.kernels.numba import elementary

    small = float(np.finfo(dtype).smallest_subnormal)
    x = np.array([0.0, -0.0, small, -small, np.inf, -np.inf, np.nan, 1e30, -1e30], dtype)
    least = 1 / (1 + np.exp(np.longdouble(LARGEST[dtype])))
    sigmoid, tanh = (applied(elementary, name)(x) for name in ("sigmoid", "tanh"))
    np.testing.assert_allclose(
        sigmoid, np.array([0.5] * 4 + [1, least, np.nan, 1, least], dtype), rtol=1e-6
    )
    expected = np.array([0.0, 0.0, small, -small, 1, -1, np.nan, 1, -1], dtype)
    np.testing.assert_array_equal(tanh, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_position_in_a_vector_does_not_change_the_bits(dtype: str) -> None:
    from xprnn.kernels.numba import elementary

    x = np.random.default_rng(0).uniform(-9, 9, 999).astype(dtype)
    for name in ("sigmoid", "tanh"):
        function = applied(elementary, name)
        expected = function(x)
        for start in (1, 5, 990, 998):
            np.testing.assert_array_equal(function(x[start:].copy()), expected[start:])


VECTORS = {"x86_64": r"%[yz]mm\d", "AMD64": r"%[yz]mm\d", "aarch64": r"\bv\d+\.[24][sd]"}
# a division of a full register: a compiler may also pack two gates of one unit into half of one
X86 = r"\bvdivp[sd]\b.*%[yz]mm"
DIVISIONS = {"x86_64": X86, "AMD64": X86, "aarch64": r"\bfdiv\tv\d+\.[24][sd]"}
LIBM = re.compile(r"\b(?:v?(?:exp|expm1|tanh)f?|__svml\w+|_ZGV\w+)(?:@PLT)?\b")


def assembly(function: Any) -> str:
    (text,) = function.inspect_asm().values()
    return str(text)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("part", ["rnn_tanh_forward", "gru_forward", "gru_backward",
                                  "lstm_forward", "lstm_backward", "forward_reset"])  # fmt: skip
def test_gates_are_vector_instructions_without_calls(part: str, dtype: str) -> None:
    from xprnn.kernels.numba import cells

    machine = platform.machine()
    if machine not in VECTORS:
        pytest.skip(f"not known what vectors look like on {machine}")
    function = cells.OPS[part][0]
    fresh = compiled_again(function, cells.OPS[part][1], dtype)
    text = assembly(fresh)
    assert not LIBM.search(text), LIBM.search(text)
    assert len(re.findall(VECTORS[machine], text)) > 10
    if "forward" in part:
        assert re.search(DIVISIONS[machine], text)


def compiled_again(function: Any, does: str, dtype: str) -> Any:
    """A function compiled without the cache, which holds no assembly."""
    import numba

    from xprnn.kernels.numba import jit

    number = jit.number_of(np.dtype(dtype))
    kinds = {"r": jit.read(number, 2), "v": jit.read(number, 1), "w": jit.written(number, 2)}
    return numba.njit([tuple([kinds[kind] for kind in does])], **jit.OPTIONS)(function)


def test_a_call_of_libm_is_detected() -> None:
    from xprnn.kernels.numba import gates

    machine = platform.machine()
    if machine not in VECTORS:
        pytest.skip(f"not known what vectors look like on {machine}")
    ours = "from .elementary import of_type, sigmoid, tanh\n"
    theirs = "from math import tanh\nfrom .elementary import of_type, sigmoid\n"
    broken = faulty(gates, (ours, theirs))
    function = broken.rnn_tanh_forward

    def part(gates: Any, gh: Any, h_next: Any) -> None:
        function(gates, gh, None, None, (h_next,), None)

    text = assembly(compiled_again(part, "rrw", "float32"))
    assert LIBM.search(text)
    assert not re.search(DIVISIONS[machine], text)


def test_every_sequence_cell_has_a_definition() -> None:
    from xprnn.cells.shipped import BUILTIN
    from xprnn.kernels.numba import package as family

    assert family.SEQUENCE == SEQUENCE == tuple(BUILTIN)


def test_generated_loops_save_what_the_plain_code_does() -> None:
    """In the same columns, so that either can run the backward pass."""
    from xprnn.cells import CELLS
    from xprnn.cells.shipped import BUILTIN, builtin_cell

    H = 5
    for name in BUILTIN:
        cell = builtin_cell(name, H)
        assert cell.saved_size(H) == CELLS[name].saved_size(H)
        assert cell.state_sizes(H) == CELLS[name].state_sizes(H)
        assert cell.gates == CELLS[name].gates
