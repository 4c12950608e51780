"""The source distribution and the wheel have the right contents and metadata."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from fnmatch import fnmatch
from pathlib import Path

import pytest

import xprnn

ROOT = Path(__file__).parents[2]
NAME = f"xprnn-{xprnn.__version__}"
NOTICE = "xprnn/tools/data/README.md"  # of the demo's data, CC BY 4.0
LEFT_OUT = (".ci/*", ".gitattributes", ".github/*")  # of the source distribution
NEEDED = {  # whatever else changes
    *("LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("asv.conf.json", "pyproject.toml", "benchmarks/gate.py", "docs/installation.md"),
    *("tests/conftest.py", "tests/data/optimisers_0.1.0.pickle"),
    *("xprnn/py.typed", "xprnn/tools/data/japanese_vowels.npz", NOTICE),
}

pytest.importorskip("build", reason="build is not installed: pip install 'xprnn[dev]'")
if not (ROOT / ".git").exists():
    pytest.skip("not a clone: what is tracked is unknown", allow_module_level=True)


def tracked() -> set[str]:
    """The files of the tree that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return {path for path in listed.stdout.splitlines() if (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, the wheel built from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--quiet", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == {f"{NAME}.tar.gz", wheel(folder).name}
    return folder


def wheel(folder: Path) -> Path:
    return folder / f"{NAME}-py3-none-any.whl"


def metadata(folder: Path) -> Message:
    with zipfile.ZipFile(wheel(folder)) as archive:
        return Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_source_distribution_contains_what_is_tracked(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    left_out = {path for path in tracked() if any(fnmatch(path, each) for each in LEFT_OUT)}
    assert left_out
    assert names == tracked() - left_out | {"PKG-INFO"}
    assert names >= NEEDED


def test_the_wheel_contains_the_package(built: Path) -> None:
    with zipfile.ZipFile(wheel(built)) as archive:
        names = {*archive.namelist()}
    package = {path for path in tracked() if path.startswith("xprnn/")}
    licences = {f"licenses/{path}" for path in ("LICENSE", NOTICE)}
    described = {"METADATA", "RECORD", "WHEEL", "entry_points.txt"} | licences
    assert names == package | {f"{NAME}.dist-info/{file}" for file in described}
    assert names >= {path for path in NEEDED if path.startswith("xprnn/")}


def test_the_metadata(built: Path) -> None:
    stated = metadata(built)
    assert stated["Version"] == xprnn.__version__
    assert stated["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    assert {*stated.get_all("License-File", [])} == {"LICENSE", NOTICE}
    assert stated["Requires-Python"] == ">=3.11"
    required = [each for each in stated.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert not [each for each in required if "<" in each or "==" in each]
    classifiers = stated.get_all("Classifier", [])
    assert "Development Status :: 3 - Alpha" in classifiers
    urls = dict(url.split(", ") for url in stated.get_all("Project-URL", []))
    assert {*urls} == {"Homepage", "Documentation", "Changelog", "Issues"}
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())


def test_twine_accepts_both(built: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed: pip install 'xprnn[dev]'")
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict"]
    files = [str(path) for path in built.iterdir()]
    done = subprocess.run([*command, *files], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_changelog_describes_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    releases = [line for line in text.splitlines() if line.startswith("## ")]
    assert releases[0].startswith(f"## {xprnn.__version__} - ")
