"""What is installed and which backends can be used here, and why another cannot."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from . import optional
from .backend import BackendUnavailableError, auto_choice, get_backend
from .kernels.numba import unusable

CUPY = ("cupy-cuda12x", "cupy-cuda13x")
PACKAGES = ("xprnn", "numpy", "safetensors", *CUPY, "ml_dtypes", "numba", "torch")


def versions() -> dict[str, str]:
    """The version of Python and of every package that matters, "not installed" where it is not."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def extras() -> dict[str, str]:
    """What optional packages are for, each by name, or why it cannot be used."""
    try:
        optional.load("ml_dtypes")
        narrow = ""
    except optional.OptionalPackageError as error:
        narrow = str(error)
    uses = {"numba": ("compiled kernels on a CPU", unusable()), "ml_dtypes": ("bfloat16", narrow)}
    return {
        name: f"not usable: {why}" if why else f"usable: {what}"
        for name, (what, why) in uses.items()
    }


def backends() -> dict[str, str]:
    """Each backend and device by name, with what it is or why it cannot be used, and "auto"."""
    found = {"numpy": f"usable: {get_backend('numpy').describe()}"}
    try:
        first = get_backend("cupy")
    except BackendUnavailableError as error:
        found["cupy"] = f"not usable: {error}"
    else:
        for device in range(first.xp.cuda.runtime.getDeviceCount()):
            backend = get_backend(f"cupy:{device}")
            found[backend.name] = f"usable: {backend.describe()}"
    chosen, why = auto_choice()
    return {**found, "auto": f"{chosen.name}: {why}"}
