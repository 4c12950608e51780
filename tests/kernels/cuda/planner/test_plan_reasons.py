"""Reasons of the sequence kernels' planner: each names exactly what does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest

from xprnn.kernels import Unsupported
from xprnn.kernels.cuda.plan import DeviceProperties, LaunchPlan, SequenceProblem, plan

GRU = SequenceProblem("gru", "training", "float32", 8, 512, 100)
H200 = DeviceProperties((9, 0), 132)
SMALL = DeviceProperties((8, 6), 28, threads=1536, blocks=16, shared=102400, shared_block=101376)
REASONS: list[tuple[DeviceProperties, dict[str, Any], str]] = [
    (H200, {"cell": "gru_reset_before"}, "reset_after=False takes two dependent products"),
    (H200, {"cell": "peephole"}, "no sequence kernel for cell 'peephole'"),
    (H200, {"cell": "lstm", "H": 1153}, "H=1153: the kernels for float32 hold at most H=1152"),
    (H200, {"math_mode": "float64"}, "float64: sequence kernels support float32, tf32, bfloat16"),
    (H200._replace(capability=(7, 5)), {}, "compute capability 7.5: sequence kernels need 8.0"),
    (H200._replace(cooperative=False), {}, "does not support cooperative launches"),
    (H200, {"T": 0}, "T=0 N=8: there is nothing to launch"),
    (H200, {"N": 0}, "T=100 N=0: there is nothing to launch"),
    (H200, {"N": 2**20, "T": 2047}, r"N \* \(T \+ 1\) = 2,147,483,648: .* less than 2,147,483,648"),
    (H200, {"H": 1665}, "H=1665: the kernels for float32 hold at most H=1664"),
    (H200, {"H": 1665, "work": "backward"}, "H=1665: .* at most H=1664"),
    (H200, {"H": 2561, "math_mode": "float16"}, "H=2561: .* float16 hold at most H=2560"),
    (
        H200,
        {"H": 2113, "math_mode": "bfloat16"},
        "H=2113: 133 blocks must run at once, one for 16 units; this device holds 132",
    ),
    (SMALL, {"H": 1024}, "H=1024: .* 104,576 bytes of shared memory, this device has 101,376"),
    (SMALL, {"H": 449}, "H=449: 29 blocks .* holds 28"),
    (
        H200,
        {"work": "backward", "N": 10**6},
        r"N=1000000: .* 16,010,368 bytes .* 31250 passes; .* 232,448 for one, 233,472 for 1",
    ),
]


@pytest.mark.parametrize(("device", "change", "reason"), REASONS, ids=[r[2] for r in REASONS])
def test_the_reason_names_what_does_not_fit(
    device: DeviceProperties, change: dict[str, Any], reason: str
) -> None:
    assert isinstance(plan(H200, GRU), LaunchPlan)
    answer = plan(device, GRU._replace(**change))
    assert isinstance(answer, Unsupported), answer
    assert re.search(reason, answer.reason), answer


@pytest.mark.parametrize(
    ("device", "change", "fits"),
    [
        (H200, {"H": 2113, "math_mode": "bfloat16"}, {"H": 2112}),
        (SMALL, {"H": 449}, {"H": 448}),
        (H200, {"H": 1665}, {"H": 1664}),
        (H200, {"N": 2**20, "T": 2047}, {"T": 2046}),
    ],
)
def test_the_limits_in_the_reasons_are_exact(
    device: DeviceProperties, change: dict[str, Any], fits: dict[str, Any]
) -> None:
    assert isinstance(plan(device, GRU._replace(**change)), Unsupported)
    assert isinstance(plan(device, GRU._replace(**{**change, **fits})), LaunchPlan)
