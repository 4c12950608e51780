"""`recompute=k` with injected faults: each is caught by `layers/test_recompute.py`'s comparison."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from tests.layers.test_recompute import assert_equal, check, run_in_segments
from tests.support.cases import Case, Results
from xprnn.core import dropout
from xprnn.engine import checkpointing, stack

FAULTS = {
    "all states in one slot": ("begin = saved.stop", "begin = saved.start"),
    "states after a segment": ("state[begin] = end[: batch.running]", "state[begin] = 0.0"),
    "gradients overwritten": ("total += each", "total[...] = each"),
    "the first one's added": ("written = share\n", "pass\n"),
    "reverse run in the wrong order": ("_walk(segments, direction.reverse)", "iter(segments)"),
    "backward in the wrong order": ("_walk(segments, not direction.reverse)", "reversed(segments)"),
    "rows of another segment": ("activations.x[rows]", "activations.x[: rows.stop - rows.start]"),
}


def assert_detected(case: Case, expected: Results, fault: str) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(run_in_segments(case, 4), expected, fault, 1e-3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (old, new) = Case("lstm", 2, 2), FAULTS[fault]
    source = inspect.getsource(checkpointing)
    assert source.count(old) == 1
    faulty = ModuleType(checkpointing.__name__)
    faulty.__package__ = checkpointing.__package__
    exec(source.replace(old, new), faulty.__dict__)
    check(case, (4,))
    expected = run_in_segments(case, None)
    monkeypatch.setattr(stack, "Checkpointed", faulty.Checkpointed)
    assert_detected(case, expected, fault)


def test_masks_by_the_time_within_a_segment_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    case, original = Case("lstm", 2, 2, dropout=0.5), dropout.apply
    expected = run_in_segments(case, None)
    monkeypatch.setattr(
        dropout, "apply", lambda xp, x, p, key, time, row: original(xp, x, p, key, time % 4, row)
    )
    assert_detected(case, expected, "relative time")
