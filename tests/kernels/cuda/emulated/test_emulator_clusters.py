"""Clusters on the emulator: valid use, and the misuse that is reported.

Each case is a kernel of a few lines, run by a cluster of two blocks of one warp; all are compiled
together.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.support.emulator.build import OUTCOMES, compiled, emulator_source
from tests.support.emulator.elementwise import needs_compiler

pytestmark = [needs_compiler, pytest.mark.frozen]
FIRST = "if (threadIdx.x == 0) "
SEND = "send4(at_rank(data + threadIdx.x, 1 - rank), piece, at_rank(full, 1 - rank));"
WAIT = "for (int polls = 0; !all_lanes(ended(full, {})); ++polls) pause();"
READ = "out[rank * 32 + threadIdx.x] = data[threadIdx.x].x;"
BEGIN = f"{FIRST}init(full, 1); sync_cluster();"
ENOUGH = f"{FIRST}expect(full, 512);"
BLOCK_ENDED = "sent to a block that has ended"
CASES = {  # the code of the blocks, and the outcome
    "bytes awaited": (f"{BEGIN} {ENOUGH} {SEND} {WAIT.format(0)} {READ} sync_cluster();", "fine"),
    "bytes that come first": (
        f"{BEGIN} {SEND} for (int i = 0; i < 200; ++i) pause(); {ENOUGH} {WAIT.format(0)} {READ} "
        "sync_cluster();",
        "fine",
    ),
    "bytes read too early": (
        f"{BEGIN} {ENOUGH} {SEND} {READ} {WAIT.format(0)} sync_cluster();", ""),
    "bytes that are not expected": (f"{BEGIN} {SEND} {WAIT.format(0)}", "deadlock"),
    "one phase too many": (f"{BEGIN} {FIRST}expect(full, 0); {WAIT.format(1)} {WAIT.format(0)} "
                         f"{FIRST}expect(full, 0); {WAIT.format(0)}", "deadlock"),
    "two phases ahead": (f"{BEGIN} {FIRST}expect(full, 0); {FIRST}expect(full, 0);",
                         "barrier misused"),
    "one arrival too many": (f"{FIRST}init(full, 2); sync_cluster(); {FIRST}expect(full, 16); "
                            f"{FIRST}expect(full, 0); {FIRST}expect(full, 0);", "barrier misused"),
    "an uninitialised barrier": (f"{SEND} sync_cluster();", "barrier misused"),
    "a block that has ended": (f"{BEGIN} if (rank) {SEND}", BLOCK_ENDED),
    "an arrival at the last moment": (
        f"{BEGIN} {FIRST}arrive(at_rank(full, 1 - rank)); sync_cluster();", "fine"),
    "a barrier that not all reach": (f"{BEGIN} if (!rank) sync_cluster();", "fine"),
    "half a warp": (f"{BEGIN} if (threadIdx.x < 16) sync_warp(); sync_cluster();", "deadlock"),
    "an unaligned address": (
        f"{BEGIN} {SEND.replace('data + threadIdx.x', '(unsigned*)data + threadIdx.x')}",
        "unaligned vector"),
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """All kernels, as functions of a seed and the output array."""
    text = emulator_source(("common.h", "device.h"))
    for i, (body, _) in enumerate(CASES.values()):
        text += f"""
namespace xprnn {{
void kernel{i}(unsigned* out) {{
  XP_SHARED(shared);
  Barrier* const full = reinterpret_cast<Barrier*>(shared);
  uint4* const data = reinterpret_cast<uint4*>(shared + 16);
  const unsigned rank = cluster_rank();
  const uint4 piece = {{100 * rank + threadIdx.x, 0, 0, 0}};
  (void)full, (void)data, (void)piece;
  {body}
}}
}}
extern "C" int run{i}(unsigned seed, unsigned* out) {{
  return emulator::launch({{2, 1, 1}}, 32, 16 + 512, seed, 0, [=] {{ xprnn::kernel{i}(out); }}, 2);
}}"""
    return compiled("clusters", text)


@pytest.mark.parametrize("name", CASES)
def test_clusters_end_with_the_expected_outcome(name: str, library: ctypes.CDLL) -> None:
    run = library[f"run{list(CASES).index(name)}"]
    expected = CASES[name][1]
    sent = np.concatenate([100 + np.arange(32), np.arange(32)])  # by the other block
    outcomes, right = set(), []
    for seed in range(1, 40):
        received = np.zeros(64, np.uint32)
        outcomes.add(OUTCOMES[run(seed, ctypes.c_void_p(received.ctypes.data))])
        right.append((received == sent).all())
    if READ in CASES[name][0]:
        assert all(right) == bool(expected)
    outcomes -= {"fine"} if expected == BLOCK_ENDED else set()  # if it arrives in time
    assert outcomes == {expected or "fine"}
