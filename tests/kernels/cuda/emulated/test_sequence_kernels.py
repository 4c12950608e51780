"""Sequence kernels on the emulator, compared with the reference loop in float64.

The code shared by the cells, in all math modes, is tested with the GRU; the other cells run with
fewer modes and sizes, but each of their kernels in each mode at least once.
"""

from __future__ import annotations

from itertools import cycle

import numpy as np
import pytest

from tests.support.emulated_sequences import (
    TAG,
    check_backward,
    check_forward,
    run_backward,
    run_forward,
)
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import DTYPES, K_BLOCK_ELEMENTS, Run, Tiling
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case
from xprnn.cells import CELLS
from xprnn.kernels.cuda.table import KERNELS

pytestmark = needs_compiler

KINDS = tuple(K_BLOCK_ELEMENTS)
GRU = [("gru", kind) for kind in KINDS]
FEW = [*GRU, ("lstm", "TF32X3"), ("lstm", "BF16"), ("rnn_tanh", "TF32X3"), ("rnn_relu", "F16")]
ALL = [(cell, kind) for cell in dict(KERNELS.keys()) for kind in KINDS]
RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
LENGTHS = {
    "one row, one step": (1,),
    "one row": (7,),
    "one step": (1,) * 9,
    "a complete tile": (3,) * 8,
    "two groups": (4,) * 17,
    "ragged": RAGGED,
    "one long row": (6, *[1] * 10),
    "the last step has one row of the second group": (2, *[1] * 7, *[2] * 2),
}
WIDTHS = (1, 2, 15, 16, 17, 31, 33, 40, 56, 64)
FEW_WIDTHS = (1, 17, 40)
# warps, k-blocks, those in registers, row tiles: all weights in registers, half of them, none (with
# more k-blocks than are polled at once); several tiles, with several rows per thread
TILINGS = ((4, 1, 1, 1), (4, 2, 1, 2), (2, 9, 0, 1), (2, 2, 2, 4))


@pytest.fixture(autouse=True)
def dtype(request: pytest.FixtureRequest) -> None:
    if "kind" in request.fixturenames:
        needs_dtype(DTYPES[request.getfixturevalue("kind")])


def tiling(cell: str, work: str, kind: str, which: int = 0) -> Tiling:
    """One of `TILINGS`; the backward reduction is longer by the number of gates."""
    warps, k_blocks, in_registers, row_tiles = TILINGS[which]
    if work == "backward":
        G = CELLS[cell].gates
        k_blocks, in_registers = (
            max(k_blocks, k_blocks * G if which != 2 else 6 * G),
            in_registers * G,
        )
    return Tiling(cell, work, kind, warps, k_blocks, in_registers, row_tiles)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cell", "kind"), ALL)
def test_forward_of_edge_sizes(cell: str, kind: str, lengths: str) -> None:
    bias, works = cycle((True, False)), cycle(("training", "training", "forward"))
    for reverse in (False, True):
        for seed, H in enumerate(WIDTHS if cell == "gru" else FEW_WIDTHS):
            case = Case(cell, kind, H, LENGTHS[lengths], reverse, next(bias), seed=seed)
            check_forward(case, tiling(cell, next(works), kind), run=Run(seed))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("cell", "kind"), ALL)
def test_backward_of_edge_sizes(cell: str, kind: str, lengths: str) -> None:
    for reverse in (False, True):
        for seed, H in enumerate(WIDTHS if cell == "gru" else FEW_WIDTHS):
            case = Case(cell, kind, H, LENGTHS[lengths], reverse, upstream=seed % 3 > 0, seed=seed)
            check_backward(case, tiling(cell, "backward", kind), run=Run(seed), wide=seed % 2)


@pytest.mark.parametrize("passes", (1, 2, 3))
@pytest.mark.parametrize("which", range(1, len(TILINGS)))
@pytest.mark.parametrize(("cell", "kind"), [*GRU, ("lstm", "TF32X3"), ("rnn_tanh", "BF16")])
def test_both_passes_of_every_tiling(cell: str, kind: str, which: int, passes: int) -> None:
    H, reverse = ((40, False), (64, True), (48, True))[passes - 1]
    case = Case(cell, kind, H, (3, 2) * 17 + (4,) * 6, reverse, seed=passes)
    options = {"passes": passes, "run": Run(passes)}
    check_forward(case, tiling(cell, "training", kind, which), **options)
    check_backward(case, tiling(cell, "backward", kind, which), **options)


@pytest.mark.parametrize(("cell", "kind"), FEW)
def test_both_passes_in_any_order(cell: str, kind: str) -> None:
    case = Case(cell, kind, 48, RAGGED, reverse=True)
    for seed in range(40 if cell == "gru" else 12):
        check_forward(case, tiling(cell, "training", kind), run=Run(seed))
        check_backward(case, tiling(cell, "backward", kind), run=Run(seed))


@pytest.mark.parametrize("cell", ("gru", "lstm", "rnn_tanh"))
def test_the_bits_are_the_same_in_any_order(cell: str) -> None:
    case = Case(cell, "TF32X3", 48, RAGGED)
    forward, backward = [tiling(cell, work, "TF32X3") for work in ("training", "backward")]
    results = {
        tuple(
            [
                result.arrays[name].tobytes()
                for result in (run_forward(case, forward, run=Run(seed)), backward_result)
                for name in ("gates", *case.cell.state_names)
            ]
        )
        for seed in range(8)
        for backward_result in [run_backward(case, backward, run=Run(seed))]
    }
    assert len(results) == 1


def test_forward_with_an_exchange_buffer_of_its_own() -> None:
    """It is not required if rows are multiples of 16 bytes, but allowed."""
    case = Case("gru", "TF32X3", 32, RAGGED)
    check_forward(case, tiling("gru", "training", "TF32X3"), apart=True)


def special_cases(forward: bool) -> list[tuple[str, str, str]]:
    """Cell, kind, and an array that receives a special value."""
    names = ("gx", "weight_hh", "h0", "c0") if forward else ("doutput", "weight_hh", "dh", "dc")
    return [(cell, kind, name) for cell, kind in FEW for name in names[: 3 + (cell == "lstm")]]


@pytest.mark.parametrize(("cell", "kind", "where"), special_cases(forward=True))
def test_infinities_and_nans_match_the_reference(cell: str, kind: str, where: str) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for H, index in ((33, (1, 4)), (33, (0, 32)), (32, (2, 7))):
            case = Case(cell, kind, H, (4, 4, 3, 2), special=((where, index, value),))
            check_forward(case, tiling(cell, "training", kind), run=Run(3))


@pytest.mark.parametrize(("cell", "kind", "where"), special_cases(forward=False))
def test_infinities_and_nans_of_gradients_match_the_reference(
    cell: str, kind: str, where: str
) -> None:
    for value in (np.nan, np.inf, -np.inf):
        for H, index in ((33, (1, 4)), (33, (0, 32)), (32, (2, 7))):
            case = Case(cell, kind, H, (4, 4, 3, 2), special=((where, index, value),))
            check_backward(case, tiling(cell, "backward", kind), run=Run(3))


@pytest.mark.parametrize(("cell", "kind"), FEW)
def test_a_nan_with_the_sentinels_bits_does_not_block(cell: str, kind: str) -> None:
    """The sentinel has all bits set; the kernel must not publish it."""
    case = Case(cell, kind, 32, (3,) * 8)
    gx = case.numbers["gx"]
    gx.view(f"u{gx.itemsize}")[2, -case.H :] = 2 ** (8 * gx.itemsize) - 1  # the last gate's
    check_forward(case, tiling(cell, "training", kind), run=Run(1))


@pytest.mark.parametrize(("cell", "kind"), FEW)
def test_blocks_that_are_not_resident_cause_a_deadlock(cell: str, kind: str) -> None:
    case = Case(cell, kind, 64, (3,) * 8)
    forward, backward = tiling(cell, "forward", kind), tiling(cell, "backward", kind)
    for resident, outcome in ((1, "deadlock"), (2, "deadlock"), (3, "deadlock"), (4, "fine")):
        assert run_forward(case, forward, run=Run(1, resident)).outcome == outcome
        assert run_backward(case, backward, run=Run(1, resident)).outcome == outcome


@pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))
@pytest.mark.parametrize(("cell", "kind"), FEW)
def test_the_poll_limit_ends_a_wait_and_is_reported(cell: str, kind: str, reverse: bool) -> None:
    case = Case(cell, kind, 64, (5, 4, 4, 2), reverse)
    forward, backward = tiling(cell, "training", kind), tiling(cell, "backward", kind)
    for resident in (1, 2, 3):
        result = run_forward(case, forward, run=Run(resident, resident), max_polls=20)
        assert result.outcome == "fine"
        assert 0 < result.report - TAG < 5, hex(result.report)
        for name in case.cell.state_names:
            final = case.layout.final(result.arrays[name], reverse).astype(np.float32)
            assert np.isnan(final).all(), name

        backward_result = run_backward(case, backward, run=Run(resident, resident), max_polls=20)
        assert backward_result.outcome == "fine"
        assert 0 <= backward_result.report - TAG < 5, hex(backward_result.report)
        for name in case.dstates:
            assert np.isnan(backward_result.arrays[name]).all(), name
        if resident == 1:  # the first block ran alone
            for name in ("gates", "saved") if cell == "gru" else ("gates",):
                gradients = backward_result.arrays[name].astype(np.float32).reshape(-1, 64)
                assert np.isnan(gradients[:, :16]).all(), name
