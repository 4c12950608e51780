"""Shared by the report files: checks, folders, and the sections of pages between marks."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Report = dict[str, Any]
Fields = Mapping[str, tuple[type, ...]]


def slug(name: str) -> str:
    """A machine's or device's name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def check_fields(value: Any, fields: Fields, where: str) -> None:
    """Raise ValueError, naming the field, unless `value` has these fields with these types."""
    if not isinstance(value, dict) or value.keys() != fields.keys():
        names = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where}: expected the fields {sorted(fields)}, got {names}")
    for name, types in fields.items():
        field = value[name]
        if not isinstance(field, types) or (isinstance(field, float) and not math.isfinite(field)):
            kinds = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{where}: {name}: expected {kinds}, got {field!r}")


def check_writable(folder: Path) -> None:
    """Create `folder`; OSError unless files can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files of these names, each atomically; ValueError where two names are one file."""
    from xprnn.nn.serialization import check_outputs, replacing

    check_outputs([folder / name for name in texts])
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text + "\n", "utf-8")


def read_all(results: Path, name: str, check: Callable[[Any], None]) -> list[Report]:
    """The reports of this name in the folders of `results`; ValueError names an invalid one."""
    reports = []
    for path in sorted(results.glob(f"*/{name}")):
        try:
            report = json.loads(path.read_text("utf-8"))
            check(report)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        reports.append(report)
    return reports


def with_section(page: str, marks: tuple[str, str], section: str) -> str:
    """The page with `section` between two marks; ValueError unless it has each mark once."""
    begin, end = marks
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise ValueError(f"expected the marks {begin} and {end}, once each")
    head, rest = page.split(begin)
    return f"{head}{begin}\n{section}\n{end}{rest.split(end)[1]}"


def write_section(page: Path, marks: tuple[str, str], section: str) -> None:
    """Write `section` between the marks of a page; ValueError names it."""
    from xprnn.nn.serialization import replacing

    try:
        text = with_section(page.read_text("utf-8"), marks, section)
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from error
    with replacing(page) as part:
        part.write_text(text, "utf-8")
