"""Compare the tests of an older commit, with the renames applied, with the tests of this checkout.

    python docs/renames/compare.py REV

It prints the files that differ, with the lines that only one of them has; ruff formats both first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from difflib import unified_diff
from pathlib import Path

from apply import HERE, apply

ROOT = HERE.parent.parent


def main(revision: str) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder) / "old"
        subprocess.run(["git", "clone", "-q", "--shared", ROOT, old], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=old, check=True)
        apply(old, [tomllib.loads(name.read_text()) for name in sorted(HERE.glob("*.toml"))])
        rows = list(compared(_formatted(old), _formatted(ROOT)))
    same = sum(not (added or removed) for _, added, removed in rows)
    print(f"{len(rows)} files of tests, {same} equal to the renamed old ones; the others:\n")
    print("| file | lines only in the new one | only in the old one |\n|---|---|---|")
    for name, added, removed in rows:
        if added or removed:
            print(f"| {name} | {added} | {removed} |")


def compared(old: dict[str, list[str]], new: dict[str, list[str]]) -> list[tuple[str, int, int]]:
    """Each file, and how many lines only the new or only the old one has."""
    rows = []
    for name in sorted(old.keys() | new.keys()):
        lines = [*unified_diff(old.get(name, []), new.get(name, []), n=0, lineterm="")][2:]
        signs = [line[0] for line in lines]
        rows.append((name, signs.count("+"), signs.count("-")))
    return rows


def _formatted(root: Path) -> dict[str, list[str]]:
    """The lines of the Python files below tests/, formatted alike."""
    files = sorted((root / "tests").rglob("*.py"))
    return {str(path.relative_to(root)): _lines(path) for path in files}


def _lines(path: Path) -> list[str]:
    text = path.read_text()
    for command in (["check", "--select", "I", "--fix-only"], ["format"]):
        arguments = ["ruff", *command, "-q", "--config", ROOT / "pyproject.toml", "-"]
        text = subprocess.run(
            arguments, input=text, capture_output=True, text=True, check=True
        ).stdout
    return text.splitlines()


if __name__ == "__main__":
    main(*sys.argv[1:])
