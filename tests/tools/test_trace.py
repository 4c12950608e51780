"""The Python calls of a recorded call stay few: `benchmarks/trace.py` and its table in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import trace
from tests.support.numba_cases import needs_numba

DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"
DEPTH = 11


def documented() -> dict[str, tuple[int, int]]:
    """Calls before and after of each row of the table."""
    rows = re.findall(r"^\| (.*?) \| (\d+) → (\d+) \|", DOCS.read_text(), re.MULTILINE)
    return {name: (int(before), int(after)) for name, before, after in rows}


def test_every_route_is_documented() -> None:
    passes = ("forward", "backward")
    assert {*documented()} == {f"{route}, {name}" for route in trace.ROUTES for name in passes}


@needs_numba
@pytest.mark.parametrize("route", ["NumPy", "Numba"])
def test_a_call_needs_at_most_half_of_the_calls_that_it_needed(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPRNN_KERNELS", "auto")  # restores the variable that `measure` sets
    backend, kernels, sizes = trace.ROUTES[route]
    for name, counts in zip(
        ("forward", "backward"), trace.measure(backend, kernels, sizes), strict=True
    ):
        before, after = documented()[f"{route}, {name}"]
        assert counts.calls <= before / 2
        assert counts.calls == pytest.approx(after, abs=5)  # versions of Python differ a little
        assert counts.depth <= DEPTH
