"""A fused kernel, the reference that it replaces in float64, and the bound on their difference.

The bound
---------
C is the compute dtype, A the accumulation dtype, u and v the largest relative errors of a rounding
to A and to C; v = 0 where C is A. The reference is computed in float64 from the same stored values,
so that only rounding differs.

Each method consists of sums and products of its inputs, σ and tanh. Every operation in A rounds by
a factor 1 + δ, |δ| <= u. The error of sums and products is then at most n u Σ |terms| (N. J.
Higham, "Accuracy and stability of numerical algorithms", section 3.3), with n the number of
roundings along the longest chain and Σ |terms| the same expression with absolute values and every
minus replaced by plus. σ and tanh do not amplify errors, and with |tanh a| <= |a| and σ(a) <= 1
the sums for a and for 1 + a bound those for their results. So the reference itself, run on absolute
values with `MAJORANT` as its array module, gives one value per element, the *majorant*, and

    |kernel - reference| <= n u majorant + v |reference| + w

with w for underflow: the smallest positive float16, and the smallest normal number of float32, as
CuPy compiles with subnormals flushed to zero; bfloat16 has the same range.

The longest chain is that of the GRU's h': 1 for gx + gh, 6 for σ (4 for exp, which CUDA gives as
2 units in the last place, 1 for the sum, 1 for the division), 2 for gh_n + b and its product with
r, 1 for the sum, 4 for tanh and 3 for n + z (h - n) make 17; n = 20 leaves a margin for u² terms.
For float64, where the reference rounds as well, u counts twice.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import HostElementwiseKernel
from xprnn.cells import CELLS, Buffers
from xprnn.kernels.cuda.cells import POINTWISE
from xprnn.kernels.cuda.pointwise import PointwiseKernel

try:
    from ml_dtypes import bfloat16
except ModuleNotFoundError:
    bfloat16 = None

ROUNDINGS = 20  # n
TYPES = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-52}
UNDERFLOW = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 0.0}

SIGMOID = ("r", "z", "i", "f", "o")  # gates in (0, 1); the others lie in (-1, 1)
WIDTHS = {"gh_rz": 2}  # in units of H; others have 1, gates and gh 1 per gate
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e3, -1e3, 0.5]
GUARD = 64  # guard elements before and after each array
CANARY = 0xA5

Arrays = dict[str, np.ndarray]


def needs_dtype(name: str) -> None:
    """Skip the test if NumPy does not have this dtype."""
    if name == "bfloat16" and bfloat16 is None:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(bfloat16 if name == "bfloat16" else name)


def draw(kernel: PointwiseKernel, C: str, N: int, H: int, seed: int = 0) -> Arrays:
    """Values as in a layer; arrays that the kernel only writes are filled with NaN."""
    rng = np.random.default_rng([seed, N, H])
    cell = CELLS[kernel.cell]
    values: Arrays = {}
    for buffer in kernel.buffers:
        blocks = cell.gates if buffer.name in ("gates", "gh", "bias_hh") else 1
        rows = () if buffer.name == "bias_hh" else (N,)
        shape = (*rows, WIDTHS.get(buffer.name, blocks) * H)
        if buffer.use == "out":
            value = np.full(shape, np.nan)
        elif buffer.name == "gates":
            value = np.concatenate([_gate(kernel, g, N, H, rng) for g in cell.gate_names], axis=1)
        elif buffer.name in ("h", "h_next") or (buffer.name, cell.name) == ("saved", "lstm"):
            value = rng.uniform(-1, 1, shape)
        else:
            value = rng.normal(0, 2, shape)
        if buffer.name == "h_next" and cell.name == "rnn_relu":
            value = np.maximum(value, 0)
        values[buffer.name] = value.astype(dtype_of(C if buffer.type == "C" else TYPES[C]))
    return values


def _gate(
    kernel: PointwiseKernel, gate: str, N: int, H: int, rng: np.random.Generator
) -> np.ndarray:
    """One block of `gates`: gx if the kernel has yet to apply the activation."""
    later = kernel.method == "forward_candidate" and gate != "n"
    if kernel.method.startswith("forward") and not later:
        return rng.normal(0, 2, (N, H))
    return rng.uniform(0 if gate in SIGMOID else -1, 1, (N, H))


def with_specials(kernel: PointwiseKernel, dtype: str) -> Arrays:
    """Arrays in which `SPECIAL` values occur in every operand."""
    arrays, rng = draw(kernel, dtype, 64, 33), np.random.default_rng(1)
    for buffer in kernel.buffers:
        array = arrays[buffer.name]
        values = (
            np.abs(SPECIAL) if (kernel.cell, buffer.name) == ("rnn_relu", "h_next") else SPECIAL
        )
        if buffer.use != "out":
            chosen = rng.choice(values, array.shape).astype(array.dtype)
            array[...] = np.where(rng.random(array.shape) < 0.3, chosen, array)
    return arrays


def run_fused(
    kernel: PointwiseKernel, arrays: Arrays, elementwise: type = HostElementwiseKernel
) -> Arrays:
    """Run the fused cell's method on copies; fail if it writes outside its outputs."""
    guarded = {name: np.empty(a.size + 2 * GUARD, a.dtype) for name, a in arrays.items()}
    copies: Arrays = {}
    for name, array in arrays.items():
        guarded[name].view(np.uint8)[...] = CANARY
        copies[name] = guarded[name][GUARD:-GUARD].reshape(array.shape)
        copies[name][...] = array
    xp = SimpleNamespace(ElementwiseKernel=elementwise)
    _call(POINTWISE[kernel.cell], kernel.method, xp, copies, ())
    for name, array in guarded.items():
        guards = np.concatenate([array[:GUARD], array[-GUARD:]]).view(np.uint8)
        assert (guards == CANARY).all(), f"{kernel.name} writes outside {name}"
    for buffer in kernel.inputs:
        name = buffer.name
        assert copies[name].tobytes() == arrays[name].tobytes(), f"{kernel.name} writes {name}"
    return copies


def run_plain(kernel: PointwiseKernel, arrays: Arrays, xp: Any = np) -> Arrays:
    """Run the reference cell's method in float64."""
    wide = {name: array.astype(np.float64) for name, array in arrays.items()}
    cell, (N, width) = CELLS[kernel.cell], arrays["gates"].shape
    H = width // cell.gates
    scratch = tuple([np.empty((N, width * H)) for width in cell.backward_scratch])
    wide.setdefault("h", np.full((N, H), np.nan))  # the LSTM takes its shape only
    with np.errstate(all="ignore"):
        _call(cell, kernel.method, xp, wide, scratch)
    return wide


def _call(cell: Any, part: str, xp: Any, arrays: Arrays, scratch: tuple[Any, ...]) -> None:
    """Call a method with the arrays that its parameters name, or None."""
    function = getattr(cell, part)
    step = Buffers(
        gates=arrays.get("gates"),
        saved=arrays.get("saved"),
        states=tuple([arrays.get(name) for name in cell.state_names]),
        next_states=tuple([arrays.get(f"{name}_next") for name in cell.state_names]),
        dstates=tuple([arrays.get(f"d{name}") for name in cell.state_names]),
        scratch=scratch,
    )
    arguments = {**arrays, "xp": xp, "step": step}
    function(**{name: arguments.get(name) for name in inspect.signature(function).parameters})


def _same(a: Any, *_: Any, out: np.ndarray) -> None:
    out[...] = a


# The reference's array module for absolute values: minus is plus, unary functions are identities
MAJORANT = SimpleNamespace(
    add=np.add,
    subtract=np.add,
    multiply=lambda a, b, out: np.multiply(a, np.abs(b), out=out),
    negative=_same,
    minimum=_same,
    maximum=_same,
    exp=_same,
    divide=lambda one, a, out: _same(a, out=out),
    tanh=_same,
    sign=lambda a, out: out.fill(1.0),
)


def excess(
    kernel: PointwiseKernel, arrays: Arrays, elementwise: type = HostElementwiseKernel
) -> float:
    """The largest error of the kernel in units of its bound; infinite where inf or NaN differ."""
    C = arrays["gates"].dtype.name
    after, plain = run_fused(kernel, arrays, elementwise), run_plain(kernel, arrays)
    finite = {n: np.nan_to_num(np.abs(a.astype(float)), posinf=1e3) for n, a in arrays.items()}
    majorant = run_plain(kernel, finite, MAJORANT)
    return max(
        _ratio(after[b.name], plain[b.name], majorant[b.name], TYPES[C]) for b in kernel.outputs
    )


def _ratio(actual: np.ndarray, expected: np.ndarray, majorant: np.ndarray, A: str) -> float:
    """The largest error in units of its bound, in one array."""
    stored = actual.dtype.name
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = expected.astype(actual.dtype).astype(float)  # a 16-bit type may overflow
    actual, finite = actual.astype(float), np.isfinite(rounded)
    special = np.where(np.isfinite(actual), 0, actual)
    if not np.array_equal(special, np.where(finite, 0, rounded), equal_nan=True):
        return np.inf
    allowed = ROUNDINGS * ROUNDOFF[A] * majorant[finite] + UNDERFLOW[stored]
    if stored != A:
        allowed += ROUNDOFF[stored] * np.abs(expected[finite])
    error = np.abs(actual[finite] - expected[finite])
    return float(np.divide(error, allowed, out=error, where=error > 0).max(initial=0.0))
