"""CuPy and the GPUs that it can use, or the reason why there are none."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import optional
from .base import BackendUnavailableError

OLDEST = (14, 2)  # before it, every process compiles kernels that have template arguments anew


def load() -> tuple[Any, str]:
    """The module `cupy`, and what its user has to be told; raises if it cannot be used."""
    try:
        advice = _make_cache()
        cupy = optional.load("cupy")
    except OSError as error:  # there is no folder for temporary files, say
        raise _refusal(f"CuPy fails to import: {_reason(error)}") from error
    except optional.OptionalPackageError as failure:
        cause = failure.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name == "cupy":
            raise _refusal(
                "CuPy is not installed; for CUDA 12 pip install 'xprnn[cuda12]', "
                "for CUDA 13 pip install 'xprnn[cuda13]'"
            ) from cause
        raise _refusal(f"CuPy fails to import: {_reason(cause)}") from cause
    _check_build(cupy)
    return cupy, advice


def _check_build(cupy: Any) -> None:
    """Raise unless this CuPy is for CUDA, and not too old."""
    if cupy.cuda.runtime.is_hip:
        raise _refusal(
            f"CuPy {cupy.__version__} is built for ROCm, and the kernels are PTX, which only "
            "NVIDIA's CUDA runs; use backend 'numpy', or CuPy for CUDA on an NVIDIA GPU"
        )
    numbers = re.match(r"(\d+)\.(\d+)", cupy.__version__)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        packages = " and ".join(_packages()) or "cupy"
        raise _refusal(
            f"CuPy {cupy.__version__} is installed, expected {oldest} or later: earlier ones "
            f"compile kernels anew in every process; pip install --upgrade {packages}"
        )


def check_devices(cupy: Any, device: int) -> None:
    """Raise unless CuPy finds CUDA device `device`."""
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except RuntimeError as error:
        raise _refusal(f"CuPy {cupy.__version__} {_cause(cupy, error)}{_clash()}") from error
    if device >= count:
        raise BackendUnavailableError(
            f"backend 'cupy:{device}': there is no such device; this machine has {count}"
        )


def check_libraries(cupy: Any) -> None:
    """Raise unless CuPy finds the libraries of CUDA that every layer needs; it loads them late."""
    try:
        cupy.cuda.cublas  # noqa: B018 - looked for when it is named
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        packages = _packages() or ["cupy"]
        raise _refusal(
            f"CuPy {cupy.__version__} does not find the libraries of CUDA {_built(cupy)} "
            f"({_first_line(error)}); pip install '{packages[0]}[ctk]', or set CUDA_PATH to a "
            f"CUDA toolkit{_clash()}"
        ) from error


def _make_cache() -> str:
    """Let CuPy compile though the folder where it keeps kernels cannot be written.

    Then it keeps them in memory. To be called before CuPy is imported, which fails without a
    folder.

    :return: what to tell the user; empty if the folder can be written.
    """
    import tempfile  # slow to import

    if sys.modules.get("cupy") is None and find_spec("cupy") is None:
        return ""
    home = os.path.expanduser("~/.cupy/kernel_cache")  # noqa: PTH111 - as CuPy
    folder = os.environ.get("CUPY_CACHE_DIR", home)
    try:
        os.makedirs(folder, exist_ok=True)  # noqa: PTH103 - as CuPy, which refuses ""
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        cause = error.strerror
    if not Path(folder or "?").is_dir():  # its import wants one that is there
        os.environ["CUPY_CACHE_DIR"] = tempfile.gettempdir()
    if os.environ.get("CUPY_CACHE_IN_MEMORY") == "1":
        return ""
    os.environ["CUPY_CACHE_IN_MEMORY"] = "1"
    return (
        f"CuPy cannot keep compiled kernels in {folder!r} ({cause}): they are compiled anew in "
        "every process; set CUPY_CACHE_DIR to a folder that can be written"
    )


def _refusal(cause: str) -> BackendUnavailableError:
    return BackendUnavailableError(f"backend 'cupy': {cause}")


def _cause(cupy: Any, error: RuntimeError) -> str:
    """Why there are no devices, in words that follow CuPy's name and version."""
    code = str(error).partition(":")[0]
    driver = _version(cupy.cuda.runtime.driverGetVersion())
    if code == "cudaErrorInsufficientDriver" and not driver:
        return f"finds no NVIDIA driver ({code})"
    if code == "cudaErrorInsufficientDriver":
        return (
            f"is built for CUDA {_built(cupy)}, the driver for CUDA {driver}; update the driver or "
            f"install CuPy for CUDA {driver.partition('.')[0]} ({code})"
        )
    if code == "cudaErrorNoDevice":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"and the driver find no GPU{hidden} ({code})"
    return f"for CUDA {_built(cupy)} with a driver for {driver or 'none'} finds no GPU: {error}"


def _reason(error: BaseException | None) -> str:
    """What the import of CuPy ended with, and what can be done about it."""
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error}; set CUPY_CACHE_DIR to a folder that can be written"
    return f"{_first_line(error)}{_clash()}"


def _clash() -> str:
    packages = _packages()
    if len(packages) < 2:
        return ""
    return f"; {' and '.join(packages)} are both installed: uninstall all of them, install one"


@cache
def _packages() -> list[str]:
    """The installed packages that bring a module `cupy`; it reads all that are installed."""
    from importlib.metadata import packages_distributions  # slow to import, and seldom needed

    return sorted(set(packages_distributions().get("cupy", ())))


def _built(cupy: Any) -> str:
    return _version(cupy.cuda.runtime.runtimeGetVersion())


def _version(number: int) -> str:
    """A version as CUDA gives it, 12090, as people write it, 12.9; "" for none."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _first_line(error: BaseException | None) -> str:
    """What an error says, without the banner that CuPy puts around it."""
    text = str(error).rpartition("Original error:")[2].strip("=- \n")
    return text.partition("\n")[0].strip() or type(error).__name__
