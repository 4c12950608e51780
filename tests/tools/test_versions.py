"""The pages on versions and installation agree with pyproject.toml and with the errors."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import xprnn
from tests.support.nvrtc import ARCHITECTURES
from xprnn.backend import cuda, optional

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
VERSIONS = (ROOT / "docs" / "versions.md").read_text("utf-8")
INSTALLATION = (ROOT / "docs" / "installation.md").read_text("utf-8")


def rows(page: str) -> list[list[str]]:
    """The cells of each row of the tables of a page."""
    lines = re.findall(r"^\| (.*) \|$", page, re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def bound(requirements: list[str], name: str) -> str:
    """The lower bound of a package, the only one of its bounds."""
    (found,) = {
        each.partition(">=")[2]
        for each in requirements
        if re.match(rf"{name}(\[\w+\])?>=[\d.]+$", each)
    }
    return found


def test_the_lower_bounds_are_those_of_pyproject() -> None:
    stated = {name: versions for name, versions, *_ in rows(VERSIONS)}
    required: list[str] = PROJECT["dependencies"]
    for name in ("NumPy", "safetensors", "rich"):
        assert stated[name] == f"{bound(required, name.lower())} or later"
    assert stated["Python"] == f"{PROJECT['requires-python'].removeprefix('>=')} or later"
    assert stated["Numba"] == f"{bound(EXTRAS['numba'], 'numba')} or later"
    for extra in ("cuda12", "cuda13"):
        assert stated["CuPy"] == f"{bound(EXTRAS[extra], f'cupy-{extra}x')} or later"
    assert stated["CuPy"] == ".".join(map(str, cuda.MINIMUM_VERSION)) + " or later"
    first, last = ARCHITECTURES[0], ARCHITECTURES[-1]
    assert stated["GPUs"] == f"compute capability {int(first) / 10} to {int(last) / 10}"


def test_the_pythons_are_those_of_the_classifiers() -> None:
    prefix = "Programming Language :: Python :: "
    classified = [each.removeprefix(prefix) for each in PROJECT["classifiers"] if prefix in each]
    named = {
        version
        for row in rows(INSTALLATION)
        for version in re.findall(r"\b3\.1[1-9]\b", " ".join(row))
    }
    assert named == {*classified}


def test_every_extra_is_in_the_table() -> None:
    listed = [row[0].strip("`") for row in rows(INSTALLATION) if len(row) == 3]
    assert {*EXTRAS} <= {*listed}


def test_the_torch_of_the_tests_is_the_one_that_is_named() -> None:
    assert re.findall(r"pip install (torch\S+)", INSTALLATION) == [
        each for each in EXTRAS["test"] if "torch" in each
    ]


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_the_messages_are_those_of_the_errors(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(optional, "_failures", {})
    messages = [row[2].strip("`") for row in rows(INSTALLATION) if "BackendUnavail" in row[1]]
    with pytest.raises(xprnn.BackendUnavailableError) as caught:
        cuda.load()
    absent = "macOS" if system == "darwin" else "is not installed"
    (stated,) = [message for message in messages if absent in message]
    assert stated in str(caught.value)


def test_the_other_messages_are_in_the_source() -> None:
    source = Path(cuda.__file__).read_text("utf-8")
    assert "is built for ROCm, and the kernels are PTX" in source
    assert "expected {minimum} or later" in source
    for message in ("is built for ROCm, and the kernels are PTX", "expected 14.2 or later"):
        assert f"`{message}`" in INSTALLATION
