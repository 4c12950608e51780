"""Run NVIDIA's compute-sanitizer on every kernel, at small and odd sizes.

    python benchmarks/sanitize.py [--out FOLDER]

It checks the fused kernels in every dtype, at sizes around that of a block, and one launch of each
kernel whose blocks wait for each other: sequence kernels, a stepper's step, cluster and wavefront
kernels. The results are written to sanitizer.md in FOLDER, by default
`benchmarks/results/<device>/`, again after each run of a tool. Each tool must first report a fault
injected for it; otherwise it is not used. Exit status: 0 no errors, 1 errors, 2 a tool is missing
or does not work here, with the reason printed. Needs CuPy, ml_dtypes, a GPU and compute-sanitizer,
which is part of the CUDA toolkit and is searched on PATH, in CUDA_HOME, CUDA_PATH and
/usr/local/cuda.
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
LIMIT = 90  # seconds for one run of a tool
INJECTED = r"""
extern "C" __global__ void memcheck(float* out, const float* unset, int n) { out[n] = 1; }
extern "C" __global__ void initcheck(float* out, const float* unset, int n) {
  out[threadIdx.x] = unset[threadIdx.x];
}
extern "C" __global__ void racecheck(float* out, const float* unset, int n) {
  __shared__ volatile float shared;
  shared = threadIdx.x;
  out[threadIdx.x] = shared;
}
extern "C" __global__ void synccheck(float* out, const float* unset, int n) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}
"""
TOOLS = {  # the launches that each tool checks, frozen kernels last
    "memcheck": ("kernels", "waiting", "frozen"),
    "synccheck": ("waiting", "frozen"),
    "initcheck": ("kernels",),
    "racecheck": ("kernels",),
}
LAUNCHES = ("kernels", "waiting", "frozen")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    options = _options()
    if options.launch:
        launch(options.launch)
        return 0
    tool = find_tool()
    if tool is None:
        return _fail("compute-sanitizer is not installed; it is part of the CUDA toolkit")
    rows: list[str] = []
    status = 0
    for name, launches in TOOLS.items():
        done = run(tool, name, name)
        if not error_count(done):
            failure = _fail(f"{name} did not report the fault injected for it:\n{_tail(done)}")
            status = status or failure
            rows.append(f"| {name} | injected fault | not reported, results not used |")
            write(rows, options.out)
            continue
        for what in launches:
            done = run(tool, name, what)
            rows.append(f"| {name} | {what} | {summary(done)} |")
            print(rows[-1], flush=True)
            if done.returncode or error_count(done) != 0:
                status = 1
                print(_tail(done), flush=True)
            write(rows, options.out)
    return status


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--launch", choices=(*LAUNCHES, *TOOLS), help=argparse.SUPPRESS)
    return parser.parse_args()


def _fail(reason: str) -> int:
    print(f"sanitize: {reason}", file=sys.stderr)
    return 2


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join((done.stdout + done.stderr).splitlines()[-40:])


def find_tool() -> str | None:
    """The path of compute-sanitizer, or None."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{kit}/bin" for kit in toolkits if kit)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(tool: str, name: str, what: str) -> subprocess.CompletedProcess[str]:
    """Launch `what` in a new process under one of the tools."""
    options = ["--tool", name, "--print-limit", "5"]
    if name == "memcheck":
        options += ["--report-api-errors", "no"]  # CuPy's feature queries may fail
    command = [tool, *options, sys.executable, __file__, "--launch", what]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, text, f"ended after {LIMIT} s")


def summary(done: subprocess.CompletedProcess[str]) -> str:
    """The tool's summary line, or a note that there is none."""
    lines = [match[0] for match in SUMMARY.finditer(done.stdout)]
    return lines[-1] if lines else f"no summary, exit status {done.returncode}"


def error_count(done: subprocess.CompletedProcess[str]) -> int | None:
    """The number of errors that the tool reported; None without a summary."""
    counts = SUMMARY.findall(done.stdout)
    return int(counts[-1]) if counts else None


def write(rows: list[str], folder: Path | None) -> None:
    """Write the table, with a description of device and versions."""
    from tests.support.gpu_report import RESULTS, slug
    from tests.support.machine import commit, describe_device, digest, versions
    from xprnn.kernels.cuda import pointwise

    device = describe_device()
    if device is None:
        raise RuntimeError("the device on which the tools ran is no longer available")
    from benchmarks.device.kinds import FROZEN, WAYS, kinds

    plain = [way for way in WAYS if way not in FROZEN]
    kernels = f"{len(pointwise.KERNELS)} kernels, {len(TYPES)} dtypes, {len(SIZES)} sizes"
    waiting, frozen = (f"{len(kinds(ways))}: {', '.join(ways)}" for ways in (plain, FROZEN))
    lines = [
        f"# compute-sanitizer on {device['name']}, {datetime.now(UTC).date().isoformat()}",
        "",
        f"- kernels: {kernels}; waiting for other blocks: {waiting}; frozen: {frozen}",
        "- each tool must first report the fault injected for it",
        f"- Commit {commit(ROOT)}; sha256 of the sources {digest(ROOT / 'xprnn')[:16]}",
        "- " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items()),
        "- " + ", ".join(f"{name} {value}" for name, value in versions().items()),
        "",
        "| tool | launched | result |",
        "|---|---|---|",
        *rows,
    ]
    target = folder or RESULTS / slug(device["name"])
    target.mkdir(parents=True, exist_ok=True)
    (target / "sanitizer.md").write_text("\n".join(lines) + "\n", "utf-8")


# -- launches


def launch(what: str) -> None:
    """Launch one of `LAUNCHES`, or the kernel with a tool's injected fault.

    Each array is allocated separately, so that out-of-bounds accesses do not hit another array.
    """
    import numpy as np

    import xprnn
    from benchmarks.device.kinds import FROZEN, WAYS, kinds

    backend = xprnn.get_backend("cupy")
    cupy = backend.xp
    cupy.cuda.set_allocator(None)
    if what == "kernels":
        launch_pointwise(cupy)
    elif what in LAUNCHES:
        for kind in kinds([way for way in WAYS if (way in FROZEN) == (what == "frozen")]):
            kind.launch(backend)
            backend.synchronize()  # raises if a block timed out
            print(f"launched {kind}", flush=True)
    else:
        arrays = cupy.empty(64, "float32"), cupy.empty(64, "float32")
        cupy.RawKernel(INJECTED, what)((1,), (64,), (*arrays, np.int32(64)))
    cupy.cuda.Device().synchronize()


def launch_pointwise(cupy: Any) -> None:
    """Launch every fused kernel in every dtype and size."""
    from xprnn.kernels.cuda import pointwise

    for kernel, dtype, (N, H) in itertools.product(pointwise.KERNELS, TYPES, SIZES):
        buffers = (*kernel.inputs, *kernel.outputs)
        arrays = [allocate(cupy, kernel, buffer, dtype, N, H) for buffer in buffers]
        pointwise.launch(cupy, kernel.name, (N, H), *arrays)


def allocate(cupy: Any, kernel: Any, buffer: Any, dtype: str, N: int, H: int) -> Any:
    """An array as the kernel expects it, with values unless the kernel only writes it."""
    import numpy as np

    from xprnn.cells import CELLS
    from xprnn.core.precision import LOW_PRECISION, check_precision_policy

    A = "float32" if dtype in LOW_PRECISION else dtype
    kind = check_precision_policy(A, dtype, "ieee").compute_dtype if buffer.type == "C" else A
    widths = {"gh_rz": 2} | dict.fromkeys(("gates", "gh", "bias_hh"), CELLS[kernel.cell].gates)
    width = widths.get(buffer.name, 1) * H
    shape = (width,) if buffer.name == "bias_hh" else (N, width)
    if buffer.use == "out":
        return cupy.empty(shape, kind)
    values = np.random.default_rng([N, H]).uniform(0.1, 0.9, shape)
    return cupy.asarray(values.astype(kind))


if __name__ == "__main__":
    sys.exit(main())
