"""Sequence kernels in which the blocks of a cluster share polled data, on the emulator.

Mostly one tiling per kind: the sharing depends neither on the cell nor on the sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.emulated_sequences import (
    TAG,
    check_backward,
    check_forward,
    run_backward,
    run_forward,
)
from tests.support.emulator.build import Faults
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import DTYPES, K_BLOCK_ELEMENTS, Run, Tiling
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case

pytestmark = [needs_compiler, pytest.mark.frozen]
RAGGED = (5, 3, 5, 1, 0, 5, 2, 4, 4, 1, 3)
LENGTHS = {"a row": (4,), "two groups": (3,) * 33, "ragged": RAGGED, "tails": (4,) * 9 + (1,) * 16}
CLUSTERS = [("BF16", 2, 4), ("F16", 4, 2), ("TF32", 2, 4), ("TF32X3", 4, 2)]  # forward, backward
FULL = 128  # units that fill the forward reduction: each block polls a part of every k-block
ENOUGH = 300  # polls, enough for all data to arrive
Call = Callable[..., Any]


def call_of(kind: str, cluster: int, backward: bool) -> tuple[Tiling, Call]:
    """With half of the weights in shared memory, and in forward several tiles per batch."""
    needs_dtype(DTYPES[kind])
    k_blocks = cluster * 32 // K_BLOCK_ELEMENTS[kind]
    if backward:
        return Tiling(
            "gru", "backward", kind, 4, 2 * k_blocks, k_blocks, 2, cluster
        ), check_backward
    sizes = 4 // cluster, k_blocks, k_blocks // 2, 4, cluster
    return Tiling("gru", "training", kind, *sizes), check_forward


BOTH = [
    pytest.param(kind, size, name == "backward", id=f"{kind} {name}")
    for kind, *sizes in CLUSTERS
    for name, size in zip(("forward", "backward"), sizes, strict=True)
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("kind", "cluster", "backward"), BOTH)
def test_clusters_match_the_reference(
    kind: str, cluster: int, backward: bool, lengths: str
) -> None:
    """With H = 33 some blocks have no units, but still poll for their cluster."""
    tiling, check = call_of(kind, cluster, backward)
    for seed, (H, passes) in enumerate([(33, 1), (FULL, 2), (100, 1), (16, 3)]):
        case = Case("gru", kind, H, LENGTHS[lengths], reverse=seed % 2 > 0, seed=seed)
        check(case, tiling, run=Run(seed), passes=passes)


@pytest.mark.parametrize(("kind", "cluster", "backward"), BOTH)
def test_clusters_in_any_thread_order(kind: str, cluster: int, backward: bool) -> None:
    tiling, check = call_of(kind, cluster, backward)
    case = Case("gru", kind, FULL, RAGGED)
    for seed in range(8):
        check(case, tiling, run=Run(seed))


PARTS = Tiling("gru", "training", "TF32", 1, 20, 2, 2, cluster=2)  # a tile in two batches
LSTM = Tiling("lstm", "training", "BF16", 2, 4, 4, 2, cluster=2)
ELMAN = Tiling("rnn_tanh", "forward", "F16", 2, 4, 4, 4, cluster=4)


@pytest.mark.parametrize(("tiling", "H"), [(PARTS, 317), (LSTM, 125), (ELMAN, 125)], ids=str)
def test_other_cells_and_parts_of_a_tile(tiling: Tiling, H: int) -> None:
    needs_dtype(DTYPES[tiling.kind])
    for seed in range(3):
        case = Case(tiling.cell, tiling.kind, H + seed, RAGGED, reverse=seed > 0, seed=seed)
        check_forward(case, tiling, run=Run(seed))


def test_the_bits_are_the_same_in_any_order() -> None:
    tiling, _ = call_of("TF32X3", 4, False)
    case = Case("gru", "TF32X3", FULL, RAGGED)
    assert len({run_forward(case, tiling, run=Run(s)).arrays["h"].tobytes() for s in range(6)}) == 1


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("gx", "weight_hh", "h0"))
@pytest.mark.parametrize("kind", ("F16", "TF32X3"))
def test_infinities_and_nans_match_the_reference(kind: str, where: str, value: float) -> None:
    """They arrive from other blocks as well as in a block's own polls."""
    tiling, check = call_of(kind, 4, False)
    for H, index in ((33, (1, 4)), (33, (0, 32)), (FULL, (2, 99))):
        case = Case("gru", kind, H, (4, 4, 3, 2), special=((where, index, value),))
        check(case, tiling, run=Run(3))


@pytest.mark.parametrize(("kind", "cluster", "backward"), BOTH)
def test_the_poll_limit_ends_all_blocks_of_a_cluster(
    kind: str, cluster: int, backward: bool
) -> None:
    tiling, _ = call_of(kind, cluster, backward)
    case = Case("gru", kind, 64 * cluster // 2, (5, 4, 4, 2))
    run = run_backward if backward else run_forward
    for seed in range(1, 4):  # the second cluster starts after the first has timed out
        assert run(case, tiling, run=Run(seed, cluster)).outcome == "deadlock"
        result = run(case, tiling, run=Run(seed, cluster), max_polls=ENOUGH)
        assert result.outcome == "fine"
        assert 0 <= result.report - TAG < 5, hex(result.report)
        if backward:
            assert np.isnan(result.arrays["dh"]).all()
        else:
            last = case.layout.final(result.arrays["h"], False).astype(np.float32)
            assert np.isnan(last).all()


def test_a_block_that_times_out_alone_ends_its_cluster() -> None:
    """One warp of one block skips a batch, and the others wait for its data."""
    alone = (
        "if (blockIdx.x == 1 && threadIdx.x < 32 && stage.batch == 2) return false;\n  if (await"
    )
    tiling, _ = call_of("BF16", 2, False)
    case = Case("gru", "BF16", 64, (5, 5, 4, 4))
    for seed in range(8):
        result = run_forward(
            case, tiling, run=Run(seed), faults=(("if (await", alone),), max_polls=ENOUGH
        )
        assert result.outcome == "fine"
        assert 0 < result.report - TAG < 5
        assert np.isnan(case.layout.final(result.arrays["h"], False).astype(np.float32)).all()


WAIT = "if (!wait(barrier(empty), ~batch & 1, max_polls)) return false;"
BEGIN = "    sync_cluster();\n  }\n  // No block"
READ = "  const bool fast_path = mode"
FAULTS: dict[str, tuple[str, str]] = {
    "no wait for the buffer": (WAIT, ""),
    "no wait for the data": ("return wait(barrier(full), batch & 1, max_polls);", "return true;"),
    "a lane's bytes not counted": (
        "(full), Sizes::received_bytes)",
        "(full), Sizes::received_bytes - 16)",
    ),
    "no barrier at the end": ("void close() const { sync_cluster(); }", "void close() const {}"),
    "no barrier at the beginning": (BEGIN, BEGIN.replace("sync_cluster();", "")),
    "another block's offset": ("offset(cluster - d, i)", "offset(d, i)"),
    "the other phase": ("(full), batch & 1, max_polls)", "(full), ~batch & 1, max_polls)"),
    "released before reading": (READ, f"stage.release(), --stage.batch;{READ}"),
    "released by every lane": ("if (threadIdx.x % 32 == 0)\n      for", "for"),
    "weights in another order": ("stage.k_block(k_block))", "k_block)"),
}
OUTCOME = {"no barrier at the end": "ended", "released by every lane": "misused"}


def failure(faults: Faults, kind: str, special: Any = ()) -> str:
    """The failure of the first case that fails, or ""."""
    for seed in range(25):
        case = Case("rnn_tanh", kind, FULL, RAGGED, seed=seed, special=special)
        try:
            check_forward(
                case, ELMAN._replace(kind=kind), run=Run(seed), faults=faults, max_polls=4000
            )
        except AssertionError as error:
            return str(error) or "wrong"
    return ""


def test_the_cases_pass_without_a_fault() -> None:
    assert not failure((), "F16")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_detected(fault: str) -> None:
    message = failure((FAULTS[fault],), "F16")
    assert message and OUTCOME.get(fault, "") in message


def test_ignoring_a_neighbours_infinity_is_detected() -> None:
    alone = ("d ? stage.get(d, i) : own[i]);\n  return", "own[i]);\n  return")
    infinity = (("h0", (1, 99), np.inf),)
    assert not failure((), "TF32X3", infinity)
    assert "not finite elsewhere" in failure((alone,), "TF32X3", infinity)


def test_an_incomplete_cluster_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiling, "grid", lambda self, *sizes: (3, 1, 1))
    tiling, _ = call_of("BF16", 2, False)
    assert run_forward(Case("gru", "BF16", 48, (3,)), tiling).outcome == "incomplete cluster"


def test_too_little_shared_memory_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling, _ = call_of("BF16", 2, False)
    enough = tiling.shared(1)
    case = Case("gru", "BF16", 64, (2,) * 8)
    assert run_forward(case, tiling).outcome == "fine"
    monkeypatch.setattr(Tiling, "shared", lambda self, passes: enough - 16)
    assert run_forward(case, tiling).outcome == "shared memory overrun"
