"""`recompute=k` with injected faults: each is caught by `layers/test_recompute.py`'s comparison."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from tests.layers.test_recompute import assert_equal, check, with_segments
from tests.support.cases import Case, Results
from xprnn.engine import checkpointing, dropout, stack

FAULTS = {
    "states in one any_backend": ("begin = saved.stop", "begin = saved.start"),
    "states after a segment": ("state[begin] = end[: batch.running]", "state[begin] = 0.0"),
    "gradients overwritten": ("total += each", "total[...] = each"),
    "the first one's added": ("written = share\n", "pass\n"),
    "reverse run in the wrong order": ("_walk(segments, direction.reverse)", "iter(segments)"),
    "undone in the wrong order": ("_walk(segments, not direction.reverse)", "reversed(segments)"),
    "rows of another segment": ("activations.x[rows]", "activations.x[: rows.stop - rows.start]"),
}


def assert_found(case: Case, expected: Results, fault: str) -> None:
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(with_segments(case, 4), expected, fault, 1e-3)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (old, new) = Case("lstm", 2, 2), FAULTS[fault]
    source = inspect.getsource(checkpointing)
    assert source.count(old) == 1
    faulty = ModuleType(checkpointing.__name__)
    faulty.__package__ = checkpointing.__package__
    exec(source.replace(old, new), faulty.__dict__)
    check(case, (4,))
    expected = with_segments(case, None)
    monkeypatch.setattr(stack, "Checkpointed", faulty.Checkpointed)
    assert_found(case, expected, fault)


def test_masks_by_a_segments_own_time_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, genuine = Case("lstm", 2, 2, dropout=0.5), dropout.apply
    expected = with_segments(case, None)
    monkeypatch.setattr(
        dropout, "apply", lambda xp, x, p, key, time, row: genuine(xp, x, p, key, time % 4, row)
    )
    assert_found(case, expected, "relative time")
