"""Layers of a stack as a wavefront, one launch of a sequence kernel, on the emulator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.support.emulated_sequences import TAG, run_forwards
from tests.support.emulated_wavefronts import check_layer, check_wavefront, stack_of, tiling_of
from tests.support.emulator.build import Faults
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import K_BLOCK_ELEMENTS, Run
from xprnn.cells import CELLS
from xprnn.kernels.cuda.table import MAX_WAVEFRONT_LAYERS

pytestmark = [needs_compiler, pytest.mark.frozen]
RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
SIZES = {  # lengths, H, layers
    "ragged": (RAGGED, 33, 3),
    "two groups": ((4,) * 17, 48, 2),
    "a unit, a step": ((1,), 1, 2),
}
ALL = [
    *[(cell, kind) for cell in ("gru", "lstm", "rnn_tanh") for kind in K_BLOCK_ELEMENTS],
    ("rnn_relu", "TF32X3"),
]
WORKS = {pair: ("training", "forward")[k % 2] for k, pair in enumerate(ALL)}
FEW = [("gru", "TF32X3"), ("lstm", "BF16"), ("rnn_tanh", "TF32X3")]


@pytest.mark.parametrize(("cell", "kind"), ALL)
def test_layers_match_the_reference(cell: str, kind: str) -> None:
    for seed, (lengths, H, layers) in enumerate(SIZES.values()):
        cases = stack_of(cell, kind, H, lengths, layers, bias=seed != 1)
        check_wavefront(cases, tiling_of(cell, WORKS[cell, kind], kind), run=Run(seed))


def test_the_maximum_number_of_layers() -> None:
    check_wavefront(
        stack_of("gru", "BF16", 17, (2,), MAX_WAVEFRONT_LAYERS),
        tiling_of("gru", "training", "BF16"),
    )


@pytest.mark.parametrize(("cell", "kind"), FEW)
def test_layers_in_any_order(cell: str, kind: str) -> None:
    cases = stack_of(cell, kind, 33, RAGGED, 3)
    for seed in range(1, 11 if cell == "gru" else 5):
        check_wavefront(cases, tiling_of(cell, WORKS[cell, kind], kind), run=Run(seed))


@pytest.mark.parametrize(
    ("cell", "kind", "which"), [("gru", "TF32X3", 1), ("gru", "BF16", 2), ("lstm", "BF16", 3)]
)
def test_passes_of_every_tiling(cell: str, kind: str, which: int) -> None:
    for passes, H in ((1, 40), (2, 64), (3, 48)):
        cases = stack_of(cell, kind, H, (3, 2) * 12, 2)
        tiling = tiling_of(cell, WORKS[cell, kind], kind, which)
        check_wavefront(cases, tiling, run=Run(passes), passes=passes)


def test_the_bits_are_the_same_in_any_order() -> None:
    cases, tiling = stack_of("gru", "TF32X3", 48, RAGGED, 3), tiling_of("gru", "forward", "TF32X3")
    results = {
        tuple([result.arrays[name].tobytes() for result in layers for name in ("h",)])
        for seed in range(4)
        for layers in [run_forwards(cases, tiling, run=Run(seed))]
    }
    assert len(results) == 1


@pytest.mark.parametrize("where", ("gx", "h0", "weight_ih", "weight_hh"))
@pytest.mark.parametrize(("cell", "kind"), FEW[:2])
def test_infinities_and_nans_match_the_reference(cell: str, kind: str, where: str) -> None:
    for value, layer in ((np.nan, 0), (np.inf, 1)) if where != "weight_ih" else ((np.inf, 1),):
        cases = stack_of(cell, kind, 33, (4, 4, 3, 2), 3)
        cases[layer].numbers[where][1, 4] = value
        check_wavefront(cases, tiling_of(cell, WORKS[cell, kind], kind), run=Run(3))


@pytest.mark.parametrize(
    ("cell", "kind", "stuck"), [("gru", "BF16", 0), ("gru", "BF16", 1), ("lstm", "BF16", 2)]
)
def test_a_layer_that_times_out_gives_nan_in_it_and_above(cell: str, kind: str, stuck: int) -> None:
    times_out = f"if (blockIdx.z == {stuck}) return false;\n  const PollResult result = await"
    faults = (("const PollResult result = await", times_out),)
    cases, tiling = stack_of(cell, kind, 33, (5, 4, 4, 2), 3), tiling_of(cell, "training", kind)
    for seed in range(2):
        results = run_forwards(cases, tiling, run=Run(seed), faults=faults, max_polls=5000)
        assert results[0].outcome == "fine" and 0 <= results[0].report - TAG < 5
        for layer, result in enumerate(results):
            if layer < stuck:
                result.report = 0  # shared by all layers
                check_layer(cases, layer, tiling, result)
                continue
            for name in CELLS[cell].state_names[: 1 if layer > stuck else 2]:
                final = cases[layer].layout.final(result.arrays[name], False)
                assert np.isnan(final.astype(np.float32)).all(), name


@pytest.mark.parametrize("resident", range(1, 7))
def test_too_few_resident_blocks_end_with_nan_or_correct_results(resident: int) -> None:
    """Three layers of two blocks each; an upper layer starts after a lower one has ended."""
    cases = stack_of("gru", "BF16", 32, (5, 4, 4, 2), 3)
    tiling = tiling_of("gru", "training", "BF16")
    results = run_forwards(cases, tiling, run=Run(resident, resident), max_polls=2000)
    assert results[0].outcome == "fine"
    assert bool(results[0].report) == (resident < 2)
    for layer, result in enumerate(results):
        result.report = 0
        final = cases[layer].layout.final(result.arrays["h"], False).astype(np.float32)
        if resident < 2 and np.isnan(final).any():
            assert np.isnan(final).all()
        else:
            check_layer(cases, layer, tiling, result)


Z_REVERSED = "reverse || (!WAVEFRONT && blockIdx.z);"
PUBLISHED = "this->publish(exchange + after * words, h);"
# rows of two steps before, which this layer no longer needs, but the layer above does
REUSED = f"{PUBLISHED} if (!blockIdx.z && after >= 24) {PUBLISHED.replace('after', '(after - 16)')}"
FAULTS: dict[str, Faults] = {
    "no wait for the layer below": (
        ("if (all_lanes(full)) return", "if (all_lanes(full) || threadIdx.x >= 64) return"),
    ),
    "a slot overwritten too early": ((PUBLISHED, REUSED),),
    "the step before of the layer below": (("(upper ? after : before)", "before"),),
    "the first layer's arrays": (("return slots[blockIdx.z]", "return slots[0]"),),
    "another layer's weights": (
        ("own.lower, seq", "{arrays.slots[1].lower.weight_ih, own.lower.exchange}, seq"),
    ),
    "the wrong lower layer": (
        (
            "own.lower, seq",
            "{own.lower.weight_ih, blockIdx.z ? arrays.slots[0].exchange : nullptr}, seq",
        ),
    ),
    "W_hh instead of W_ih": (("upper ? lower.weight_ih : weight_hh", "weight_hh"),),
    "shares of the second product that do not start at zero": (("warp - sharing", "warp"),),
    "the layer's own product twice": (("sums + partials / 2", "sums"),),
    "upper layers in reverse": ((Z_REVERSED, "reverse || blockIdx.z;"),),
}  # fmt: skip


def is_detected(cell: str, faults: Faults) -> bool:
    """Whether the last layer of one of the cases gives a wrong result or deadlocks."""
    tiling = tiling_of(cell, "training", "BF16")
    for lengths, seed in itertools.product(((6,) * 8, RAGGED), range(12)):
        cases = stack_of(cell, "BF16", 48, lengths, 3)
        try:
            results = run_forwards(cases, tiling, run=Run(seed), faults=faults, max_polls=3000)
            check_layer(cases, 2, tiling, results[2])
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_detected(fault: str) -> None:
    assert is_detected("gru", FAULTS[fault])


def test_a_missing_wait_in_another_cell_is_detected() -> None:
    assert is_detected("lstm", FAULTS["no wait for the layer below"])


def test_the_cases_pass_without_a_fault() -> None:
    assert not is_detected("gru", ())
