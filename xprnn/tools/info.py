"""Installed packages and usable backends, with reasons for those that are not usable."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import cast
from urllib.parse import urlparse
from urllib.request import url2pathname

from .. import __version__
from ..backend import BackendName, BackendUnavailableError, auto_choice, get_backend, optional
from ..backend.processors import usable
from ..kernels.numba.package import unusable

CUPY = ("cupy-cuda12x", "cupy-cuda13x")
PACKAGES = ("xprnn", "numpy", "safetensors", *CUPY, "ml_dtypes", "numba", "torch")


def versions() -> dict[str, str]:
    """The versions of Python and of the relevant packages, or "not installed"."""
    texts = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            texts[package] = version(package)
        except PackageNotFoundError:
            texts[package] = "not installed"
    return texts


def extras() -> dict[str, str]:
    """The purpose of each optional package, or why it is not usable."""
    try:
        optional.load("ml_dtypes")
        without_bfloat16 = ""
    except optional.OptionalPackageError as error:
        without_bfloat16 = str(error)
    uses = {
        "numba": ("compiled kernels on a CPU", unusable()),
        "ml_dtypes": ("bfloat16", without_bfloat16),
    }
    return {
        name: f"not usable: {reason}" if reason else f"usable: {purpose}"
        for name, (purpose, reason) in uses.items()
    }


def backends() -> dict[str, str]:
    """Each backend and device by name with its description or why it is not usable, and "auto"."""
    texts = {"numpy": f"usable: {get_backend('numpy').describe()}"}
    try:
        first = get_backend("cupy")
    except BackendUnavailableError as error:
        texts["cupy"] = f"not usable: {error}"
    else:
        for device in range(first.xp.cuda.runtime.getDeviceCount()):
            backend = get_backend(cast("BackendName", f"cupy:{device}"))
            texts[backend.name] = f"usable: {backend.describe()}"
    chosen, reason = auto_choice()
    return {**texts, "auto": f"{chosen.name}: {reason}"}


def installation() -> dict[str, str]:
    """This copy of xprnn, its compiled CPU kernels, and the number of threads of a call."""
    return {"xprnn": _copy(), "kernels": _compiled(), "threads": f"{usable()} per call at most"}


def _copy() -> str:
    """The folder of this copy, and whether it is the installed one."""
    this = Path(__file__).parents[1]
    try:
        installed = distribution("xprnn")
    except PackageNotFoundError:
        return f"{__version__} in {this}, not installed"
    origin = json.loads(installed.read_text("direct_url.json") or "{}")  # written by pip
    editable = origin.get("dir_info", {}).get("editable", False)
    folder = Path(str(installed.locate_file("xprnn")))
    if editable:
        folder = Path(url2pathname(urlparse(origin["url"]).path)) / "xprnn"
    kind = "editable install" if editable else "installed"
    if folder.resolve() == this.resolve():
        return f"{__version__} in {this}, {kind}"
    return f"{__version__} in {this}; another copy, {kind}, is in {folder}"


def _compiled() -> str:
    """The number of compiled CPU kernels, and the folder of Numba's cache."""
    from ..kernels.numba.package import compilations

    try:
        total = len(compilations())
    except RuntimeError as error:
        return f"none: {error}"
    import numba

    from ..kernels.numba import jit

    try:
        folder = Path(numba.njit(cache=True)(jit.number_of).stats.cache_path)
    except RuntimeError as error:  # no writable folder
        return f"compiled in every process: {error}"
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    indexes = folder.glob(f"*-{jit._digest()}-*.{python}*.nbi")
    # an index starts with Numba's version; those of other versions are not used
    current = [path for path in indexes if numba.__version__.encode() in path.read_bytes()[:64]]
    done = sum(1 for index in current for _ in folder.glob(f"{index.stem}.*.nbc"))
    return f"{done} of {total} compiled, in {folder}"
