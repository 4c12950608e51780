"""Users' code, right and wrong, checked by mypy and pyright.

`right.py` and the README's examples must have no error; `wrong.py` must have an error on each
marked line and on no other.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")
pytest.importorskip("pyright")

HERE = Path(__file__).parent
ROOT = next(folder for folder in HERE.parents if (folder / "pyproject.toml").is_file())
CHECKERS = ("mypy", "pyright")
README = "readme_examples.py"

Errors = dict[str, dict[int, str]]  # by file and line


def errors_of(checker: str, folder: Path) -> Errors:
    """The errors in all files, from one run of a checker."""
    readme = (ROOT / "README.md").read_text("utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert examples
    (folder / README).write_text("\n".join(examples))
    files = [str(HERE / "right.py"), str(HERE / "wrong.py"), str(folder / README)]
    return _mypy(files, folder) if checker == "mypy" else _pyright(files, folder)


def _mypy(files: list[str], folder: Path) -> Errors:
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\nfollow_imports = silent\n")
    options = ["--config-file", "mypy.ini", "--cache-dir", "cache", "--no-pretty", "--output=json"]
    lines = _run("mypy", [*options, *files], folder).splitlines()
    reports = [json.loads(line) for line in lines if line.startswith("{")]
    assert reports, lines
    return _by_line(
        (r["file"], r["line"], r["message"]) for r in reports if r["severity"] == "error"
    )


def _pyright(files: list[str], folder: Path) -> Errors:
    answer = json.loads(_run("pyright", ["--outputjson", *files], folder))
    assert answer["summary"]["filesAnalyzed"] == len(files)
    return _by_line(
        (r["file"], r["range"]["start"]["line"] + 1, r["message"])
        for r in answer["generalDiagnostics"]
        if r["severity"] == "error"
    )


def _run(module: str, arguments: list[str], folder: Path) -> str:
    """The output of a checker, with this copy of xprnn."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def _by_line(reports) -> Errors:  # type: ignore[no-untyped-def]
    found: Errors = {}
    for file, line, message in reports:
        found.setdefault(Path(file).name, {})[line] = message
    return found


@pytest.mark.parametrize("checker", CHECKERS)
def test_users_code(checker: str, tmp_path: Path) -> None:
    """One test, so that each checker runs once wherever tests are distributed."""
    found = errors_of(checker, tmp_path)
    for name in ("right.py", README):
        assert found.pop(name, {}) == {}, f"{name}: expected no error"

    lines = (HERE / "wrong.py").read_text("utf-8").splitlines()
    wanted = {k for k, line in enumerate(lines, 1) if line.endswith("  # error")}
    wrong = found.pop("wrong.py")
    missing = [f"{k}: {lines[k - 1]}" for k in sorted(wanted - wrong.keys())]
    beyond = [f"{k}: {lines[k - 1]}: {wrong[k]}" for k in sorted(wrong.keys() - wanted)]
    assert not missing, "expected an error at each of these lines"
    assert not beyond, "expected no error at these lines"
    assert not found
