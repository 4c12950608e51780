"""The real CuPy in environments where it cannot work, each in a new process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
needs_cupy = pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
pytestmark = needs_cupy

PROGRAM = """
import logging, os, sys
logging.basicConfig(format="%(levelname)s %(message)s")
import xprnn
for _ in range(2):
    try:
        print("chose", xprnn.get_backend("cupy").name)
    except xprnn.BackendUnavailableError as error:
        print("refused", error)
print("memory", os.environ.get("CUPY_CACHE_IN_MEMORY"))
"""


def run(code: str, tmp_path: Path, *options: str, **environment: str) -> str:
    """The output of a program, stdout and stderr."""
    process = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in process.stderr, process.stderr
    return process.stdout + process.stderr


@cache
def driver() -> int:
    """The version of the NVIDIA driver, or 0 without one."""
    code = "import cupy; print(cupy.cuda.runtime.driverGetVersion())"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return int(process.stdout)


def skip_with_driver() -> None:
    if driver():
        pytest.skip("there is an NVIDIA driver here")


def unavailable_reasons(printed: str) -> list[str]:
    reasons = re.findall("^refused (.*)$", printed, re.MULTILINE)
    assert len(reasons) == 2, printed
    assert reasons[0] == reasons[1], "the second message differs"
    return reasons


# -- no driver, no device


def test_a_missing_driver_is_reported(tmp_path: Path) -> None:
    skip_with_driver()
    (text, _) = unavailable_reasons(run(PROGRAM, tmp_path))
    assert re.match(r"backend 'cupy': CuPy \d+\.\d+\.\d+ finds no NVIDIA driver", text)


def test_auto_and_info_without_a_driver(tmp_path: Path) -> None:
    skip_with_driver()
    code = (
        "import logging; logging.basicConfig(format='%(levelname)s %(message)s')\n"
        "import xprnn; from xprnn.tools import cli\n"
        "for _ in range(3): assert xprnn.GRU(3, 4, backend='auto').backend.name == 'numpy'\n"
        "cli.main(['info'])"
    )
    printed = run(code, tmp_path, COLUMNS="300")
    cause = r"backend 'cupy': CuPy \S+ finds no NVIDIA driver"
    assert len(re.findall(f"WARNING backend 'auto' chose numpy: {cause}", printed)) == 1
    assert re.search(f"cupy +not usable: {cause}", printed)
    assert re.search(f"auto +numpy: {cause}", printed)


@pytest.mark.gpu
def test_a_missing_device_is_reported(tmp_path: Path) -> None:
    if not driver():
        pytest.skip("there is no NVIDIA driver here")
    (text, _) = unavailable_reasons(run(PROGRAM, tmp_path, CUDA_VISIBLE_DEVICES=""))
    assert "find no GPU; CUDA_VISIBLE_DEVICES is ''" in text


# -- a home directory that cannot be written


def unwritable(kind: str, tmp_path: Path) -> dict[str, str]:
    """Environments in which CuPy cannot store compiled kernels, not even as root."""
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    return {
        "home is no folder": {"HOME": str(tmp_path / "file")},
        "home cannot be made": {"HOME": "/proc/missing"},
        "folder cannot be made": {"CUPY_CACHE_DIR": cache},
        "folder cannot be written": {"CUPY_CACHE_DIR": "/proc"},
        "folder has no name": {"CUPY_CACHE_DIR": ""},
    }[kind]


UNWRITABLE = (
    *("home is no folder", "home cannot be made", "folder cannot be made"),
    *("folder cannot be written", "folder has no name"),
)


def without_cache_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_cupy_works_where_its_folder_cannot_be_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cache_variables(monkeypatch)
    environment = unwritable(kind, tmp_path)
    printed = run(PROGRAM, tmp_path, **environment)
    assert "fails to import" not in printed
    assert "chose cupy:0" in printed or "finds no NVIDIA driver" in printed
    assert "memory 1" in printed
    assert not list(tmp_path.glob("*/*")) and not (tmp_path / "~").exists()


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_cupy_alone_fails_where_its_folder_cannot_be_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason for the previous test: the import of CuPy or its first kernel fails."""
    without_cache_variables(monkeypatch)
    code = (
        "try:\n"
        "    import cupy\n"
        "    cupy.cuda.compiler._kernel_cache_backend.save('name', b'binary', 'source')\n"
        "except OSError as error: print('failed', error)"
    )
    assert "failed" in run(code, tmp_path, **unwritable(kind, tmp_path))


def test_a_writable_cache_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cache_variables(monkeypatch)
    printed = run(PROGRAM, tmp_path, CUPY_CACHE_DIR=str(tmp_path / "new"))
    assert "memory None" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_no_writable_folder_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cache_variables(monkeypatch)
    code = (
        "import tempfile\n"
        "def nowhere(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        f"tempfile.gettempdir = nowhere\n{PROGRAM}"
    )
    (text, _) = unavailable_reasons(run(code, tmp_path, HOME="/proc/missing"))
    assert "CuPy fails to import" in text
    assert "No usable temporary directory" in text
    assert "set CUPY_CACHE_DIR to a folder that can be written" in text


KERNEL = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
import xprnn
x = xprnn.asarray([[[1.0]]], backend="cupy", dtype="float32")
output, _ = xprnn.GRU(1, 1, backend="cupy", seed=0)(x)
print("value", float(output.get().item()))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_kernels_are_compiled_without_a_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not driver():
        pytest.skip("there is no NVIDIA driver here")
    without_cache_variables(monkeypatch)
    expected = run(KERNEL, tmp_path).partition("value ")[2]
    printed = run(KERNEL, tmp_path, **unwritable(kind, tmp_path))
    assert printed.partition("value ")[2].split()[0] == expected.split()[0]
    advice = "compiled anew in every process; set CUPY_CACHE_DIR to a folder that can be written"
    assert printed.count(advice) == 1


# -- unusable installations


@pytest.fixture
def second_package(tmp_path: Path) -> str:
    """The path of a folder that appears to contain another CuPy package."""
    folder = tmp_path / "cupy_cuda11x-13.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda11x\nVersion: 13.0.0\n")
    (folder / "top_level.txt").write_text("cupy\n")
    return os.pathsep.join([str(ROOT), str(tmp_path)])


def test_two_installed_packages_are_reported(tmp_path: Path, second_package: str) -> None:
    skip_with_driver()
    printed = run(PROGRAM, tmp_path, PYTHONPATH=second_package)
    assert "multiple CuPy packages are installed" in printed  # CuPy's own warning
    (text, _) = unavailable_reasons(printed)
    assert "finds no NVIDIA driver" in text
    assert re.search(r"cupy-cuda11x and cupy\S* are both installed: uninstall all of them", text)


def test_two_packages_where_warnings_are_errors(tmp_path: Path, second_package: str) -> None:
    (text, _) = unavailable_reasons(
        run(PROGRAM, tmp_path, "-W", "error::UserWarning", PYTHONPATH=second_package)
    )
    assert "CuPy fails to import: CuPy may not function correctly because multiple" in text
    assert re.search(r"cupy-cuda11x and cupy\S* are both installed", text)


@pytest.mark.parametrize("library", ["cublas", "nvrtc"])
def test_a_missing_cuda_library_is_reported(library: str, tmp_path: Path) -> None:
    code = (
        "from cuda import pathfinder\n"
        "find = pathfinder.load_nvidia_dynamic_lib\n"
        "def missing(name):\n"
        f"    if name == '{library}': raise pathfinder.DynamicLibNotFoundError('no lib' + name)\n"
        "    return find(name)\n"
        "pathfinder.load_nvidia_dynamic_lib = missing\n"
        "import xprnn; from xprnn.backend import cuda\n"
        "cupy, _ = cuda.load()\n"
        # it is checked first, and a machine without a GPU may not have it
        f"if '{library}' != 'cublas': cupy.cuda.cublas = None\n"
        "try: cuda.check_libraries(cupy)\n"
        "except xprnn.BackendUnavailableError as error: print('refused', error)\n"
    )
    printed = run(code, tmp_path)
    assert re.search(
        rf"refused backend 'cupy': CuPy \S+ does not find the libraries of CUDA \d+\.\d+ "
        rf"\(.*lib{library}.*\); pip install 'cupy\S*\[ctk\]', or set CUDA_PATH",
        printed,
    ), printed
