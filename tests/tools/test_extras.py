"""No combination of extras installs two packages of CuPy, which CuPy forbids.

Extras only add requirements, so it suffices to resolve all of them but `cuda13`, and all of them
but `cuda12`. pip needs the package index. If the index has torch for CUDA 13 only, pip refuses
`cuda12` beside it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
CUDA = ("cuda12", "cuda13")
OLD_EXTRAS = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "old"
version = "1"

[project.optional-dependencies]
cuda13 = ["cupy-cuda13x>=14.2"]
nvrtc = ["cupy-cuda12x>=14.2"]

[tool.hatch.build.targets.wheel]
bypass-selection = true
"""


def cupys(project: Path, extras: set[str]) -> list[str]:
    """The packages of CuPy that pip would install into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-"]
    target = f"{project}[{','.join(sorted(extras))}]"
    done = subprocess.run(
        [*command, "--ignore-installed", target], capture_output=True, encoding="utf-8", timeout=300
    )
    if "conflicting dependencies" in done.stderr and "cuda-toolkit" in done.stderr:
        return []
    assert done.returncode == 0, done.stderr
    names = [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]
    return sorted(name for name in names if name.startswith("cupy"))


@pytest.mark.parametrize("cuda", CUDA)
def test_all_other_extras_add_no_cupy(cuda: str) -> None:
    extras = {*PROJECT["optional-dependencies"]} - {*CUDA} | {cuda}
    resolved = cupys(ROOT, extras)
    assert resolved == [f"cupy-{cuda}x"] or (cuda, resolved) == ("cuda12", [])


def test_two_packages_are_noticed(tmp_path: Path) -> None:
    """The extra `nvrtc` of version 0.1.0 named CuPy for CUDA 12."""
    (tmp_path / "pyproject.toml").write_text(OLD_EXTRAS, "utf-8")
    assert cupys(tmp_path, {"cuda13", "nvrtc"}) == ["cupy-cuda12x", "cupy-cuda13x"]
