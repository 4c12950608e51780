"""What the real CuPy does where it cannot work, each time in a process of its own."""

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

ASK = """
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
    """What a program prints, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@cache
def driver() -> int:
    """The version of the NVIDIA driver; 0: there is none."""
    code = "import cupy; print(cupy.cuda.runtime.driverGetVersion())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def no_driver() -> None:
    if driver():
        pytest.skip("there is an NVIDIA driver here")


def refusals(printed: str) -> list[str]:
    found = re.findall("^refused (.*)$", printed, re.MULTILINE)
    assert len(found) == 2, printed
    assert found[0] == found[1], "the second time it says something else"
    return found


# -- no driver, no device


def test_no_driver(tmp_path: Path) -> None:
    no_driver()
    (text, _) = refusals(run(ASK, tmp_path))
    assert re.match(r"backend 'cupy': CuPy \d+\.\d+\.\d+ finds no NVIDIA driver", text)


def test_auto_and_info_without_a_driver(tmp_path: Path) -> None:
    no_driver()
    code = (
        "import logging; logging.basicConfig(format='%(levelname)s %(message)s')\n"
        "import xprnn; from xprnn import cli\n"
        "for _ in range(3): assert xprnn.GRU(3, 4, backend='auto').backend.name == 'numpy'\n"
        "cli.main(['info'])"
    )
    printed = run(code, tmp_path, COLUMNS="300")
    cause = r"backend 'cupy': CuPy \S+ finds no NVIDIA driver"
    assert len(re.findall(f"WARNING backend 'auto' chose numpy: {cause}", printed)) == 1
    assert re.search(f"cupy +not usable: {cause}", printed)
    assert re.search(f"auto +numpy: {cause}", printed)


@pytest.mark.gpu
def test_no_device(tmp_path: Path) -> None:
    if not driver():
        pytest.skip("there is no NVIDIA driver here")
    (text, _) = refusals(run(ASK, tmp_path, CUDA_VISIBLE_DEVICES=""))
    assert "find no GPU; CUDA_VISIBLE_DEVICES is ''" in text


# -- a home that cannot be written


def unwritable(kind: str, tmp_path: Path) -> dict[str, str]:
    """Environments in which CuPy has no place for compiled kernels, not even as root."""
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    return {
        "home is no folder": {"HOME": str(tmp_path / "file")},
        "home cannot be made": {"HOME": "/proc/nobody"},
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
    printed = run(ASK, tmp_path, **environment)
    assert "fails to import" not in printed
    assert "chose cupy:0" in printed or "finds no NVIDIA driver" in printed
    assert "memory 1" in printed
    assert not list(tmp_path.glob("*/*")) and not (tmp_path / "~").exists()


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_cupy_alone_does_not(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test before is about: the import of CuPy fails, or the first kernel does."""
    without_cache_variables(monkeypatch)
    code = (
        "try:\n"
        "    import cupy\n"
        "    cupy.cuda.compiler._kernel_cache_backend.save('name', b'binary', 'source')\n"
        "except OSError as error: print('failed', error)"
    )
    assert "failed" in run(code, tmp_path, **unwritable(kind, tmp_path))


def test_a_folder_that_can_be_written_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_cache_variables(monkeypatch)
    printed = run(ASK, tmp_path, CUPY_CACHE_DIR=str(tmp_path / "new"))
    assert "memory None" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_no_place_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_cache_variables(monkeypatch)
    code = (
        "import tempfile\n"
        "def nowhere(): raise FileNotFoundError(2, 'No usable temporary directory found')\n"
        f"tempfile.gettempdir = nowhere\n{ASK}"
    )
    (text, _) = refusals(run(code, tmp_path, HOME="/proc/nobody"))
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


# -- installations that do not fit


@pytest.fixture
def second_package(tmp_path: Path) -> str:
    """The path of a folder in which another CuPy package seems to be installed."""
    folder = tmp_path / "cupy_cuda11x-13.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda11x\nVersion: 13.0.0\n")
    (folder / "top_level.txt").write_text("cupy\n")
    return os.pathsep.join([str(ROOT), str(tmp_path)])


def test_two_packages_that_cupy_warns_of(tmp_path: Path, second_package: str) -> None:
    no_driver()
    printed = run(ASK, tmp_path, PYTHONPATH=second_package)
    assert "multiple CuPy packages are installed" in printed  # CuPy's own warning
    (text, _) = refusals(printed)
    assert "finds no NVIDIA driver" in text
    assert re.search(r"cupy-cuda11x and cupy\S* are both installed: uninstall all of them", text)


def test_two_packages_where_warnings_are_errors(tmp_path: Path, second_package: str) -> None:
    (text, _) = refusals(run(ASK, tmp_path, "-W", "error::UserWarning", PYTHONPATH=second_package))
    assert "CuPy fails to import: CuPy may not function correctly because multiple" in text
    assert re.search(r"cupy-cuda11x and cupy\S* are both installed", text)


@pytest.mark.parametrize("library", ["cublas", "nvrtc"])
def test_a_library_of_cuda_that_is_not_found(library: str, tmp_path: Path) -> None:
    code = (
        "from cuda import pathfinder\n"
        "find = pathfinder.load_nvidia_dynamic_lib\n"
        "def missing(name):\n"
        f"    if name == '{library}': raise pathfinder.DynamicLibNotFoundError('no lib' + name)\n"
        "    return find(name)\n"
        "pathfinder.load_nvidia_dynamic_lib = missing\n"
        "import xprnn; from xprnn.backend import cuda\n"
        "cupy, _ = cuda.load()\n"
        # it is looked for first, and a machine for compiling only has none
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
