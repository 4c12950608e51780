"""Start-up time: a new process imports a library and computes its first GRU result."""

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
XPRNN_CODE = """
import numpy as np, xprnn
gru = xprnn.GRU(64, 64, seed=0)
output, h_n = gru(np.ones((128, 8, 64), np.float32))
"""
CODE = {
    "numpy": XPRNN_CODE,
    "numba": XPRNN_CODE,
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
# peak KiB of this process alone: getrusage starts from the peak of the parent process
PEAK = """
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
MODEL = """
import sys, pathlib, xprnn
from xprnn.tools.bench.onnx import model
gru = xprnn.GRU(64, 64, backend="numpy", seed=0)
pathlib.Path(sys.argv[1]).write_bytes(model("gru", gru.parameters, (128, 8, 64)))
"""


def first_results(implementations: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Each implementation's seconds, in interleaved rounds, and the peak MiB of its process."""
    names = [name for name in CODE if name in implementations]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "gru.onnx")
        _run(MODEL, path, "numpy")
        for done in range(rounds + 1):
            for name in names:
                taken, peak = _run(CODE[name], path, name)
                if done:  # the first round fills the caches of files, bytecode and Numba
                    seconds[name].append(round(taken, 4))
                    peaks[name].append(peak)
    return {s: {"seconds": seconds[s], "MiB": round(statistics.median(peaks[s]))} for s in names}


def _run(code: str, path: str, implementation: str) -> tuple[float, float]:
    """The seconds and the peak MiB of a process."""
    command = [sys.executable, "-c", code + PEAK, path]
    variables = environment(implementation, all_threads())
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"the first result of {implementation}: status {done.returncode}")
    return taken, int(done.stdout) / 2**10


def installed_sizes(implementations: Sequence[str]) -> dict[str, int]:
    """The installed MiB of each library and its dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = project["dependencies"]
    with_numba = [*needs, *project["optional-dependencies"]["numba"]]
    requirements = {"numpy": needs, "numba": with_numba, "torch": ["torch"]}
    requirements["onnxruntime"] = ["onnxruntime"]
    own = sum(p.stat().st_size for p in (ROOT / "xprnn").rglob("*") if "__pycache__" not in p.parts)
    sizes = {
        name: _size(needed) for name, needed in requirements.items() if name in implementations
    }
    return {s: round((size + own * (s in ("numpy", "numba"))) / 2**20) for s, size in sizes.items()}


def _size(requirements: Iterable[str]) -> int:
    """Bytes of the installed distributions that these requirements resolve to."""
    waiting, seen, total = [*requirements], set[str](), 0
    while waiting:
        requirement = waiting.pop()
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()
        if name in seen or re.search(r";.*\bextra\b", requirement):
            continue
        seen.add(name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # a dependency on other systems
        waiting += installed.requires or []
        files = [file for file in installed.files or [] if file.suffix != ".pyc"]
        paths = [Path(str(file.locate())) for file in files]
        total += sum(path.stat().st_size for path in paths if path.is_file())
    return total
