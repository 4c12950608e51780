"""Both directions of a layer in one launch of a sequence kernel, on the emulator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.emulated_sequences import (
    TAG,
    LaunchResult,
    check_backward,
    check_backward_result,
    check_forward,
    check_forward_result,
    run_backwards,
    run_forwards,
)
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import DTYPES, Faults, Run, Tiling
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case
from xprnn.cells import CELLS

pytestmark = needs_compiler
RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
KERNELS = [("gru", "TF32X3"), ("gru", "BF16"), ("lstm", "TF32"), ("rnn_tanh", "TF32X3"),
           ("rnn_relu", "F16")]  # fmt: skip
PAIRED = Tiling("gru", "training", "TF32", 2, 4, 2, 4, cluster=2)


def tiling(cell: str, work: str, kind: str) -> Tiling:
    needs_dtype(DTYPES[kind])
    G = CELLS[cell].gates if work == "backward" else 1
    return Tiling(cell, work, kind, 4, G, G, 1)


def pair(cell: str, kind: str, H: int, lengths: tuple[int, ...], **options: Any) -> list[Case]:
    """Two directions with different values."""
    return [Case(cell, kind, H, lengths, way, seed=7 + way, **options) for way in (False, True)]


@pytest.mark.parametrize("lengths", [RAGGED, (4,) * 17, (1,)], ids=["ragged", "groups", "a step"])
@pytest.mark.parametrize(("cell", "kind"), KERNELS)
def test_both_directions_match_the_reference(
    cell: str, kind: str, lengths: tuple[int, ...]
) -> None:
    for seed, H in enumerate((48, 33, 1)):
        forward, reverse = pair(cell, kind, H, lengths, bias=seed != 1, upstream=seed != 2)
        for work in ("training", "forward"):
            check_forward(forward, tiling(cell, work, kind), reverse, run=Run(seed))
        check_backward(forward, tiling(cell, "backward", kind), reverse, run=Run(seed), wide=H)


@pytest.mark.parametrize(("cell", "kind"), KERNELS[1:])
def test_both_directions_in_any_thread_order(cell: str, kind: str) -> None:
    forward, reverse = pair(cell, kind, 48, RAGGED)
    for seed in range(1, 8):
        check_forward(forward, tiling(cell, "training", kind), reverse, run=Run(seed))
        check_backward(forward, tiling(cell, "backward", kind), reverse, run=Run(seed))


@pytest.mark.frozen
def test_both_directions_in_clusters() -> None:
    for seed, H in enumerate((100, 33)):
        forward, reverse = pair("gru", "TF32", H, (3, 2) * 17)
        check_forward(forward, PAIRED, reverse, run=Run(seed))
        backward = Tiling("gru", "backward", "TF32", 4, 8, 4, 2, cluster=2)
        check_backward(forward, backward, reverse, run=Run(seed))


def both_passes(
    cell: str, kind: str
) -> list[tuple[Tiling, Callable[..., list[LaunchResult]], Any]]:
    """For forward and backward: the tiling, how to run it, and the check of a direction."""
    forward, backward = tiling(cell, "training", kind), tiling(cell, "backward", kind)
    return [
        (forward, run_forwards, lambda case, result: check_forward_result(case, forward, result)),
        (backward, run_backwards, check_backward_result),
    ]


@pytest.mark.parametrize("stuck", (0, 1))
@pytest.mark.parametrize(("cell", "kind"), KERNELS[1:4])
def test_a_direction_that_times_out_does_not_affect_the_other(
    cell: str, kind: str, stuck: int
) -> None:
    times_out = f"if (blockIdx.z == {stuck}) return false;\n  const PollResult result = await"
    faults = (("const PollResult result = await", times_out),)
    cases = pair(cell, kind, 48, (5, 4, 4, 2))
    for sizes, run, check in both_passes(cell, kind):
        for seed in range(3):
            results = run(cases, sizes, run=Run(seed), faults=faults, max_polls=5000)
            assert results[0].outcome == "fine"
            assert 0 <= results[0].report - TAG < 5
            other = results[1 - stuck]
            other.report = 0  # shared by both
            check(cases[1 - stuck], other)
            for name in cases[0].dstates if sizes.work == "backward" else ():
                assert np.isnan(results[stuck].arrays[name]).all(), name
            if sizes.work == "training":
                h = results[stuck].arrays["h"]
                final = cases[stuck].layout.final(h, cases[stuck].reverse)
                assert np.isnan(final.astype(np.float32)).all()


@pytest.mark.parametrize("resident", (1, 2, 3, 4, 5))
def test_too_few_resident_blocks_end_with_nan_or_correct_results(resident: int) -> None:
    """Three blocks per direction: the second direction starts after the first has ended."""
    cases = pair("gru", "BF16", 48, (5, 4, 4, 2))
    for sizes, run, check in both_passes("gru", "BF16"):
        results = run(cases, sizes, run=Run(resident, resident), max_polls=2000)
        assert results[0].outcome == "fine"
        assert bool(results[0].report) == (resident < 3)
        for case, result in zip(cases, results, strict=True):
            result.report = 0
            ends = [result.arrays[name] for name in case.dstates if name in result.arrays]
            if sizes.work == "training":
                ends = [case.layout.final(result.arrays["h"], case.reverse)]
            timed_out = np.isnan(ends[0].astype(np.float32))
            if timed_out.any():
                assert timed_out.all() and resident < 3
            else:
                check(case, result)


CHOICE = "blockIdx.z ? slots[1] : slots[0]"
Z_REVERSED = "reverse || (!WAVEFRONT && blockIdx.z);"
FAULTS: dict[str, Faults] = {
    "the first direction's arrays": ((CHOICE, "slots[0]"),),
    "directions exchanged": ((CHOICE, "slots[blockIdx.z ^ 1]"),),
    "the index of the rows": ((CHOICE, "slots[blockIdx.y & 1]"),),
    "no direction reversed": ((Z_REVERSED, "reverse;"),),
    "the wrong direction reversed": ((Z_REVERSED, "reverse || !blockIdx.z;"),),
    "a shared exchange buffer": (("own.exchange, H}", "arrays.slots[0].exchange, H}"),),
    "shared weights": (("(cell, own.weight_hh", "(cell, arrays.slots[0].weight_hh"),),
    "the other's gates": (("own.gates", "arrays.slots[!blockIdx.z].gates"),),
}


def is_detected(cell: str, backward: bool, faults: Faults) -> bool:
    """Whether one of the cases gives a wrong result or deadlocks."""
    work = "backward" if backward else "training"
    check = check_backward if backward else check_forward
    for H, seed in itertools.product((48, 33), range(3)):
        forward, reverse = pair(cell, "TF32", H, RAGGED)
        try:
            check(forward, tiling(cell, work, "TF32"), reverse, run=Run(seed), faults=faults,
                  max_polls=3000)  # fmt: skip
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_detected(fault: str, backward: bool) -> None:
    assert is_detected("gru", backward, FAULTS[fault])


@pytest.mark.parametrize("cell", ("lstm", "rnn_tanh"))
@pytest.mark.parametrize("fault", ("a shared exchange buffer", "shared weights"))
def test_an_injected_fault_in_other_cells_is_detected(fault: str, cell: str) -> None:
    assert is_detected(cell, False, FAULTS[fault]) and is_detected(cell, True, FAULTS[fault])


def test_the_cases_pass_without_a_fault() -> None:
    no_change = (("namespace emulator {\n\nenum", "namespace emulator {\n\n\nenum"),)
    for cell, backward in itertools.product(("gru", "lstm", "rnn_tanh"), (False, True)):
        assert not is_detected(cell, backward, no_change)
