"""Whole-sequence kernels on the host's fibers, beside the loop of `sequence.py` in float64.

The layer's input product is left out: W_ih is the identity, so that x is gx, and the plain loop
gets the very numbers, widened, that the kernel gets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
IN_ORDER = Run()
TAG = 7 << 24
ROUNDED = {"BF16": "bfloat16", "F16": "float16", "TF32": "tf32", "TF32X3": "float32"}
CANARY, GUARD = 0xA5, 1 << 14  # bytes; a faulty kernel may read some rows too many


class Copying:
    """NumPy, but for a product with the transpose of one identity: there NaN must stay put."""

    def __init__(self, identity: np.ndarray) -> None:
        self._identity = identity

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        if np.shares_memory(b, self._identity):
            out[...] = a
        else:
            np.matmul(a, b, out=out)


def engine(identity: np.ndarray) -> Engine:
    arithmetic = check_arithmetic("float64", None, "ieee")
    return replace(
        choose(CELLS["gru"], get_backend("numpy"), arithmetic, (1, 1, 1), True),
        xp=Copying(identity),
    )


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
    upstream: bool = True  # whether a gradient of the outputs arrives
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
        rng, H, S, N = (
            np.random.default_rng(self.seed),
            self.H,
            self.layout.total,
            len(self.lengths),
        )
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

    @cached_property
    def weights(self) -> Weights:
        """In float64, with W_ih = 1; b_hh is that of n."""
        if not self.bias:
            return Weights(np.eye(3 * self.H), self.wide("weight_hh"), None, None)
        bias = self.wide("bias_hh")
        bias[: 2 * self.H] = 0
        return Weights(np.eye(3 * self.H), self.wide("weight_hh"), np.zeros_like(bias), bias)

    def plain(self) -> sequence.Trace:
        """The trace of the plain loop in float64."""
        ends, x = (self.layout.sort(self.wide("h0")).copy(),), self.wide("gx")
        plain, memory = engine(self.weights.weight_ih), workspaces()
        with np.errstate(all="ignore"):
            return sequence.forward(
                plain, self.weights, x, ends, self.layout, self.reverse, *memory, record=True
            )

    def rounded_trace(self) -> sequence.Trace:
        """The trace as forward leaves it: in the type that products read."""
        trace = self.plain()
        kept = [array.astype(self.dtype) for array in (trace.gates, trace.saved, *trace.states)]
        return sequence.Trace(self.numbers["gx"], kept[0], kept[1], (kept[2],))

    def plain_backward(self, trace: sequence.Trace) -> dict[str, np.ndarray]:
        """What the plain loop makes in float64 of a rounded trace."""
        wide = [a.astype(np.float64) for a in (trace.x, trace.gates, trace.saved)]
        states = tuple([state.astype(np.float64) for state in trace.states])
        dstates = (self.layout.sort(self.wide("dh")).copy(),)
        dweight_hh = np.empty((3 * self.H, self.H))
        doutput = self.wide("doutput") if self.upstream else None
        with np.errstate(all="ignore"):
            sequence.backward(
                engine(self.weights.weight_ih), self.weights, sequence.Trace(*wide, states),
                self.layout, self.reverse, doutput, dstates,
                Weights(None, dweight_hh, None, None), None, workspaces()[0],
            )  # fmt: skip
        return {"dgx": wide[1], "dgx_n": wide[2], "dweight_hh": dweight_hh, "dstates": dstates[0]}


def workspaces() -> tuple[Workspace, Workspace]:
    backend, dtype = get_backend("numpy"), np.dtype(np.float64)
    return Workspace(backend, dtype), Workspace(backend, dtype)


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
    run: Run = IN_ORDER,
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
    """Fail unless the kernel ends and agrees with the plain loop, within rounding.

    Infinities and NaNs must be where the plain loop has them.
    """
    trace = case.plain()
    left = run_forward(case, tiling, **options)
    assert left.outcome == "fine", left.outcome
    assert left.report == 0
    expected = {"states": trace.states[0]}
    if tiling.record:
        expected |= {"gates": trace.gates, "saved": trace.saved}
    else:
        assert left.gates.tobytes() == case.numbers["gx"].tobytes(), "gates were written"
    for name, value in expected.items():
        compare(case, name, getattr(left, name), value)


@dataclass
class Backward:
    """What the backward kernel left, in NumPy arrays."""

    outcome: str
    gates: np.ndarray
    saved: np.ndarray
    dstates: np.ndarray
    report: int


def run_backward(
    case: Case,
    tiling: Tiling,
    run: Run = IN_ORDER,
    passes: int = 1,
    faults: Faults = (),
    spins: int = SPINS,
    wide: int = 0,
) -> Backward:
    """Fill, launch, and look that nothing was written outside; doutput's rows are `wide` longer."""
    layout, H, P, trace = case.layout, case.H, case.padded, case.rounded_trace()
    assert tiling.reduction >= 3 * P, "the tiling is too small for H"
    n_0, S = layout.running, layout.total
    gates, saved, states = [guarded(a) for a in (trace.gates, trace.saved, trace.states[0])]
    doutput = guarded(np.pad(case.numbers["doutput"], ((0, 0), (0, wide)), constant_values=np.nan))
    dstates = guarded(layout.sort(case.numbers["dh"])[:n_0])
    empty = np.full(S * 3 * P * case.dtype.itemsize, 0xFF, np.uint8).view(case.dtype)
    mail, weight_hh = guarded(empty.reshape(S, 3, P)), guarded(case.numbers["weight_hh"])
    counts = None if layout.ragged is None else guarded(np.array(layout.counts, np.int32))
    report = guarded(np.zeros(1, np.uint32))
    upstream = doutput if case.upstream else None
    arguments = (weight_hh, states, upstream, gates, saved, dstates, mail, counts, layout.steps)
    arguments += (n_0, H, S, passes, int(case.reverse), H + wide, spins, report, TAG)
    grid = (-(-H // 16), -(-n_0 // (8 * tiling.tiles * passes)))
    outcome = launch(tiling, arguments, grid, passes, run, faults)
    check_guards(weight_hh=weight_hh, states=states, doutput=doutput, gates=gates, saved=saved,
                 dstates=dstates, mail=mail, counts=counts, report=report)  # fmt: skip
    assert states.tobytes() == trace.states[0].tobytes(), "states were written"
    if outcome == "fine" and not report[0]:
        dgh = mail[..., :H].reshape(gates.shape)
        assert np.array_equal(dgh, gates, equal_nan=True), "mail and gates differ"
        assert not mail[..., H:].any(), "padding is not zero"
    return Backward(outcome, gates, saved, dstates, int(report[0]))


def check_backward(case: Case, tiling: Tiling, **options: Any) -> None:
    """As `check_forward`; the gradients are also multiplied as those of the weights are."""
    trace = case.rounded_trace()
    expected = case.plain_backward(trace)
    left = run_backward(case, tiling, **options)
    assert left.outcome == "fine", left.outcome
    assert left.report == 0
    wide, H = left.gates.astype(np.float64), case.H
    previous = case.layout.previous(trace.states[0], case.reverse).astype(np.float64)
    dgx = wide.copy()
    CELLS["gru"].to_input_side(dgx, left.saved.astype(np.float64))
    with np.errstate(all="ignore"):
        dgh_n = expected["dgx_n"] * trace.gates[:, :H].astype(np.float64)
        dweight_hh = wide.T @ previous
    compare(case, "dgx", dgx, expected["dgx"])
    compare(case, "dgh_n", wide[:, 2 * H :], dgh_n)
    compare(case, "dgx_n", left.saved, expected["dgx_n"])
    compare(case, "dstates", left.dstates, expected["dstates"][: len(left.dstates)])
    compare(case, "dweight_hh", dweight_hh, expected["dweight_hh"])


def compare(case: Case, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    """Fail unless they agree within the tolerance of what products read."""
    actual, finite = actual.astype(np.float32), np.isfinite(expected)
    same = np.where(finite, 0, expected) == np.where(np.isfinite(actual), 0, actual)
    same |= np.isnan(expected) & np.isnan(actual)
    assert same.all(), f"{name}: not finite elsewhere: {np.argwhere(~same)[:5].tolist()}"
    sizes = {"steps": max(case.lengths), "width": case.H, "layers": 1}
    rounded = ROUNDED[case.kind]
    assert_close(actual[finite], expected[finite], np.float32, name, rounded, **sizes)
