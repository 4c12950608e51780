"""Tests of the emulator's clusters: what they allow, and the misuse that they report.

Each case is a kernel of a few lines, two blocks of a warp in one cluster; all are compiled once.
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
WAIT = "for (int spins = 0; !all_lanes(ended(full, {})); ++spins) pause();"
READ = "out[rank * 32 + threadIdx.x] = data[threadIdx.x].x;"
BEGIN = f"{FIRST}init(full, 1); sync_cluster();"
ENOUGH = f"{FIRST}expect(full, 512);"
GONE = "sent to a block that has ended"
CASES = {  # what the blocks do, and the outcome
    "bytes awaited": (f"{BEGIN} {ENOUGH} {SEND} {WAIT.format(0)} {READ} sync_cluster();", "fine"),
    "bytes that come first": (
        f"{BEGIN} {SEND} for (int i = 0; i < 200; ++i) pause(); {ENOUGH} {WAIT.format(0)} {READ} "
        "sync_cluster();",
        "fine",
    ),
    "bytes read too early": (
        f"{BEGIN} {ENOUGH} {SEND} {READ} {WAIT.format(0)} sync_cluster();", ""),
    "bytes that nobody expects": (f"{BEGIN} {SEND} {WAIT.format(0)}", "deadlock"),
    "a phase too many": (f"{BEGIN} {FIRST}expect(full, 0); {WAIT.format(1)} {WAIT.format(0)} "
                         f"{FIRST}expect(full, 0); {WAIT.format(0)}", "deadlock"),
    "two phases ahead": (f"{BEGIN} {FIRST}expect(full, 0); {FIRST}expect(full, 0);",
                         "barrier misused"),
    "an arrival too many": (f"{FIRST}init(full, 2); sync_cluster(); {FIRST}expect(full, 16); "
                            f"{FIRST}expect(full, 0); {FIRST}expect(full, 0);", "barrier misused"),
    "a barrier that is none": (f"{SEND} sync_cluster();", "barrier misused"),
    "a block that is gone": (f"{BEGIN} if (rank) {SEND}", GONE),
    "an arrival at the last moment": (
        f"{BEGIN} {FIRST}arrive(at_rank(full, 1 - rank)); sync_cluster();", "fine"),
    "a barrier that not all reach": (f"{BEGIN} if (!rank) sync_cluster();", "fine"),
    "half a warp": (f"{BEGIN} if (threadIdx.x < 16) sync_warp(); sync_cluster();", "deadlock"),
    "a place that is not whole": (
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
def test_clusters_end_as_they_should(name: str, library: ctypes.CDLL) -> None:
    run = library[f"run{list(CASES).index(name)}"]
    expected = CASES[name][1]
    wanted = np.concatenate([100 + np.arange(32), np.arange(32)])  # those of the other block
    outcomes, right = set(), []
    for seed in range(1, 40):
        found = np.zeros(64, np.uint32)
        outcomes.add(OUTCOMES[run(seed, ctypes.c_void_p(found.ctypes.data))])
        right.append((found == wanted).all())
    if READ in CASES[name][0]:
        assert all(right) == bool(expected)
    outcomes -= {"fine"} if expected == GONE else set()  # in time, if by luck
    assert outcomes == {expected or "fine"}
