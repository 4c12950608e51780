"""The planner for wavefronts of a stack's layers: plans fit the device, and run as planned."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kernels.cuda.planner.test_plan import (
    H200,
    KINDS,
    NUMBERS,
    ROWS,
    UNITS,
    decide,
    problems_of,
)
from tests.support import emulated_sequences
from tests.support.emulated_wavefronts import check_wave, stack_of
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run, Tiling
from tests.support.fake_cupy.sequence import Function
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.plan import DeviceProperties, LaunchPlan, SequenceProblem, plan
from xprnn.kernels.cuda.table import MAX_WAVEFRONT_LAYERS

pytestmark = pytest.mark.frozen


def sweep(cell: str) -> Iterator[tuple[DeviceProperties, SequenceProblem]]:
    layers = itertools.cycle((2, 3, MAX_WAVEFRONT_LAYERS))
    for base, numbers in itertools.product(KINDS.values(), NUMBERS):
        for N, H, work in itertools.product(ROWS, UNITS, ("forward", "training")):
            problem = SequenceProblem(cell, work, numbers, N, H, 17, 1, next(layers))
            yield base._replace(processors=132), problem


def wrong(cell: str) -> tuple[list[str], Counter[str]]:
    """Problems of the first plan that does not fit, and counts of plans and reasons."""
    seen: Counter[str] = Counter()
    for device, problem in sweep(cell):
        chosen = decide(device, problem)
        seen[chosen[0] if isinstance(chosen, str) else "taken"] += 1
        if isinstance(chosen, LaunchPlan) and (found := problems_of(chosen, device, problem)):
            return found, seen
    return [], seen


@pytest.mark.parametrize("cell", ("gru", "lstm", "rnn_tanh"))
def test_every_choice_fits(cell: str) -> None:
    found, seen = wrong(cell)
    assert not found
    assert seen["taken"] > 2000 and seen["H"] > 1000


def test_small_layers_leave_room_for_others() -> None:
    """At H=512, four layers of 32 blocks; twice the products of a layer alone."""
    small = SequenceProblem("gru", "forward", "bfloat16", 8, 512, 100, 1, 4)
    chosen, alone = plan(H200, small), plan(H200, small._replace(layers=1))
    assert (chosen.grid, chosen.blocks_per_processor, chosen.tiling.k_blocks) == ((32, 1, 4), 1, 4)
    assert (alone.grid, alone.tiling.k_blocks) == ((32, 1, 1), 2)
    assert (
        plan(H200, small._replace(layers=MAX_WAVEFRONT_LAYERS + 1))
        == "9 layers: a wavefront has at most 8"
    )


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "the other layers' blocks forgotten": (
        "_attempt",
        lambda was: (
            lambda device, problem, *rest: _layers(
                was(device, problem._replace(layers=1), *rest), problem.layers
            )
        ),
        "blocks",
    ),
    "what is below forgotten": (
        "padded",
        lambda was: lambda H, numbers: was(H, numbers) // 2,
        "reduction",
    ),
}


def _layers(found: LaunchPlan | str, layers: int) -> LaunchPlan | str:
    return found._replace(layers=layers) if isinstance(found, LaunchPlan) else found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_planner_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, fault, seen = FAULTS[name]
    monkeypatch.setattr(planner, what, fault(getattr(planner, what)))
    assert seen in wrong("rnn_tanh")[0]


RUN = [  # processors, cell, work, numbers, N, H, T, layers
    (8, "gru", "training", "float32", 41, 64, 3, 2),  # several passes
    (32, "lstm", "forward", "float16", 40, 60, 2, 3),  # several groups
]


@needs_compiler
@pytest.mark.parametrize("problem", RUN, ids=lambda problem: "-".join(map(str, problem)))
def test_a_plan_runs_and_has_the_values_of_the_plain_loops(
    problem: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors, cell, work, numbers, N, H, T, layers = problem
    chosen = decide(
        H200._replace(processors=processors),
        SequenceProblem(cell, work, numbers, N, H, T, 1, layers),
    )
    assert isinstance(chosen, LaunchPlan) and (chosen.passes > 1 or chosen.groups > 1)
    tiling, genuine = Function(chosen.name, wave=True).tiling, emulated_sequences.launch
    monkeypatch.setattr(Tiling, "shared", lambda self, passes: chosen.shared)
    monkeypatch.setattr(
        emulated_sequences,
        "launch",
        lambda tiling, given, grid, *rest: genuine(tiling, given, chosen.grid, *rest),
    )
    cases = stack_of(cell, tiling.kind, H, (T, *[T - 1] * (N - 1)), layers)
    run = Run(resident=processors * chosen.blocks_per_processor)
    check_wave(cases, tiling, passes=chosen.passes, run=run, max_polls=5000)
