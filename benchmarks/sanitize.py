"""NVIDIA's compute-sanitizer over every fused kernel, in every dtype, at sizes around a block.

    python benchmarks/sanitize.py [--out FOLDER]

Writes what it found to FOLDER, by default `benchmarks/results/<device>/`, as sanitizer.md. Each of
its tools first has to find a fault that is planted for it. Exit status: 0 nothing found, 1
something found, 2 the tools are not there or do not work here; then the reason is printed and
nothing is written. Needs CuPy, ml_dtypes, a GPU and compute-sanitizer, which comes with the CUDA
toolkit and is looked for on PATH, in CUDA_HOME, CUDA_PATH and /usr/local/cuda.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((1, 1), (1, 7), (5, 1), (1, 128), (1, 129), (3, 43), (5, 77))  # N, H; 128 are a block
TYPES = ("float64", "float32", "float16", "bfloat16")
SUMMARY = re.compile(r"SUMMARY: (\d+) .*")
LIMIT = 60  # seconds for one tool
PLANTED = r"""
extern "C" __global__ void memcheck(float* out, const float* unset, int n) { out[n] = 1; }
extern "C" __global__ void initcheck(float* out, const float* unset, int n) {
  out[threadIdx.x] = unset[threadIdx.x];
}
extern "C" __global__ void racecheck(float* out, const float* unset, int n) {
  __shared__ volatile float shared;
  shared = threadIdx.x;
  out[threadIdx.x] = shared;
}
"""
TOOLS = ("memcheck", "initcheck", "racecheck")  # the last for later: these kernels share no memory


def main() -> int:
    # the package, and what tests know of a machine
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    options = _options()
    if options.launch:
        launch(options.launch)
        return 0
    tool = find_tool()
    if tool is None:
        return _refuse("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    rows, status = [], 0
    for name in TOOLS:
        done = run(tool, name, name)
        if not found(done):
            return _refuse(f"{name} does not find the fault planted for it:\n{_tail(done)}")
        done = run(tool, name, "kernels")
        rows.append(f"| {name} | {summary(done)} |")
        print(rows[-1], flush=True)
        if done.returncode or found(done) != 0:
            status = 1
            print(_tail(done))
    write(rows, options.out)
    return status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--launch", choices=("kernels", *TOOLS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _refuse(reason: str) -> int:
    print(f"sanitize: {reason}", file=sys.stderr)
    return 2


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((done.stdout + done.stderr).splitlines()[-40:])


def find_tool() -> str | None:
    """Where compute-sanitizer is, or None."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{kit}/bin" for kit in toolkits if kit)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(tool: str, name: str, what: str) -> subprocess.CompletedProcess[str]:
    """Launch `what` in a process of its own under one of the tools."""
    options = ["--tool", name, "--print-limit", "5"]
    if name == "memcheck":
        options += ["--report-api-errors", "no"]  # CuPy asks what there is, and may hear no
    command = [tool, *options, sys.executable, __file__, "--launch", what]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, text, f"ended after {LIMIT} s")


def summary(done: subprocess.CompletedProcess[str]) -> str:
    """The tool's last line, or that there is none."""
    lines = [match[0] for match in SUMMARY.finditer(done.stdout)]
    return lines[-1] if lines else f"no summary, exit status {done.returncode}"


def found(done: subprocess.CompletedProcess[str]) -> int | None:
    """How many errors the tool found; None if it does not say."""
    numbers = SUMMARY.findall(done.stdout)
    return int(numbers[-1]) if numbers else None


def write(rows: list[str], folder: Path | None) -> None:
    """Write the table, with what it was found on."""
    from gpu_report import RESULTS, slug
    from machine import commit, describe_device, digest, versions

    from xprnn.kernels.cuda import pointwise

    device = describe_device()
    if device is None:
        raise RuntimeError("the tools ran on a device that is not there any more")
    kernels = f"{len(pointwise.KERNELS)} kernels, {len(TYPES)} dtypes, {len(SIZES)} sizes"
    lines = [
        f"# compute-sanitizer on {device['name']}, {datetime.now(UTC).date().isoformat()}",
        "",
        f"- {kernels}; each tool found the fault planted for it",
        f"- Commit {commit(ROOT)}; sha256 of the sources {digest(ROOT / 'xprnn')[:16]}",
        "- " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items()),
        "- " + ", ".join(f"{name} {value}" for name, value in versions().items()),
        "",
        "| tool | found |",
        "|---|---|",
        *rows,
    ]
    target = folder or RESULTS / slug(device["name"])
    target.mkdir(parents=True, exist_ok=True)
    (target / "sanitizer.md").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"written: sanitizer.md, {kernels}")


# -- what is looked at


def launch(what: str) -> None:
    """Launch every kernel in every dtype and size, or the kernel with a tool's fault.

    Each array has memory of its own: what stands next to it is nobody's.
    """
    import numpy as np

    import xprnn
    from xprnn.kernels.cuda import pointwise

    cupy = xprnn.get_backend("cupy").xp
    cupy.cuda.set_allocator(None)
    if what == "kernels":
        for kernel, dtype, (N, H) in itertools.product(pointwise.KERNELS, TYPES, SIZES):
            buffers = (*kernel.inputs, *kernel.outputs)
            arrays = [allocate(cupy, kernel, buffer, dtype, N, H) for buffer in buffers]
            pointwise.launch(cupy, kernel.name, (N, H), *arrays)
    else:
        arrays = cupy.empty(64, "float32"), cupy.empty(64, "float32")
        cupy.RawKernel(PLANTED, what)((1,), (64,), (*arrays, np.int32(64)))
    cupy.cuda.Device().synchronize()


def allocate(cupy: Any, kernel: Any, buffer: Any, dtype: str, N: int, H: int) -> Any:
    """An array as the kernel expects it, numbers in it unless it only writes them."""
    import numpy as np

    from xprnn.arithmetic import NARROW, check_arithmetic
    from xprnn.cells import CELLS

    A = "float32" if dtype in NARROW else dtype
    kind = check_arithmetic(A, dtype, "ieee").compute_dtype if buffer.type == "T" else A
    widths = {"gh_rz": 2} | dict.fromkeys(("gates", "gh", "bias_hh"), CELLS[kernel.cell].gates)
    width = widths.get(buffer.name, 1) * H
    shape = (width,) if buffer.name == "bias_hh" else (N, width)
    if buffer.use == "=":
        return cupy.empty(shape, kind)
    numbers = np.random.default_rng([N, H]).uniform(0.1, 0.9, shape)
    return cupy.asarray(numbers.astype(kind))


if __name__ == "__main__":
    sys.exit(main())
