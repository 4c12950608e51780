"""Apply the renames of the *.toml files beside this script to a checkout, in place.

    python docs/renames/apply.py FOLDER [MAP.toml ...]

Without maps all of them are applied, in the order of their names: first all changes of text, then
the moves. A map has four kinds of entries:

- `[[word]]` `old`, `new`: a whole identifier or word;
- `[[text]]` `old`, `new`: any text, such as a part of an error message;
- `[moves]` `"old path" = "new path"`: a file, moved after its text has been changed;
- `[modules]` `"xprnn.old" = "xprnn.new"`: a module, moved with every import of it.

`files`, a glob or a list of globs over paths before or after the moves, limits a `word` or `text`
to some files. What an entry puts in is not seen by entries before it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from modules import dotted, rewritten

HERE = Path(__file__).parent
SUFFIXES = {".py", ".md", ".toml", ".h", ".cu", ".sh", ".txt", ""}
LEFT_ALONE = ("docs/renames/*", "benchmarks/results/*", "tests/data/*", "CHANGELOG.md")


def main(folder: str, *maps: str) -> None:
    """Apply these maps, or all."""
    names = map(Path, maps) if maps else sorted(HERE.glob("*.toml"))
    apply(Path(folder), [tomllib.loads(name.read_text()) for name in names])


def apply(root: Path, maps: list[dict[str, Any]]) -> None:
    """Change the texts of tracked files by each map, then move files."""
    moved = _moved_paths()
    for entries in maps:
        _change_texts(root, entries, moved)
    for entries in maps:
        for old, new in entries.get("moves", {}).items():
            _move(root, old, new)
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    for entries in maps:
        if moved := entries.get("modules", {}):
            _move_modules(root, moved)


def _change_texts(root: Path, entries: dict[str, Any], moved: dict[str, str]) -> None:
    rules = [
        (_pattern(kind, e["old"]), e) for kind in ("word", "text") for e in entries.get(kind, [])
    ]
    for path in _tracked(root):
        names = path, moved.get(path, path)
        mine = [
            (rule, e["new"])
            for rule, e in rules
            if any(_matches(name, e.get("files", "*")) for name in names)
        ]
        before = after = (root / path).read_text()
        for rule, new in mine:
            after = rule.sub(new.replace("\\", r"\\"), after)
        if after != before:
            (root / path).write_text(after)


def _moved_paths() -> dict[str, str]:
    """The new path of each file that moves, and the old path of each new one."""
    paths: dict[str, str] = {}
    for name in HERE.glob("*.toml"):
        entries = tomllib.loads(name.read_text())
        moves = dict(entries.get("moves", {}))
        for old, new in entries.get("modules", {}).items():
            moves[old.replace(".", "/") + ".py"] = new.replace(".", "/") + ".py"
        paths |= moves | {new: old for old, new in moves.items()}
    return paths


def _move_modules(root: Path, moved: dict[str, str]) -> None:
    paths = _tracked(root)
    modules = frozenset(dotted(path) for path in paths if path.endswith(".py"))
    for path in paths:
        before = (root / path).read_text()
        after = rewritten(before, path, moved, modules)
        if after != before:
            (root / path).write_text(after)
    for old, new in moved.items():
        source = old.replace(".", "/")
        package = (root / source / "__init__.py").exists()
        _move(
            root,
            f"{source}/__init__.py" if package else f"{source}.py",
            new.replace(".", "/") + ".py",
        )


def _move(root: Path, old: str, new: str) -> None:
    if (root / old).exists():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


def _pattern(kind: str, old: str) -> re.Pattern[str]:
    escaped = re.escape(old)
    return re.compile(rf"(?<!\w){escaped}(?!\w)" if kind == "word" else escaped)


def _matches(path: str, globs: str | list[str]) -> bool:
    return any(fnmatch(path, glob) for glob in ([globs] if isinstance(globs, str) else globs))


def _tracked(root: Path) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        path
        for path in listed
        if Path(path).suffix in SUFFIXES
        and not _matches(path, list(LEFT_ALONE))
        and (root / path).is_file()
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
