"""The whole-sequence kernels' own source, on fibers, beside the plain loop in float64."""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest
from host_kernels import needs_compiler
from host_sequence import DTYPES, ITEMS, Run, Tiling
from kernel_parts import needs_dtype
from sequence_parts import TAG, Case, check_backward, check_forward, run_backward, run_forward

pytestmark = needs_compiler

KINDS = tuple(ITEMS)
RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
LENGTHS = {
    "one row, one step": (1,),
    "one row": (7,),
    "one step": (1,) * 9,
    "a whole tile": (3,) * 8,
    "two groups": (4,) * 17,
    "ragged": RAGGED,
    "one long row": (6, *[1] * 10),
    "the last step has one row of the second group": (2, *[1] * 7, *[2] * 2),
}
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 40, 56, 64)
# warps, chunks, held, tiles: all weights held, half of them, none; with more than are polled for
# at once; several tiles, of which a thread has more rows than one
TILINGS = ((4, 1, 1, 1), (4, 2, 1, 2), (2, 9, 0, 1), (2, 2, 2, 4))
BACKWARD_TILINGS = ((4, 3, 3, 1), (4, 6, 3, 2), (2, 18, 0, 1), (2, 6, 6, 4))


@pytest.fixture(autouse=True)
def dtype(request: pytest.FixtureRequest) -> None:
    if "kind" in request.fixturenames:
        needs_dtype(DTYPES[request.getfixturevalue("kind")])


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_edge_sizes(kind: str, lengths: str, reverse: bool) -> None:
    bias = cycle((True, False))
    for seed, H in enumerate(WIDTHS):
        case = Case(kind, H, LENGTHS[lengths], reverse, next(bias), seed)
        check_forward(case, Tiling(kind, *TILINGS[0], record=H % 3 > 0), run=Run(seed))


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_edge_sizes(kind: str, lengths: str, reverse: bool) -> None:
    for seed, H in enumerate(WIDTHS):
        case = Case(kind, H, LENGTHS[lengths], reverse, upstream=seed % 3 > 0, seed=seed)
        check_backward(case, Tiling(kind, *BACKWARD_TILINGS[0]), run=Run(seed), wide=seed % 2)


@pytest.mark.parametrize("passes", (1, 2, 3))
@pytest.mark.parametrize("tiling", BACKWARD_TILINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_backward_of_every_tiling(kind: str, tiling: tuple[int, ...], passes: int) -> None:
    for seed, H, reverse in ((1, 40, False), (2, 64, True)):
        case = Case(kind, H, (3, 2) * 17 + (4,) * 6, reverse, seed=seed)
        check_backward(case, Tiling(kind, *tiling), passes=passes, run=Run(seed))


@pytest.mark.parametrize("passes", (1, 2, 3))
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_of_every_tiling(kind: str, tiling: tuple[int, ...], passes: int) -> None:
    for seed, H, reverse in ((1, 40, False), (2, 64, True)):
        case = Case(kind, H, (3, 2) * 17 + (4,) * 6, reverse, seed=seed)
        check_forward(case, Tiling(kind, *tiling, record=True), passes=passes, run=Run(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_both_passes_in_any_order(kind: str) -> None:
    case = Case(kind, 48, RAGGED, reverse=True)
    for seed in range(40):
        check_forward(case, Tiling(kind, *TILINGS[0], record=True), run=Run(seed))
        check_backward(case, Tiling(kind, *BACKWARD_TILINGS[0]), run=Run(seed))


def test_the_bits_are_the_same_in_any_order() -> None:
    case = Case("TF32X3", 48, RAGGED)
    there, back = Tiling("TF32X3", *TILINGS[0], record=True), Tiling("TF32X3", *BACKWARD_TILINGS[0])
    results = {
        (left.states.tobytes(), left.gates.tobytes(), undone.gates.tobytes())
        for left, undone in [
            (run_forward(case, there, Run(seed)), run_backward(case, back, Run(seed)))
            for seed in range(8)
        ]
    }
    assert len(results) == 1


def test_forward_with_a_mailbox_of_its_own() -> None:
    """Where H is a multiple of 16 bytes it is not needed, but it may be apart."""
    case = Case("TF32X3", 32, RAGGED)
    check_forward(case, Tiling("TF32X3", *TILINGS[0], record=True), apart=True)


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("gx", "weight_hh", "h0"))
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nans_go_where_the_plain_loop_has_them(
    kind: str, where: str, value: float
) -> None:
    for H, place in ((33, (1, 4)), (33, (0, 32)), (32, (2, 7))):
        case = Case(kind, H, (4, 4, 3, 2), special=((where, place, value),))
        check_forward(case, Tiling(kind, *TILINGS[0], record=True), run=Run(3))


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("doutput", "weight_hh", "dh"))
@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_nans_go_back_where_the_plain_loop_has_them(
    kind: str, where: str, value: float
) -> None:
    for H, place in ((33, (1, 4)), (33, (0, 32)), (32, (2, 7))):
        case = Case(kind, H, (4, 4, 3, 2), special=((where, place, value),))
        check_backward(case, Tiling(kind, *BACKWARD_TILINGS[0]), run=Run(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_of_any_bits_is_not_waited_for(kind: str) -> None:
    """All bits set is what the mailbox is before; the kernel must not publish that."""
    case = Case(kind, 32, (3,) * 8)
    gx = case.numbers["gx"]
    gx.view(f"u{gx.itemsize}")[2, 2 * case.H :] = 2 ** (8 * gx.itemsize) - 1  # n's
    check_forward(case, Tiling(kind, *TILINGS[0], record=True), run=Run(1))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_not_resident_are_a_deadlock(kind: str) -> None:
    case, tiling = Case(kind, 64, (3,) * 8), Tiling(kind, *TILINGS[0], record=False)
    back = Tiling(kind, *BACKWARD_TILINGS[0])
    for resident, outcome in ((1, "deadlock"), (2, "deadlock"), (3, "deadlock"), (4, "fine")):
        assert run_forward(case, tiling, Run(1, resident)).outcome == outcome
        assert run_backward(case, back, Run(1, resident)).outcome == outcome


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize("kind", KINDS)
def test_the_spin_limit_ends_a_wait_and_says_so(kind: str, reverse: bool) -> None:
    case = Case(kind, 64, (5, 4, 4, 2), reverse)
    there, back = Tiling(kind, *TILINGS[0], record=True), Tiling(kind, *BACKWARD_TILINGS[0])
    for resident in (1, 2, 3):
        left = run_forward(case, there, Run(resident, resident), spins=20)
        assert left.outcome == "fine"
        assert 0 < left.report - TAG < 5, hex(left.report)
        final = case.layout.final(left.states, reverse).astype(np.float32)
        assert np.isnan(final).all()

        undone = run_backward(case, back, Run(resident, resident), spins=20)
        assert undone.outcome == "fine"
        assert 0 <= undone.report - TAG < 5, hex(undone.report)
        assert np.isnan(undone.dstates).all()
