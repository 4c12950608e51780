"""Plans run as planned: instantiation, grid, passes and shared memory.

On the emulator, compared with the reference in float64, with the sizes of real layers. The other
tests of these kernels run their own small tilings.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels.cuda.planner.test_plan import H200
from tests.support import emulated_sequences
from tests.support.emulated_sequences import check_backward, check_forward
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import DTYPES, Run, Tiling
from tests.support.fake_cupy.sequence import Function
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case
from xprnn.kernels.cuda.plan import DeviceProperties, LaunchPlan, SequenceProblem, plan
from xprnn.kernels.cuda.table import KERNELS

pytestmark = needs_compiler

FEW = H200._replace(processors=8)  # few blocks: several passes of several tiles
GROUPS = H200._replace(processors=16)  # the same, in two groups
TWICE = FEW._replace(processors=4, registers=131072, shared=466944)  # two blocks per multiprocessor
PROBLEMS = [  # device, cell, work, math mode, N, H, T
    *[
        (H200, "gru", work, mode, 2, 1024, 2)
        for mode in ("float32", "tf32", "bfloat16", "float16")
        for work in ("training", "backward")
    ],
    # H is not a multiple of 16; in 16-bit modes part of the weights is in shared memory
    (H200, "gru", "forward", "float32", 1, 1000, 2),
    (H200, "gru", "backward", "float16", 3, 1001, 2),
    (H200, "gru", "training", "bfloat16", 2, 1032, 2),
    (H200, "gru", "backward", "bfloat16", 2, 1032, 2),
    (FEW, "gru", "training", "float32", 70, 128, 3),
    (FEW, "gru", "forward", "tf32", 41, 127, 3),
    (FEW, "gru", "backward", "bfloat16", 70, 128, 3),
    (GROUPS, "gru", "training", "float16", 70, 128, 3),
    (GROUPS, "gru", "backward", "float32", 70, 125, 3),
    (TWICE, "gru", "training", "bfloat16", 9, 128, 3),
    (TWICE, "gru", "backward", "tf32", 20, 120, 3),
    (H200, "lstm", "training", "float16", 2, 520, 2),
    (FEW, "lstm", "training", "float32", 70, 128, 3),
    (GROUPS, "lstm", "backward", "bfloat16", 70, 125, 3),
    (TWICE, "lstm", "backward", "float32", 20, 120, 3),
    (FEW, "rnn_tanh", "forward", "tf32", 41, 127, 3),
    (GROUPS, "rnn_relu", "backward", "float32", 70, 128, 3),
]


@pytest.fixture(autouse=True)
def clear_plan_cache() -> Iterator[None]:
    """Forget the plans of a planner that a test has changed."""
    yield
    plan.cache_clear()


def planned(
    device: DeviceProperties, cell: str, work: str, mode: str, N: int, H: int, T: int
) -> LaunchPlan:
    plan.cache_clear()
    chosen = plan(device, SequenceProblem(cell, work, mode, N, H, T))
    assert isinstance(chosen, LaunchPlan), chosen
    return chosen


def run(chosen: LaunchPlan, problem: tuple[Any, ...], patch: pytest.MonkeyPatch) -> None:
    """Fail unless the plan completes on its device with the reference's results."""
    device, cell, work, _, N, H, T = problem
    tiling, original = Function(chosen.name).tiling, emulated_sequences.launch
    needs_dtype(DTYPES[tiling.kind])
    check = check_backward if work == "backward" else check_forward
    case = Case(cell, tiling.kind, H, (T, *[T - 1] * (N - 1)), reverse=N % 2 > 0, seed=N)
    resident = Run(resident=device.processors * chosen.blocks_per_processor)
    with patch.context() as patched:
        patched.setattr(Tiling, "shared", lambda self, passes: chosen.shared)
        patched.setattr(
            emulated_sequences,
            "launch",
            lambda tiling, arguments, grid, *rest: original(tiling, arguments, chosen.grid, *rest),
        )
        check(case, tiling, passes=chosen.passes, run=resident, max_polls=5000)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: "-".join(map(str, problem[1:])))
def test_a_plan_runs_and_matches_the_reference(
    problem: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(planned(*problem), problem, monkeypatch)


def test_the_plans_cover_all_kinds() -> None:
    plans = [planned(*problem) for problem in PROBLEMS]
    assert {p.tiling.warps for p in plans} == {8}
    assert {p.tiling.in_registers < p.tiling.k_blocks for p in plans} == {False, True}
    assert {(p.groups > 1, p.passes > 1) for p in plans} >= {(False, True), (True, True)}
    assert {p.blocks_per_processor for p in plans} == {1, 2}


FORWARD = (FEW, "gru", "training", "float16", 41, 100, 3)
BACKWARD = (FEW, "gru", "backward", "float32", 64, 125, 3)
APART = (H200, "gru", "forward", "float32", 8, 520, 1)
FAULTS: dict[str, tuple[tuple[Any, ...], dict[str, int]]] = {
    "too little shared memory": (FORWARD, {"shared": -32}),
    "too little shared memory for dh": (BACKWARD, {"shared": -32}),
    "too few slices": (FORWARD, {"slices": -1}),
    "too few groups": ((GROUPS, *FORWARD[1:]), {"groups": -1}),
    "too few passes": (FORWARD, {"passes": -1}),
    "too few passes, backward": (BACKWARD, {"passes": -1}),
    "too few on a multiprocessor": ((TWICE, *FORWARD[1:]), {"blocks_per_processor": -1}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_plan_with_fewer_resources_is_detected(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, reductions = FAULTS[name]
    chosen = planned(*problem)
    run(chosen, problem, monkeypatch)
    change = {name: getattr(chosen, name) + by for name, by in reductions.items()}
    with pytest.raises(AssertionError):
        run(chosen._replace(**change), problem, monkeypatch)


@pytest.mark.parametrize(
    ("problem", "change"),
    [(FORWARD, {"sums": 3824}), (BACKWARD, {"carried": 448}), (APART, {"weights": 23})],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_too_little_planned_shared_memory_is_detected(
    problem: tuple[Any, ...], change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = problem[1:3]  # slightly: beyond a KiB the emulator itself would crash
    run(planned(*problem), problem, monkeypatch)
    monkeypatch.setitem(KERNELS, key, KERNELS[key]._replace(**change))
    with pytest.raises(AssertionError, match="shared memory overrun"):
        run(planned(*problem), problem, monkeypatch)
