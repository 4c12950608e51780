"""`import xprnn` is quick and imports NumPy but nothing heavier."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT = 0.15  # seconds of processor time beyond NumPy's own import
HEAVY = {"torch", "cupy", "numba", "scipy", "matplotlib", "rich", "safetensors", "pytest"}

TIMED = """
import json, sys, time
import numpy
start = time.process_time()
import xprnn
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def test_import_is_quick_and_light(tmp_path: Path) -> None:
    seconds, modules = [], set[str]()
    for _ in range(7):  # the first one may have to compile
        command = [sys.executable, "-c", TIMED]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        elapsed, names = json.loads(done.stdout)
        seconds.append(elapsed)
        modules |= set(names)
    assert "xprnn" in modules
    assert not modules & HEAVY
    assert statistics.median(seconds) < LIMIT, seconds


def test_a_layer_runs_and_learns_without_anything_heavier(tmp_path: Path) -> None:
    """With the plain code: the CPU's kernels import Numba where it is installed."""
    code = (
        "import sys, numpy as np, xprnn\n"
        "gru = xprnn.GRU(3, 4, 2, dropout=0.5, bidirectional=True, seed=0).train()\n"
        "output, h_n = gru(np.ones((5, 2, 3), 'f'), lengths=[5, 2])\n"
        "gru.backward(output, h_n)\n"
        "gru.eval().to(dtype='float64').explain((5, 2, 3))\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", code]
    plain = {**os.environ, "XPRNN_KERNELS": "reference"}
    done = subprocess.run(
        command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & HEAVY
