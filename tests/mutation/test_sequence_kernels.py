"""Faults injected into the sequence kernels: each must give a wrong value or a deadlock.

Each fault is a substitution of text that occurs once in the source; the cases are some of those in
`test_sequence_kernels.py`.
"""

from __future__ import annotations

import pytest

from tests.support.emulated_sequences import check_backward, check_forward
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run, Tiling
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case
from xprnn.cells import CELLS

pytestmark = needs_compiler

RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
# reverse, lengths, H; the last one fills the reduction, so that warps wait for different blocks
CASES = ((False, (6,) * 9, 48), (True, RAGGED, 48), (False, (6, 6, 5), 48), (False, (6,) * 8, 128))
SMALL = Tiling("gru", "training", "TF32X3", 4, 1, 1, 1)
BARRIER = "      timed_out[parity] = 1;\n    sync_block();"
ANYWHERE = {  # in the source shared by these kernels
    "a barrier removed": (BARRIER, BARRIER.replace("sync_block();", "")),
    "a poll removed": ("if (all_lanes(full)) return MAYBE_NONFINITE;", "return MAYBE_NONFINITE;"),
    "a poll of three words of four": (" && b[k].w != SENTINEL", ""),
    "a buffer shared too early": ("shared.sums(parity)", "shared.sums(0)"),
    "steps that overlap": (
        "packed - next_rows : packed + rows;",
        "packed - next_rows : packed + next_rows;",
    ),
    "rows past the last one waited for": ("(n < end ? n : first)", "(n)"),
    "all sums of one warp": ("warp < warps; ++warp", "warp < 1; ++warp"),
    "a half of the shared weights": (
        "in_shared[(k - in_registers) * 64 + 32];",
        "in_shared[(k - in_registers) * 64];",
    ),
}
GRU = {
    "a sign of a gate": ("n = tanh_of(gx_n + r * gh_n)", "n = tanh_of(gx_n - r * gh_n)"),
    "two gates exchanged": ("in.gx[0].y(), in.gx[1].y()", "in.gx[1].y(), in.gx[0].y()"),
    "the other neighbour's gate": ("gh[0].y, gh[1].y", "gh[0].x, gh[1].y"),
    "a step that does not move": ("    last_packed = packed;\n", ""),
    "no bias": ("gh_n.y = gh[2].y + bias.y;", "gh_n.y = gh[2].y;"),
    "states of the other direction": ("const { return reversed() ? walk.low() : walk.high(); }",
                                 "const { return walk.high(); }"),
}  # fmt: skip
GRU_BACK = {
    "a sign of a gate": ("dr * r * (1 - r)", "dr * r * (1 + r)"),
    "a gate published twice": ("words, dgh[gate]);", "words, dgh[gate / 2]);"),
    "another gate's weights": ("(gate * H + first + i) * H", "(2 * H - gate * H + first + i) * H"),
    "dh that is not carried on": ("= direct[i].y + sum.y;", "= sum.y;"),
    "no gradient of the output": ("dh.y + in.doutput.y", "dh.y"),
    "the next step's state": ("cell.load(in[i], sequence.before(pass.walk)",
                              "cell.load(in[i], sequence.after(pass.walk)"),
    "dh of a neighbour": ("(n - begin) * count * PAIRS", "(n - begin) * count * PAIRS / 2"),
}  # fmt: skip
WAITING = {name: ANYWHERE[name] for name in ("a barrier removed", "a poll removed")}
LSTM = {
    **WAITING,
    "a sign of a gate": ("c_next = f * c + i * g;", "c_next = f * c - i * g;"),
    "the other neighbour's gate": ("in.gx[2].y() + gh[2].y", "in.gx[2].y() + gh[2].x"),
    "c that is not carried on": ("c + before * this->H", "c"),
    "c that is not written": ("this->write(c + after * this->H, c_next);", ""),
    "a gate kept in another's place": ("this->gate_of(row, 1), f", "this->gate_of(row, 1), i"),
}
LSTM_BACK = {
    **WAITING,
    "a sign of a gate": ("dh_next * tanh_c * o * (1 - o)", "dh_next * tanh_c * o * (1 + o)"),
    "dc that is not carried on": ("float2& dc = dstates[1];", "float2 dc = dstates[1];"),
    "dc in the place of dh": ("slot[state * PAIRS]", "slot[0]"),
    "the next step's c": ("c + before * this->H", "c + after * this->H"),
    "another gate's weights": ("(gate * H + first + i) * H", "(3 * H - gate * H + first + i) * H"),
}
ELMAN = {
    **WAITING,
    "a sign": ("const A a = gx + gh;", "const A a = gx - gh;"),
    "the other activation": ("if (relu) return a < 0", "if (!relu) return a < 0"),
}
ELMAN_BACK = {
    **WAITING,
    "a sign": ("dh_next * (1 - h_next * h_next)", "dh_next * (1 + h_next * h_next)"),
    "the state before the step": ("states + after * this->H", "states + before * this->H"),
}
RELU_BACK = {"a gradient where there is none": ("h_next > 0 ? A(1)", "h_next >= 0 ? A(1)")}
FAULTS = {
    ("gru", "training"): ANYWHERE | GRU,
    ("gru", "backward"): ANYWHERE | GRU_BACK,
    ("lstm", "training"): LSTM,
    ("lstm", "backward"): LSTM_BACK,
    ("rnn_tanh", "training"): ELMAN,
    ("rnn_tanh", "backward"): ELMAN_BACK,
    ("rnn_relu", "backward"): RELU_BACK,
}


def shows(cell: str, work: str, kind: str, fault: tuple[str, str], seeds: int = 12) -> bool:
    """Whether one of the cases fails with a fault that is compiled in."""
    back, G = work == "backward", CELLS[cell].gates
    check = check_backward if back else check_forward
    tilings = [(4, G, G, 1), (2, 2 * G, G, 2)] if back else [(4, 1, 1, 1), (2, 2, 1, 2)]
    for tiling in tilings:
        compiled = Tiling(cell, work, kind, *tiling)
        for reverse, lengths, H in CASES:
            if compiled.reduction < (G * H if back else H):
                continue
            case = Case(cell, kind, H, lengths, reverse)
            for seed in range(seeds):
                try:
                    check(case, compiled, run=Run(seed), faults=(fault,), max_polls=5000)
                except AssertionError:
                    return True
    return False


@pytest.mark.parametrize(
    ("cell", "work", "kind"),
    [*[(*kernel, "BF16") for kernel in FAULTS], ("gru", "training", "TF32X3")],
)
def test_the_cases_pass_without_a_fault(cell: str, work: str, kind: str) -> None:
    needs_dtype("bfloat16")
    nothing = ("namespace emulator {\n\nenum", "namespace emulator {\n\n\nenum")
    assert not shows(cell, work, kind, nothing, seeds=2)


@pytest.mark.parametrize(
    ("cell", "work", "fault"), [(*kernel, fault) for kernel in FAULTS for fault in FAULTS[kernel]]
)
def test_a_fault_shows(cell: str, work: str, fault: str) -> None:
    needs_dtype("bfloat16")
    assert shows(cell, work, "BF16", FAULTS[cell, work][fault])


@pytest.mark.parametrize(
    "fault",
    [
        ("if (all_lanes(finite)) return FINITE;", "return FINITE;"),
        ("mma_tf32(c, a_low, b_high[0], b_high[1]);", "mma_tf32(c, a_low, 0 * b_high[0], 0);"),
        ("mma_tf32(c, a_high, b_low[0], b_low[1]);", "mma_tf32(c, a_high, 0 * b_low[0], 0);"),
    ],
    ids=("no poll", "no low part of weights", "no low part of h"),
)
def test_a_fault_of_full_float32_shows(fault: tuple[str, str]) -> None:
    assert shows("gru", "training", "TF32X3", fault)


def test_a_product_of_infinities_with_low_parts_shows() -> None:
    """An infinity times the low part of another number is NaN where that part is 0."""
    faults = (
        ("const bool none = nonfinite && !is_finite(a[i]);", "const bool none = false;"),
        ("const bool none = nonfinite && !is_finite(b[i]);", "const bool none = false;"),
    )
    case = Case("gru", "TF32X3", 33, (3, 3), special=(("h0", (0, 5), float("inf")),))
    check_forward(case, SMALL)
    with pytest.raises(AssertionError, match="not finite elsewhere"):
        check_forward(case, SMALL, faults=faults)


@pytest.mark.parametrize(
    "old", ("if (u >= H) v.x = 0;", "if (!both()) v.y = 0;"), ids=("unit", "its neighbour")
)
def test_an_infinity_in_the_padding_shows(old: str) -> None:
    H = 34 if "v.x" in old else 33
    case = Case("gru", "TF32X3", H, (3, 3), special=(("h0", (0, 5), float("inf")),))
    with pytest.raises(AssertionError):
        check_forward(case, SMALL, faults=((old, ""),))


def test_a_nan_that_equals_the_sentinel_shows() -> None:
    case = Case("gru", "TF32X3", 32, (3,) * 8)
    case.numbers["gx"].view("uint32")[2, 64:] = 0xFFFFFFFF
    check_forward(case, SMALL)
    fault = ("{ return is_nan(w) ? NAN_WORD : w; }", "{ return w; }")
    with pytest.raises(AssertionError, match="deadlock"):
        check_forward(case, SMALL, faults=(fault,))


def test_too_little_shared_memory_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiling, "shared", lambda self, passes: 128 + 3840 * 4 - 64)
    with pytest.raises(AssertionError, match="shared memory overrun"):
        check_forward(Case("gru", "TF32X3", 16, (2,) * 8), SMALL)


def test_a_row_of_an_odd_length_as_pairs_shows() -> None:
    fault = ("if (u < H && static_cast<void*>(states) != exchange)", "if (u < H)")
    pairs = ("row + u, v, H % 2 == 0, both()", "row + u, v, true, true")
    with pytest.raises(AssertionError):
        check_forward(Case("gru", "TF32X3", 33, (2,)), SMALL, faults=(fault, pairs))


def test_a_diverging_warp_shows() -> None:
    fault = ("const PollResult result = await", "if (threadIdx.x % 2) all_lanes(true);\n  "
             "const PollResult result = await")  # fmt: skip
    with pytest.raises(AssertionError, match=r"diverged|deadlock"):
        check_forward(Case("gru", "BF16", 16, (2,)), SMALL._replace(kind="BF16"), faults=(fault,))
