"""What is installed and which backends can be used here, and why another cannot."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from .backend import Backend, BackendUnavailableError, get_backend

PACKAGES = ("xprnn", "numpy", "safetensors", "cupy-cuda12x", "cupy-cuda13x", "numba", "torch")


def versions() -> dict[str, str]:
    """The version of Python and of every package that matters, "not installed" where it is not."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def backends() -> dict[str, str]:
    """Each backend and device by name, with what it is or why it cannot be used."""
    found = {"numpy": f"usable: {platform.machine()} {platform.system()}"}
    try:
        first = get_backend("cupy")
    except BackendUnavailableError as error:
        found["cupy"] = f"not usable: {error}"
        return found
    for device in range(first.xp.cuda.runtime.getDeviceCount()):
        found[f"cupy:{device}"] = f"usable: {_describe(first, device)}"
    return found


def _describe(backend: Backend, device: int) -> str:
    facts = backend.xp.cuda.runtime.getDeviceProperties(device)
    name = facts["name"].decode() if isinstance(facts["name"], bytes) else facts["name"]
    memory = facts["totalGlobalMem"] / 2**30
    return f"{name}, compute capability {facts['major']}.{facts['minor']}, {memory:.0f} GiB"
