"""The tiers of the suite: what is selected of a small suite in its folders, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiers

ROOT = Path(__file__).parents[2]
TEST = """
import pytest

def test_plain(): pass

@pytest.mark.exhaustive
def test_every_option(): pass

@pytest.mark.gpu
def test_on_a_device(): pass
"""
SKIPPED = "import pytest\n\ndef test_it(): pytest.skip('there is no browser')\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """A file in each folder, with the conftest and the settings of the real suite."""
    shutil.copytree(ROOT / "tests" / "support", tmp_path / "tests" / "support")
    shutil.copytree(ROOT / "tests" / "data", tmp_path / "tests" / "data")
    examples = Path("docs", "examples")  # which `tests/support/definitions.py` imports
    shutil.copytree(ROOT / examples, tmp_path / examples)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in tiers.FOLDERS:
        add(tmp_path, folder, TEST)
    return tmp_path


def add(suite: Path, folder: str, text: str) -> None:
    path = suite / "tests" / folder / "test_here.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for package in list(path.parents)[: folder.count("/") + 2]:
        (package / "__init__.py").touch()


def run(suite: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, "tests"],
        cwd=suite,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(suite), str(ROOT)])},
    )


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    found = re.findall(r"PASSED (tests/\S*::test_\w+)|(tests/\S*::test_\w+) PASSED", done.stdout)
    return {"".join(either) for either in found}


def test_every_test_is_of_the_fast_tier_or_of_others(suite: Path) -> None:
    fast, others, every = (passed(run(suite, *m)) for m in ((), ("-m", "not fast"), ("-m", "")))
    assert not fast & others and fast | others == every
    wanted = {folder for folder, tier in tiers.FOLDERS.items() if tier == "fast"}
    assert fast == {f"tests/{folder}/test_here.py::test_plain" for folder in wanted}


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_files_that_are_named_run(workers: tuple[str, ...], suite: Path) -> None:
    done = run(suite, *workers, "tests/mutation")
    assert "tests/mutation/test_here.py::test_plain" in passed(done)


def test_a_device_is_needed_where_it_is_named_only(suite: Path) -> None:
    done = run(suite, "-m", "gpu")
    assert f"{len(tiers.FOLDERS) * 1 + 2} passed" in done.stdout, done.stdout


@pytest.mark.parametrize("option", ["-m", "--required"])
def test_a_marker_that_there_is_not(option: str, suite: Path) -> None:
    done = run(suite, option, "kernel")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no marker named kernel" in done.stderr


def test_a_file_in_no_folder(suite: Path) -> None:
    add(suite, "kernels", TEST)
    done = run(suite)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "tests/kernels/test_here.py is in no tier's folder" in done.stdout + done.stderr


def test_a_tier_that_is_required_and_left_out(suite: Path) -> None:
    assert run(suite, "--required", "fast").returncode == 0
    done = run(suite, "--required", "fast,tools")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "no test ran that is tools" in done.stdout


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_test_that_is_required_and_skipped(workers: tuple[str, ...], suite: Path) -> None:
    add(suite, "tools", SKIPPED)
    asked = (*workers, "-m", "not fast", "--required", "tools")
    done = run(suite, *asked)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "skipped, but tools is required: tests/tools/test_here.py::test_it" in done.stdout
    assert run(suite, *asked[:-1], "kernels").returncode == 0
    add(suite, "tools", TEST + SKIPPED.partition("\n")[2])
    assert run(suite, *asked, "--allow-skip", "no browser").returncode == 0


def test_functions_that_are_named_exist(suite: Path) -> None:
    add(suite, "gpu", TEST)
    (suite / "tests" / "gpu" / "test_here.py").rename(suite / "tests" / "gpu" / "test_smoke.py")
    done = run(suite)
    assert done.returncode == 0  # the file is not collected
    done = run(suite, "-m", "")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no test named gpu/test_smoke.py::" in done.stdout + done.stderr
