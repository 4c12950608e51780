"""Whole-sequence kernels on the host's fibers, beside the loop of `sequence.py` in float64.

The layer's input product is left out: W_ih is the identity, so that x is gx, and the plain loop
gets the very numbers, widened, that the kernel gets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from host_sequence import DTYPES, Faults, Run, Tiling, launch
from kernel_parts import dtype_of
from tolerances import assert_close

from xprnn import sequence
from xprnn.arithmetic import check_arithmetic
from xprnn.backend import get_backend
from xprnn.cells import CELLS, Weights
from xprnn.kernels import Engine, choose
from xprnn.layout import Layout, make_layout
from xprnn.scratch import Workspace

SPINS = 2**31
TAG = 7 << 24
ROUNDED = {"BF16": "bfloat16", "F16": "float16", "TF32": "tf32", "TF32X3": "float32"}
CANARY, GUARD = 0xA5, 64


def engine() -> Engine:
    return choose(CELLS["gru"], get_backend("numpy"), check_arithmetic("float64", None, "ieee"))


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy on a boundary of 16 bytes, with room on both sides that nobody may write."""
    whole = np.full(array.nbytes + 2 * GUARD + 16, CANARY, np.uint8)
    start = GUARD + -(whole.ctypes.data + GUARD) % 16
    copy = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def check_guards(**arrays: np.ndarray | None) -> None:
    for name, array in arrays.items():
        if array is not None:
            whole = array
            while isinstance(whole.base, np.ndarray):
                whole = whole.base
            start = array.ctypes.data - whole.ctypes.data
            outside = np.concatenate([whole[:start], whole[start + array.nbytes :]])
            assert (outside == CANARY).all(), f"the kernel writes outside {name}"


@dataclass(frozen=True)
class Case:
    """A direction of a layer with its numbers, as the kernels read them."""

    kind: str
    H: int
    lengths: tuple[int, ...]
    reverse: bool = False
    bias: bool = True
    seed: int = 0
    special: tuple[tuple[str, tuple[int, ...], float], ...] = ()  # array, place, value
    numbers: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    @cached_property
    def layout(self) -> Layout:
        lengths = np.array(self.lengths, np.intp)
        return make_layout(get_backend("numpy"), max(self.lengths), len(self.lengths), lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(DTYPES[self.kind])

    @property
    def padded(self) -> int:
        """The length of a row of the mailbox."""
        grain = 16 // self.dtype.itemsize
        return -(-self.H // grain) * grain

    def __post_init__(self) -> None:
        rng, H, S, N = np.random.default_rng(self.seed), self.H, self.layout.total, len(self.lengths)
        scale = 1 / np.sqrt(H)
        drawn = {
            "gx": rng.normal(0, 1, (S, 3 * H)),
            "weight_hh": rng.uniform(-scale, scale, (3 * H, H)),
            "h0": rng.uniform(-1, 1, (N, H)),
        }
        for name, value in drawn.items():
            self.numbers[name] = value.astype(self.dtype)
        bias = rng.uniform(-1, 1, 3 * H).astype(np.float32)
        bias[: 2 * H] = np.nan  # in gx already: the kernel must not read it
        self.numbers["bias_hh"] = bias
        self.numbers["doutput"] = rng.normal(0, 1, (S, H)).astype(np.float32)
        self.numbers["dh"] = rng.normal(0, 1, (N, H)).astype(np.float32)
        for name, place, value in self.special:
            self.numbers[name][place] = value

    def wide(self, name: str) -> np.ndarray:
        return self.numbers[name].astype(np.float64)

    def plain(self) -> tuple[sequence.Trace, Weights, np.ndarray]:
        """The trace of the plain loop in float64, its weights, and the final states (N, H)."""
        bias = None
        if self.bias:
            bias = self.wide("bias_hh")
            bias[: 2 * self.H] = 0
        zero = None if bias is None else np.zeros_like(bias)
        weights = Weights(np.eye(3 * self.H), self.wide("weight_hh"), zero, bias)
        kept = Workspace(get_backend("numpy"), np.dtype(np.float64))
        scratch = Workspace(get_backend("numpy"), np.dtype(np.float64))
        ends, x = (self.layout.sort(self.wide("h0")).copy(),), self.wide("gx")
        plain = engine()
        with np.errstate(all="ignore"):
            trace = sequence.forward(
                plain, weights, x, ends, self.layout, self.reverse, kept, scratch, True
            )
        return trace, weights, ends[0]


@dataclass
class Forward:
    """What the forward kernel left, in NumPy arrays; all but gates and saved are its own."""

    outcome: str
    gates: np.ndarray
    saved: np.ndarray | None
    states: np.ndarray
    report: int


def initial_rows(case: Case) -> np.ndarray:
    """Where the states begin for each row that runs, in packed order."""
    layout, first = case.layout, case.layout.running
    if not case.reverse:
        return np.arange(first)
    return layout.total + np.arange(first) if layout.ragged is None else layout.ragged.last


def run_forward(
    case: Case,
    tiling: Tiling,
    run: Run = Run(),
    passes: int = 1,
    faults: Faults = (),
    spins: int = SPINS,
    apart: bool | None = None,
) -> Forward:
    """Fill, launch, and look that nothing was written outside."""
    layout, H, P = case.layout, case.H, case.padded
    assert tiling.reduction >= H, "the tiling is too small for H"
    n_0, S, itemsize = layout.running, layout.total, case.dtype.itemsize
    gates = guarded(case.numbers["gx"])
    saved = guarded(np.zeros((S, H), case.dtype)) if tiling.record else None
    empty = np.full((n_0 + S) * P * itemsize, 0xFF, np.uint8).view(case.dtype)
    mail = guarded(empty.reshape(n_0 + S, P))
    apart = P != H if apart is None else apart
    states = guarded(np.zeros((n_0 + S, H), case.dtype)) if apart else mail
    h0 = layout.sort(case.numbers["h0"])[:n_0]
    mail[initial_rows(case)] = 0
    mail[initial_rows(case), :H] = states[initial_rows(case)] = h0
    counts = None if layout.ragged is None else guarded(np.array(layout.counts, np.int32))
    weight_hh = guarded(case.numbers["weight_hh"])
    bias = guarded(case.numbers["bias_hh"]) if case.bias else None
    report = guarded(np.zeros(1, np.uint32))
    arguments = (weight_hh, bias, gates, saved, states, mail, counts, layout.steps, n_0, H, S)
    arguments += (passes, int(case.reverse), spins, report, TAG)
    grid = (-(-H // 16), -(-n_0 // (8 * tiling.tiles * passes)))
    outcome = launch(tiling, arguments, grid, passes, run, faults)
    check_guards(weight_hh=weight_hh, gates=gates, saved=saved, states=states, mail=mail,
                 counts=counts, report=report)  # fmt: skip
    if outcome == "fine" and apart and not report[0]:
        assert np.array_equal(mail[:, :H], states, equal_nan=True), "mail and states differ"
        assert not mail[:, H:].any(), "padding is not zero"
    return Forward(outcome, gates, saved, states, int(report[0]))


def check_forward(case: Case, tiling: Tiling, **options: Any) -> None:
    """Fail unless the kernel ends and agrees with the plain loop, within rounding."""
    trace, _, _ = case.plain()
    left = run_forward(case, tiling, **options)
    assert left.outcome == "fine", left.outcome
    assert left.report == 0
    expected = {"states": trace.states[0]}
    if tiling.record:
        expected |= {"gates": trace.gates, "saved": trace.saved}
    else:
        assert left.gates.tobytes() == case.numbers["gx"].tobytes(), "gates were written"
    sizes = {"steps": max(case.lengths), "width": case.H, "layers": 1}
    for name, value in expected.items():
        actual = getattr(left, name).astype(np.float32)
        assert_close(actual, value, np.float32, name, ROUNDED[case.kind], **sizes)
