"""Faults planted in the whole-sequence kernels: each must show, as a wrong number or no end.

Each fault is a substitution in the source that fits in one place; the cases are few of those that
`test_sequence_kernels.py` runs.
"""

from __future__ import annotations

import pytest
from host_kernels import needs_compiler
from host_sequence import Run, Tiling
from kernel_parts import needs_dtype
from sequence_parts import Case, check_backward, check_forward

pytestmark = needs_compiler

RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
# reverse, lengths, H; the last one fills the reduction, so that warps do not all wait for all
CASES = ((False, (6,) * 9, 48), (True, RAGGED, 48), (False, (6, 6, 5), 48), (False, (6,) * 8, 128))
BARRIER = "      stop[turn] = 1;\n    sync_block();"
ANYWHERE = {  # in the source that all of these kernels share
    "a barrier removed": (BARRIER, BARRIER.replace("sync_block();", "")),
    "a poll removed": ("if (all_lanes(full)) return SPECIAL;", "return SPECIAL;"),
    "a poll of three words of four": (" && b[k].w != EMPTY", ""),
    "a buffer shared too early": ("partial + turn * partials", "partial"),
    "steps that overlap": ("at - next_rows : at + rows;", "at - next_rows : at + next_rows;"),
    "rows past the last one waited for": ("(n < end ? n : first)", "(n)"),
    "all sums of one warp": ("warp < warps; ++warp", "warp < 1; ++warp"),
    "a half of the shared weights": ("rest[(k - held) * 64 + 32];", "rest[(k - held) * 64];"),
}
FORWARD = {
    "a sign of a gate": ("n = tanh_of(gx_n + r * gh_n)", "n = tanh_of(gx_n - r * gh_n)"),
    "two gates exchanged": ("in.gx[0].y, in.gx[1].y", "in.gx[1].y, in.gx[0].y"),
    "the other neighbour's gate": ("gh[0].y, gh[1].y", "gh[0].x, gh[1].y"),
    "a step that does not move": ("    last_at = at;\n", ""),
    "no bias": ("gh_n.y = gh[2].y + bias.y;", "gh_n.y = gh[2].y;"),
    "states of the other side": ("const { return reverse ? walk.low() : walk.high(); }",
                                 "const { return walk.high(); }"),
}  # fmt: skip
BACKWARD = {
    "a sign of a gate": ("dgx_n * gh_n * r * (1 - r)", "dgx_n * gh_n * r * (1 + r)"),
    "a gate published twice": ("words, dgh[gate]);", "words, dgh[gate / 2]);"),
    "another gate's weights": ("(gate * H + first + i) * H", "(2 * H - gate * H + first + i) * H"),
    "dh that is not carried on": ("= direct[i].y + sum.y;", "= sum.y;"),
    "no gradient of the output": ("dh.y + in.doutput.y", "dh.y"),
    "the next step's state": ("cell.load(in[i], sequence.before(at.walk)",
                              "cell.load(in[i], sequence.after(at.walk)"),
    "dh of a neighbour": ("(n - begin) * count * PAIRS", "(n - begin) * count * PAIRS / 2"),
}  # fmt: skip


def shows(kind: str, fault: tuple[str, str], backward: bool = False, seeds: int = 12) -> bool:
    """Whether one of the cases fails with a fault that is compiled in."""
    check = check_backward if backward else check_forward
    tilings = [(4, 3, 3, 1), (2, 6, 3, 2)] if backward else [(4, 1, 1, 1), (2, 2, 1, 2)]
    for tiling in tilings:
        compiled = Tiling(kind, *tiling, record=None if backward else True)
        for reverse, lengths, H in CASES:
            if compiled.reduction < (3 * H if backward else H):
                continue
            case = Case(kind, H, lengths, reverse)
            for seed in range(seeds):
                try:
                    check(case, compiled, run=Run(seed), faults=(fault,), spins=5000)
                except AssertionError:
                    return True
    return False


@pytest.mark.parametrize("kind", ("TF32X3", "BF16"))
def test_the_cases_pass_without_a_fault(kind: str) -> None:
    needs_dtype("bfloat16")
    nothing = ("namespace fibers {\n\nenum", "namespace fibers {\n\n\nenum")
    assert not shows(kind, nothing, seeds=2)
    assert not shows(kind, nothing, backward=True, seeds=2)


@pytest.mark.parametrize("fault", ANYWHERE | FORWARD)
def test_a_fault_of_the_forward_kernel_shows(fault: str) -> None:
    needs_dtype("bfloat16")
    assert shows("BF16", (ANYWHERE | FORWARD)[fault])


@pytest.mark.parametrize("fault", ANYWHERE | BACKWARD)
def test_a_fault_of_the_backward_kernel_shows(fault: str) -> None:
    needs_dtype("bfloat16")
    assert shows("BF16", (ANYWHERE | BACKWARD)[fault], backward=True)


@pytest.mark.parametrize(
    "fault",
    [
        ("if (all_lanes(finite)) return THERE;", "return THERE;"),
        ("mma_tf32(c, a_low, b_high[0], b_high[1]);", "mma_tf32(c, a_low, 0 * b_high[0], 0);"),
        ("mma_tf32(c, a_high, b_low[0], b_low[1]);", "mma_tf32(c, a_high, 0 * b_low[0], 0);"),
    ],
    ids=("no poll", "no low part of weights", "no low part of h"),
)
def test_a_fault_of_full_float32_shows(fault: tuple[str, str]) -> None:
    assert shows("TF32X3", fault)


def test_a_product_of_infinities_with_low_parts_shows() -> None:
    """An infinity times the low part of another number is NaN where that part is 0."""
    faults = (
        ("const bool none = special && !is_finite(a[i]);", "const bool none = false;"),
        ("const bool none = special && !is_finite(b[i]);", "const bool none = false;"),
    )
    case = Case("TF32X3", 33, (3, 3), special=(("h0", (0, 5), float("inf")),))
    check_forward(case, Tiling("TF32X3", 4, 1, 1, 1, True))
    with pytest.raises(AssertionError, match="not finite elsewhere"):
        check_forward(case, Tiling("TF32X3", 4, 1, 1, 1, True), faults=faults)


@pytest.mark.parametrize(
    "old", ("if (u >= H) v.x = 0;", "if (!both()) v.y = 0;"), ids=("unit", "its neighbour")
)
def test_an_infinity_in_the_padding_shows(old: str) -> None:
    H = 34 if "v.x" in old else 33
    case = Case("TF32X3", H, (3, 3), special=(("h0", (0, 5), float("inf")),))
    with pytest.raises(AssertionError):
        check_forward(case, Tiling("TF32X3", 4, 1, 1, 1, True), faults=((old, ""),))


def test_a_nan_that_looks_like_nothing_shows() -> None:
    case = Case("TF32X3", 32, (3,) * 8)
    case.numbers["gx"].view("uint32")[2, 64:] = 0xFFFFFFFF
    check_forward(case, Tiling("TF32X3", 4, 1, 1, 1, True))
    fault = ("{ return is_nan(w) ? NAN_WORD : w; }", "{ return w; }")
    with pytest.raises(AssertionError, match="deadlock"):
        check_forward(case, Tiling("TF32X3", 4, 1, 1, 1, True), faults=(fault,))


def test_too_little_shared_memory_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiling, "shared", lambda self, passes: 128 + 3840 * 4 - 64)
    with pytest.raises(AssertionError, match="shared memory overrun"):
        check_forward(Case("TF32X3", 16, (2,) * 8), Tiling("TF32X3", 4, 1, 1, 1, True))


def test_a_row_of_an_odd_length_as_pairs_shows() -> None:
    fault = ("if (u < H && static_cast<void*>(states) != mail)", "if (u < H)")
    pairs = ("row + u, v, H % 2 == 0, both()", "row + u, v, true, true")
    with pytest.raises(AssertionError):
        check_forward(
            Case("TF32X3", 33, (2,)), Tiling("TF32X3", 4, 1, 1, 1, True), faults=(fault, pairs)
        )


def test_a_warp_that_parts_shows() -> None:
    fault = ("const Arrival arrival = await", "if (threadIdx.x % 2) all_lanes(true);\n  "
             "const Arrival arrival = await")  # fmt: skip
    with pytest.raises(AssertionError, match=r"diverged|deadlock"):
        check_forward(Case("BF16", 16, (2,)), Tiling("BF16", 4, 1, 1, 1, True), faults=(fault,))
