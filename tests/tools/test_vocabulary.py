"""No tracked text uses the vocabulary listed in `data/old_vocabulary.txt`.

    python tests/tools/test_vocabulary.py [PATH...]

prints the matches of each file; a path limits it to a file or a folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
LIST = ROOT / "tests" / "data" / "old_vocabulary.txt"
EXCLUDED = ("CHANGELOG.md", "LICENSE", "docs/renames/*", "benchmarks/results/*", "tests/data/*")


class Entry(NamedTuple):
    pattern: str
    sample: str
    globs: tuple[str, ...]  # of the paths that are searched; one with ! excludes paths

    @property
    def regex(self) -> re.Pattern[str]:
        """The compiled pattern; no letter precedes a \\< and none follows a \\>."""
        bounded = self.pattern.replace(r"\<", "(?<![a-z])").replace(r"\>", "(?![a-z])")
        return re.compile(bounded, re.IGNORECASE | re.MULTILINE)

    def applies_to(self, path: str) -> bool:
        included = [glob for glob in self.globs if not glob.startswith("!")]
        excluded = [glob[1:] for glob in self.globs if glob.startswith("!")]
        return matches_any(path, included or ["*"]) and not matches_any(path, excluded)


def entries() -> list[Entry]:
    """The entries of the list."""
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    found = []
    for line in lines:
        pattern, sample, *globs = line.split(" :: ")
        found.append(Entry(pattern, sample, tuple(" ".join(globs).split())))
    return found


def matches_any(path: str, globs: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatch(path, glob) for glob in globs)


def matches(path: str, text: str, patterns: list[Entry]) -> Iterator[str]:
    """The matches in the name and the text of a file, each with its line and its pattern."""
    for entry in patterns:
        if entry.applies_to(path):
            regex = entry.regex
            if found := regex.search(path):
                yield f"{path}: {found[0]!r} in its name ({entry.pattern})"
            for found in regex.finditer(text):
                line = text.count("\n", 0, found.start()) + 1
                yield f"{path}:{line}: {found[0].strip()!r} ({entry.pattern})"


def tracked(*paths: str) -> Iterator[tuple[str, str]]:
    """The names and texts of the tracked files that are to be searched."""
    command = ["git", "ls-files", "--", *paths]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.splitlines():
        searched = path != Path(__file__).relative_to(ROOT).as_posix()
        if searched and not matches_any(path, EXCLUDED) and (ROOT / path).is_file():
            try:
                yield path, (ROOT / path).read_text(encoding="utf-8")
            except UnicodeDecodeError:  # not a text
                continue


def main(*paths: str) -> int:
    """Print the matches per file, and their number; return 1 if there are any."""
    patterns, total = entries(), 0
    for path, text in tracked(*paths):
        hits = list(matches(path, text, patterns))
        total += len(hits)
        print(*hits, sep="\n", end="\n" * bool(hits))
    print(f"{total} matches")
    return int(total > 0)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.pattern)
def test_each_pattern_matches_its_sample(entry: Entry) -> None:
    assert entry.regex.search(entry.sample)
    path = next((g.replace("*", "x") for g in entry.globs if not g.startswith("!")), "x.py")
    assert list(matches(path, f"First line.\n{entry.sample}\n", [entry]))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone: what is tracked is unknown")
def test_no_tracked_text_uses_the_old_vocabulary() -> None:
    patterns = entries()
    assert [hit for path, text in tracked() for hit in matches(path, text, patterns)] == []


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
