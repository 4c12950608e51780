"""What is installed and which backends can be used here, and why another cannot."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import cast
from urllib.parse import urlparse
from urllib.request import url2pathname

from . import __version__, optional
from .backend import BackendName, BackendUnavailableError, auto_choice, get_backend
from .kernels.numba import unusable
from .processors import usable

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
            backend = get_backend(cast("BackendName", f"cupy:{device}"))
            found[backend.name] = f"usable: {backend.describe()}"
    chosen, why = auto_choice()
    return {**found, "auto": f"{chosen.name}: {why}"}


def installation() -> dict[str, str]:
    """Which copy of xprnn this is, its kernels compiled for the CPU, and a call's threads."""
    threads = f"{usable()}, the most that a call may use"
    return {"xprnn": _copy(), "kernels": _compiled(), "threads": threads}


def _copy() -> str:
    """Where this copy is, and whether it is the installed one."""
    here = Path(__file__).parent
    try:
        found = distribution("xprnn")
    except PackageNotFoundError:
        return f"{__version__} in {here}, not installed"
    origin = json.loads(found.read_text("direct_url.json") or "{}")  # pip writes it
    editable = origin.get("dir_info", {}).get("editable", False)
    folder = Path(str(found.locate_file("xprnn")))
    if editable:
        folder = Path(url2pathname(urlparse(origin["url"]).path)) / "xprnn"
    kind = "editable install" if editable else "installed"
    if folder.resolve() == here.resolve():
        return f"{__version__} in {here}, {kind}"
    return f"{__version__} in {here}; another copy, {kind}, is in {folder}"


def _compiled() -> str:
    """How many of the kernels for the CPU are compiled, and where Numba keeps them."""
    from .kernels.numba import compilations

    try:
        total = len(compilations())
    except RuntimeError as error:
        return f"none: {error}"
    import numba

    from .kernels.numba import jit

    try:
        folder = Path(numba.njit(cache=True)(jit.number_of).stats.cache_path)
    except RuntimeError as error:  # no folder can be written
        return f"compiled in every process: {error}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    indexes = folder.glob(f"*-{jit._digest()}-*.{python}*.nbi")
    # an index of another Numba, which it begins with, is not used
    current = [path for path in indexes if numba.__version__.encode() in path.read_bytes()[:64]]
    done = sum(1 for index in current for _ in folder.glob(f"{index.stem}.*.nbc"))
    return f"{done} of {total} compiled, in {folder}"
