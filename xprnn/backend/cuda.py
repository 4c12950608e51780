"""The import of CuPy and its checks, or the reason why it cannot be used."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import optional
from .base import BackendUnavailableError

MINIMUM_VERSION = (14, 2)  # older ones recompile kernels with template arguments in each process


def load() -> tuple[Any, str]:
    """The module `cupy` and a message for the user, possibly empty; raises if it is unusable."""
    try:
        advice = _make_cache()
        cupy = optional.load("cupy")
    except OSError as error:  # for example no folder for temporary files
        raise _unavailable(f"CuPy fails to import: {_import_failure(error)}") from error
    except optional.OptionalPackageError as failure:
        cause = failure.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == "cupy":
            if sys.platform == "darwin":
                raise _unavailable("CuPy has no build for macOS; use backend 'numpy'") from cause
            raise _unavailable(
                "CuPy is not installed; for CUDA 12 pip install 'xprnn[cuda12]', "
                "for CUDA 13 pip install 'xprnn[cuda13]'"
            ) from cause
        raise _unavailable(f"CuPy fails to import: {_import_failure(cause)}") from cause
    _check_build(cupy)
    return cupy, advice


def _check_build(cupy: Any) -> None:
    """Raise unless this CuPy is built for CUDA and recent enough."""
    if cupy.cuda.runtime.is_hip:
        raise _unavailable(
            f"CuPy {cupy.__version__} is built for ROCm, and the kernels are PTX, which only "
            "NVIDIA's CUDA runs; use backend 'numpy', or CuPy for CUDA on an NVIDIA GPU"
        )
    numbers = re.match(r"(\d+)\.(\d+)", cupy.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < MINIMUM_VERSION:
        minimum = ".".join(map(str, MINIMUM_VERSION))
        packages = " and ".join(_packages()) or "cupy"
        raise _unavailable(
            f"CuPy {cupy.__version__} is installed, expected {minimum} or later: earlier ones "
            f"compile kernels again in every process; pip install --upgrade {packages}"
        )


def check_devices(cupy: Any, device: int) -> None:
    """Raise unless CuPy finds CUDA device `device`."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        reason = _no_device_reason(cupy, error)
        raise _unavailable(f"CuPy {cupy.__version__} {reason}{_conflict()}") from error
    if device >= count:
        raise BackendUnavailableError(
            f"backend 'cupy:{device}': there is no such device; this machine has {count}"
        )


def check_libraries(cupy: Any) -> None:
    """Raise unless CuPy finds the CUDA libraries that every layer needs; it loads them lazily."""
    try:
        cupy.cuda.cublas  # noqa: B018 - loaded by this access
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        packages = _packages() or ["cupy"]
        raise _unavailable(
            f"CuPy {cupy.__version__} does not find the libraries of CUDA {_cuda_version(cupy)} "
            f"({_first_line(error)}); pip install '{packages[0]}[ctk]', or set CUDA_PATH to a "
            f"CUDA toolkit{_conflict()}"
        ) from error


def _make_cache() -> str:
    """Make CuPy cache kernels in memory if its cache folder is not writable.

    To be called before CuPy is imported, as the import fails without a folder.

    :return: a message for the user; empty if the folder is writable.
    """
    import tempfile  # slow to import

    if sys.modules.get("cupy") is None and find_spec("cupy") is None:
        return ""
    default = os.path.expanduser("~/.cupy/kernel_cache")  # noqa: PTH111 - as CuPy
    folder = os.environ.get("CUPY_CACHE_DIR", default)
    try:
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - as CuPy, for which "" is an error
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        cause = error.strerror
    if not Path(folder or "?").is_dir():  # the import requires an existing one
        os.environ["CUPY_CACHE_DIR"] = tempfile.gettempdir()
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return ""
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    return (
        f"CuPy cannot keep compiled kernels in {folder!r} ({cause}): they are compiled anew in "
        "every process; set CUPY_CACHE_DIR to a folder that can be written"
    )


def _unavailable(cause: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"backend 'cupy': {cause}")


def _no_device_reason(cupy: Any, error: RuntimeError) -> str:
    """Why there are no devices: text to follow CuPy's name and version."""
    code = str(error).partition(":")[0]
    cuda, driver = _cuda_version(cupy), _version(cupy.cuda.runtime.driverGetVersion())
    if code == "cudaErrorInsufficientDriver" and not driver:
        return f"finds no NVIDIA driver ({code})"
    if code == "cudaErrorInsufficientDriver":
        return (
            f"is built for CUDA {cuda}, the driver for CUDA {driver}; update the driver or "
            f"install CuPy for CUDA {driver.partition('.')[0]} ({code})"
        )
    if code == "cudaErrorNoDevice":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"and the driver find no GPU{hidden} ({code})"
    return f"for CUDA {cuda} with a driver for {driver or 'none'} finds no GPU: {error}"


def _import_failure(error: BaseException | None) -> str:
    """The error of the import of CuPy, and its remedy."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error}; set CUPY_CACHE_DIR to a folder that can be written"
    return f"{_first_line(error)}{_conflict()}"


def _conflict() -> str:
    """Advice if several packages provide CuPy, else ""."""
    packages = _packages()
    if len(packages) < 2:
        return ""
    return f"; {' and '.join(packages)} are both installed: uninstall all of them, install one"


@cache
def _packages() -> list[str]:
    """The installed packages that provide a module `cupy`; reads the metadata of all packages."""
    from importlib.metadata import packages_distributions  # slow to import, rarely needed

    return sorted(set(packages_distributions().get("cupy", ())))


def _cuda_version(cupy: Any) -> str:
    return _version(cupy.cuda.runtime.runtimeGetVersion())


def _version(number: int) -> str:
    """CUDA's version number, 12090, as text, 12.9; "" for none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _first_line(error: BaseException | None) -> str:
    """The first line of an error's message, without the banner that CuPy adds."""
    text = str(error).rpartition("Original error:")[2].strip("=- \n")
    return text.partition("\n")[0].strip() or type(error).__name__
