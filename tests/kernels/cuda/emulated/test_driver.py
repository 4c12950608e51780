"""The call of CUDA's driver: its arguments and its result."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.emulator.elementwise import COMPILER, needs_compiler
from xprnn.backend import driver

pytestmark = needs_compiler
FIELDS = [name for name, _ in driver.LaunchConfig._fields_]
# Returns as many clusters as the grid has rows, or an error if any argument is not the expected one
LIBRARY = """
struct Config { unsigned gx, gy, gz, bx, by, bz, shared; void *stream, *attributes; unsigned n; };
extern "C" int cuOccupancyMaxActiveClusters(int* count, void* kernel, const Config* c) {
  if (kernel != (void*)0x123456789abc || c->gx != 64 || c->gz != 1 || c->bx != 256) return 1;
  if (c->by != 1 || c->bz != 1 || c->shared != 200000) return 2;
  if (c->stream || c->attributes || c->n) return 3;
  *count = c->gy;
  return 0;
}
"""


def build(source: str, target: Path, *options: str) -> None:
    command = (COMPILER, "-x", "c++", "-", "-o", str(target), *options)
    subprocess.run(command, input=source, text=True, check=True)


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the driver's library."""
    build(LIBRARY, tmp_path / "driver.so", "-shared", "-fPIC")
    library = ctypes.CDLL(str(tmp_path / "driver.so"))
    monkeypatch.setattr(driver, "CDLL", lambda name: library)
    driver._library.cache_clear()
    yield
    driver._library.cache_clear()


def test_the_number_of_active_clusters_of_a_launch(fake_driver: None) -> None:
    for rows in (1, 66):
        assert driver.active_clusters(0x123456789ABC, (64, rows), 256, 200_000) == rows


def test_a_driver_error_is_raised(fake_driver: None) -> None:
    with pytest.raises(RuntimeError, match="cuOccupancyMaxActiveClusters: error 2 of the CUDA"):
        driver.active_clusters(0x123456789ABC, (64, 2), 256, 1)


def test_the_structure_matches_cudas_header(tmp_path: Path) -> None:
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_runtime" / "include"
    if not (folder / "cuda.h").exists():
        pytest.skip("CUDA's headers are not installed: pip install --group nvrtc")
    offsets = ", ".join([f"(int)offsetof(CUlaunchConfig, {name})" for name in FIELDS])
    source = f"""#include <cstddef>\n#include <cstdio>\n#include <cuda.h>
int sizes[] = {{{offsets}, (int)sizeof(CUlaunchConfig)}};
int main() {{ for (int size : sizes) printf("%d ", size); }}"""
    build(source, tmp_path / "sizes", f"-I{folder}")
    printed = subprocess.run(
        [tmp_path / "sizes"], capture_output=True, text=True, check=True
    ).stdout
    actual = [getattr(driver.LaunchConfig, name).offset for name in FIELDS]
    assert list(map(int, printed.split())) == [*actual, ctypes.sizeof(driver.LaunchConfig)]
