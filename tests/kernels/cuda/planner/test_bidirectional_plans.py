"""The planner for both directions of a layer in one launch: what fits, and what is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.cuda.planner.test_plan import (
    CELLS_WITH_KERNELS,
    GRID,
    H200,
    NUMBERS,
    WORK,
    a_wrong_choice,
    decide,
    problems_of,
    sweep,
)
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.plan import LaunchPlan, SequenceProblem, plan

# in the planner's reason where both directions fit, but a launch for each takes less time
APART = "both directions in one launch"


@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_every_choice_fits(cell: str) -> None:
    seen = Counter()
    for device, problem in sweep((16, 132), cell, directions=2):
        both, alone = decide(device, problem), decide(device, problem._replace(directions=1))
        if isinstance(both, LaunchPlan):
            assert not problems_of(both, device, problem), (device, problem, both)
            assert isinstance(alone, LaunchPlan)  # if two fit, so does one
            seen["both"] += 1
        elif isinstance(alone, LaunchPlan):
            seen[APART if APART in both else both[0]] += 1
    assert seen["both"] > 10_000 and seen["H"] > 1000 and seen["N"] > 50 and seen[APART] > 100


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_the_speed_table_goes_side_by_side(cell: str, work: str) -> None:
    """As many passes as for a direction alone with few rows, otherwise twice as many."""
    for numbers in NUMBERS:
        for N, H, T in GRID:
            alone = plan(H200, SequenceProblem(cell, work, numbers, N, H, T))
            both = plan(H200, SequenceProblem(cell, work, numbers, N, H, T, 2))
            assert both.grid[2] == 2 and both.blocks_per_processor == 1
            assert both.passes == alone.passes * (1 if N <= 32 else 2)


def test_two_that_do_not_fit_are_refused_with_the_reason() -> None:
    wide = SequenceProblem("gru", "training", "bfloat16", 8, 1200, 100)
    assert plan(H200, wide).grid == (75, 1, 1)
    assert plan(H200, wide._replace(directions=2)) == (
        "H=1200: 150 blocks must run at once, one for 16 units of each direction; this device "
        "holds 132"
    )


def test_what_takes_less_one_after_the_other_is_not_put_side_by_side() -> None:
    """80 of 132 blocks form one group, 40 form three: three passes instead of one and one."""
    some = SequenceProblem("gru", "training", "bfloat16", 96, 640, 100)
    assert (plan(H200, some).groups, plan(H200, some).passes) == (3, 1)
    assert plan(H200, some._replace(directions=2)) == (
        "N=96: 3 passes per step for both directions in one launch are estimated to take longer "
        "than two launches with 1 each"
    )
    assert isinstance(plan(H200, some._replace(N=32, directions=2)), LaunchPlan)


def one_direction(was: Callable[..., Any]) -> Callable[..., Any]:
    """A planner that counts the blocks of one direction only."""

    def attempt(device: Any, problem: SequenceProblem, *rest: Any) -> Any:
        found = was(device, problem._replace(directions=1), *rest)
        return found._replace(directions=2) if isinstance(found, LaunchPlan) else found

    return attempt


def test_the_other_directions_blocks_forgotten_show(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not a_wrong_choice("rnn_tanh", directions=2)
    monkeypatch.setattr(planner, "_attempt", one_direction(planner._attempt))
    assert "blocks" in a_wrong_choice("rnn_tanh", directions=2)
