"""What a user waits for first: a process that imports a library and has a first GRU result."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from .problems import all_threads, environment

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "T=128 N=8 I=64 H=64"
OURS = """
import numpy as np, xprnn
gru = xprnn.GRU(64, 64, seed=0)
output, h_n = gru(np.ones((128, 8, 64), np.float32))
"""
CODE = {
    "numpy": OURS,
    "numba": OURS,
    "torch": """
import torch
with torch.inference_mode():
    output, h_n = torch.nn.GRU(64, 64)(torch.ones(128, 8, 64))
""",
    "onnxruntime": """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(output,) = session.run(["y"], {"x": np.ones((128, 8, 64), np.float32)})
""",
}
# the KiB of this process alone: what getrusage gives begins with those of the one that started it
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
MODEL = """
import sys, pathlib, xprnn
from xprnn.bench.onnx import model
gru = xprnn.GRU(64, 64, backend="numpy", seed=0)
pathlib.Path(sys.argv[1]).write_bytes(model("gru", gru.parameters, (128, 8, 64)))
"""


def first_results(sides: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Of each side's process the seconds, those of a round in turns, and the most MiB it held."""
    sides = [side for side in CODE if side in sides]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    peaks: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "gru.onnx")
        _run(MODEL, path, "numpy")
        for done in range(rounds + 1):
            for side in sides:
                taken, peak = _run(CODE[side], path, side)
                if done:  # the first round fills the caches: files, bytecode, Numba's
                    seconds[side].append(round(taken, 4))
                    peaks[side].append(peak)
    return {s: {"seconds": seconds[s], "MiB": round(statistics.median(peaks[s]))} for s in sides}


def _run(code: str, path: str, side: str) -> tuple[float, float]:
    """Seconds and MiB of a process."""
    command = [sys.executable, "-c", code + PEAK, path]
    held = environment(side, all_threads())
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=held, stdout=subprocess.PIPE, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the first result of {side}: status {done.returncode}")
    return taken, int(done.stdout) / 2**10


def installed_sizes(sides: Sequence[str]) -> dict[str, int]:
    """MiB of files of each library and all that it needs, as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = project["dependencies"]
    with_numba = [*needs, *project["optional-dependencies"]["numba"]]
    wanted = {"numpy": needs, "numba": with_numba, "torch": ["torch"]}
    wanted["onnxruntime"] = ["onnxruntime"]
    own = sum(p.stat().st_size for p in (ROOT / "xprnn").rglob("*") if "__pycache__" not in p.parts)
    found = {side: _size(wanted[side]) for side in wanted if side in sides}
    return {s: round((size + own * (s in ("numpy", "numba"))) / 2**20) for s, size in found.items()}


def _size(requirements: Iterable[str]) -> int:
    """Bytes of the distributions that these requirements lead to; what is not there needs none."""
    waiting, seen, total = [*requirements], set[str](), 0
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if name in seen or re.search(r";.*\bextra\b", requirement):
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # for another system
        waiting += found.requires or []
        paths = [Path(str(file.locate())) for file in found.files or [] if file.suffix != ".pyc"]
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total
