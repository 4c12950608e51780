"""The planner of both directions of a layer in one launch: what fits, and what is faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernels.cuda.planner.test_plan import (
    CELLS_WITH_KERNELS,
    GRID,
    H200,
    MATH_MODES,
    WORK,
    decide,
    first_wrong_plan,
    problems_of,
    sweep,
)
from xprnn.kernels import Unsupported
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.plan import LaunchPlan, SequenceProblem, plan

# in the planner's reason if both directions fit, but two launches take less time
APART = "both directions in one launch"


@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_every_choice_fits(cell: str) -> None:
    counts = Counter()
    for device, problem in sweep((16, 132), cell, directions=2):
        both, alone = decide(device, problem), decide(device, problem._replace(directions=1))
        if isinstance(both, LaunchPlan):
            assert not problems_of(both, device, problem), (device, problem, both)
            assert isinstance(alone, LaunchPlan)  # if two fit, so does one
            counts["both"] += 1
        elif isinstance(alone, LaunchPlan):
            counts[APART if APART in both.reason else both.reason[0]] += 1
    assert (
        counts["both"] > 10_000 and counts["H"] > 1000 and counts["N"] > 50 and counts[APART] > 100
    )


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_both_directions_of_the_speed_table_fit_in_one_launch(cell: str, work: str) -> None:
    """With few rows as many passes as for one direction, else twice as many."""
    for mode in MATH_MODES:
        for N, H, T in GRID:
            alone = plan(H200, SequenceProblem(cell, work, mode, N, H, T))
            both = plan(H200, SequenceProblem(cell, work, mode, N, H, T, 2))
            assert both.grid[2] == 2 and both.blocks_per_processor == 1
            assert both.passes == alone.passes * (1 if N <= 32 else 2)


def test_directions_that_do_not_fit_are_refused_with_the_reason() -> None:
    wide = SequenceProblem("gru", "training", "bfloat16", 8, 1200, 100)
    assert plan(H200, wide).grid == (75, 1, 1)
    assert plan(H200, wide._replace(directions=2)) == Unsupported(
        "H=1200: 150 blocks must run at once, one for 16 units of each direction; this device "
        "holds 132"
    )


def test_directions_that_are_faster_separately_are_not_combined() -> None:
    """132 processors hold one group of 80 blocks, or three of 40: 3 passes instead of 1 and 1."""
    some = SequenceProblem("gru", "training", "bfloat16", 96, 640, 100)
    assert (plan(H200, some).groups, plan(H200, some).passes) == (3, 1)
    assert plan(H200, some._replace(directions=2)) == Unsupported(
        "N=96: 3 passes per step for both directions in one launch are estimated to take longer "
        "than two launches with 1 each"
    )
    assert isinstance(plan(H200, some._replace(N=32, directions=2)), LaunchPlan)


def one_direction(original: Callable[..., Any]) -> Callable[..., Any]:
    """A planner that counts the blocks of one direction only."""

    def attempt(device: Any, problem: SequenceProblem, *rest: Any) -> Any:
        chosen = original(device, problem._replace(directions=1), *rest)
        return chosen._replace(directions=2) if isinstance(chosen, LaunchPlan) else chosen

    return attempt


def test_ignoring_the_other_direction_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not first_wrong_plan("rnn_tanh", directions=2)
    monkeypatch.setattr(planner, "_attempt", one_direction(planner._attempt))
    assert "blocks" in first_wrong_plan("rnn_tanh", directions=2)
