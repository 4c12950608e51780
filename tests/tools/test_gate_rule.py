"""The rule by which `benchmarks/gate.py` calls a benchmark slower, on numbers near its limits."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gate.py"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gate", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rounds(gate: ModuleType, ratios: Sequence[float]) -> list[object]:
    return [gate.Round(2.0, 2.0 * ratio) for ratio in ratios]


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([1.09] * 9, False),
        ([1.11] * 9, True),
        ([1.11] * 5 + [1.05] * 4, True),
        ([1.11] * 4 + [1.05] * 5, False),  # the median is what counts,
        ([1.5] * 2 + [1.0] * 3 + [0.5], False),  # not how far a few of them are off
        ([1.4] * 6 + [0.99] * 3, False),  # too many rounds are not slower
        ([1.4] * 7 + [0.99] * 2, True),
        ([0.5] * 9, False),
    ],
)
def test_one_measurement(gate: ModuleType, ratios: list[float], slower: bool) -> None:
    assert gate.is_slower(rounds(gate, ratios)) is slower


@pytest.mark.parametrize(
    ("measured", "verdict", "pairs"),
    [
        ([1.09], "ok", [9]),
        ([1.11, 1.09], "ok, measured again", [9, 18]),
        ([1.11, 1.11], "SLOWER", [9, 18]),
    ],
)
def test_two_measurements(
    gate: ModuleType, measured: list[float], verdict: str, pairs: list[int]
) -> None:
    counts: list[int] = []

    def measure(count: int) -> list[object]:
        counts.append(count)
        return rounds(gate, [measured[len(counts) - 1]] * count)

    results, decision = gate.decide(measure, 9)
    assert decision == verdict and counts == pairs and len(results) == pairs[-1]
