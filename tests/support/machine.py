"""Description of the machine for reports: GPU, CUDA errors, versions, sources."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xprnn

PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "cupy", "ml_dtypes", "torch")
Description = dict[str, Any]


def describe_device() -> Description | None:
    """The device that backend "cupy" uses, or None."""
    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError:
        return None
    runtime = backend.xp.cuda.runtime
    properties = runtime.getDeviceProperties(backend.device)
    return {
        "name": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_GiB": round(properties["totalGlobalMem"] / 2**30, 1),
        "devices": runtime.getDeviceCount(),
        "driver": driver(),
        "cuda_driver": _cuda_version(runtime.driverGetVersion()),
        "cuda_runtime": _cuda_version(runtime.runtimeGetVersion()),
    }


def context_error(cupy: Any) -> str:
    """The persistent CUDA error of this process, which every further call returns, or "".

    The first synchronisation also returns earlier errors; an error of the second one is persistent.
    """
    runtime = cupy.cuda.runtime
    for _ in range(2):
        try:
            runtime.deviceSynchronize()
        except runtime.CUDARuntimeError as error:
            message = str(error)
        else:
            return ""
    return message


def _cuda_version(number: int) -> str:
    """12090 as "12.9"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver() -> str:
    """The version of NVIDIA's driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def versions() -> dict[str, str]:
    """The versions of Python and of the packages in use."""
    installed = {"python": platform.python_version(), "system": platform.system()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def commit(root: Path) -> str:
    """The commit checked out at `root`, with "+changes" if files differ; "unknown" without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):  # a copy inside another repository
            return "unknown"
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the package's sources, for copies without git."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".h", ".cu"):
            total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
