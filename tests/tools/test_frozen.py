"""Frozen tests run only if `-m` names them: those of wavefront and cluster kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATED = "wavefront wavefront_layers wavefront_plans bidirectional clusters emulator_clusters"
FILES = (
    *(f"kernels/cuda/emulated/test_{name}.py" for name in EMULATED.split()),
    "gpu/test_sequence.py",
)
COLLECT = (sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")


def collected(*options: str) -> set[str]:
    """The functions that pytest would run of these files."""
    done = subprocess.run(
        [*COLLECT, *options, *[f"tests/{name}" for name in FILES]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = [line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line]
    return {line.rpartition("/")[2] for line in lines}


WAVE = "test_wavefront.py::test_the_maximum_number_of_layers"
CLUSTER = "test_bidirectional.py::test_both_directions_in_clusters"
ON_A_GPU = "test_sequence.py::test_wavefronts_in_a_row"
BOTH_WAYS = "test_sequence.py::test_both_directions_in_a_row"
UNSUPPORTED = "test_wavefront_layers.py::test_unsupported_stacks_are_refused_with_the_reason"
CASES = {  # -m, what of it runs, and what does not
    "": ({UNSUPPORTED}, {WAVE, CLUSTER, ON_A_GPU}),
    "not fast": ({UNSUPPORTED}, {WAVE, CLUSTER, ON_A_GPU}),
    "gpu": ({BOTH_WAYS}, {WAVE, CLUSTER, ON_A_GPU, UNSUPPORTED}),
    "frozen": ({WAVE, CLUSTER}, {BOTH_WAYS, UNSUPPORTED}),
    "gpu and frozen": ({ON_A_GPU}, {WAVE, CLUSTER, BOTH_WAYS, UNSUPPORTED}),
}


@pytest.mark.parametrize("expression", CASES)
def test_frozen_tests_run_where_they_are_named(expression: str) -> None:
    runs, others = CASES[expression]
    selected = collected(*["-m", expression] * bool(expression))
    assert runs <= selected and not others & selected
