"""The planner of wavefronts: its plans fit the device and run as planned."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kernels.cuda.planner.test_plan import (
    H200,
    KINDS,
    MATH_MODES,
    ROWS,
    UNITS,
    decide,
    problems_of,
)
from tests.support import emulated_sequences
from tests.support.emulated_wavefronts import check_wavefront, stack_of
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run, Tiling
from tests.support.fake_cupy.sequence import Function
from xprnn.kernels import Unsupported
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.plan import DeviceProperties, LaunchPlan, SequenceProblem, plan
from xprnn.kernels.cuda.table import MAX_WAVEFRONT_LAYERS

pytestmark = pytest.mark.frozen


def sweep(cell: str) -> Iterator[tuple[DeviceProperties, SequenceProblem]]:
    layers = itertools.cycle((2, 3, MAX_WAVEFRONT_LAYERS))
    for base, mode in itertools.product(KINDS.values(), MATH_MODES):
        for N, H, work in itertools.product(ROWS, UNITS, ("forward", "training")):
            problem = SequenceProblem(cell, work, mode, N, H, 17, 1, next(layers))
            yield base._replace(processors=132), problem


def wrong(cell: str) -> tuple[list[str], Counter[str]]:
    """Problems of the first plan that does not fit, and counts of plans and reasons."""
    counts: Counter[str] = Counter()
    for device, problem in sweep(cell):
        chosen = decide(device, problem)
        counts[chosen.reason[0] if isinstance(chosen, Unsupported) else "taken"] += 1
        if isinstance(chosen, LaunchPlan) and (problems := problems_of(chosen, device, problem)):
            return problems, counts
    return [], counts


@pytest.mark.parametrize("cell", ("gru", "lstm", "rnn_tanh"))
def test_every_choice_fits(cell: str) -> None:
    problems, counts = wrong(cell)
    assert not problems
    assert counts["taken"] > 2000 and counts["H"] > 1000


def test_small_layers_fit_in_one_launch() -> None:
    """Four layers of 32 blocks at H=512; the reduction is twice that of a single layer."""
    small = SequenceProblem("gru", "forward", "bfloat16", 8, 512, 100, 1, 4)
    chosen, alone = plan(H200, small), plan(H200, small._replace(layers=1))
    assert (chosen.grid, chosen.blocks_per_processor, chosen.tiling.k_blocks) == ((32, 1, 4), 1, 4)
    assert (alone.grid, alone.tiling.k_blocks) == ((32, 1, 1), 2)
    assert plan(H200, small._replace(layers=MAX_WAVEFRONT_LAYERS + 1)) == Unsupported(
        "9 layers: a wavefront has at most 8"
    )


FAULTS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "the blocks of other layers not counted": (
        "_attempt",
        lambda original: (
            lambda device, problem, *rest: _layers(
                original(device, problem._replace(layers=1), *rest), problem.layers
            )
        ),
        "blocks",
    ),
    "the product with the layer below not counted": (
        "padded",
        lambda original: lambda H, mode: original(H, mode) // 2,
        "reduction",
    ),
}


def _layers(answer: LaunchPlan | str, layers: int) -> LaunchPlan | str:
    return answer._replace(layers=layers) if isinstance(answer, LaunchPlan) else answer


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_planner_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    what, fault, problem = FAULTS[name]
    monkeypatch.setattr(planner, what, fault(getattr(planner, what)))
    assert problem in wrong("rnn_tanh")[0]


RUN = [  # processors, cell, work, math mode, N, H, T, layers
    (8, "gru", "training", "float32", 41, 64, 3, 2),  # several passes
    (32, "lstm", "forward", "float16", 40, 60, 2, 3),  # several groups
]


@needs_compiler
@pytest.mark.parametrize("problem", RUN, ids=lambda problem: "-".join(map(str, problem)))
def test_a_plan_runs_and_matches_the_reference(
    problem: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    processors, cell, work, mode, N, H, T, layers = problem
    chosen = decide(
        H200._replace(processors=processors),
        SequenceProblem(cell, work, mode, N, H, T, 1, layers),
    )
    assert isinstance(chosen, LaunchPlan) and (chosen.passes > 1 or chosen.groups > 1)
    tiling, original = Function(chosen.name, wave=True).tiling, emulated_sequences.launch
    monkeypatch.setattr(Tiling, "shared", lambda self, passes: chosen.shared)
    monkeypatch.setattr(
        emulated_sequences,
        "launch",
        lambda tiling, arguments, grid, *rest: original(tiling, arguments, chosen.grid, *rest),
    )
    cases = stack_of(cell, tiling.kind, H, (T, *[T - 1] * (N - 1)), layers)
    run = Run(resident=processors * chosen.blocks_per_processor)
    check_wavefront(cases, tiling, passes=chosen.passes, run=run, max_polls=5000)
