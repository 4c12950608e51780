"""The table of what has been qualified where, and asv's results from it.

    python -m benchmarks.qualified --docs
    python -m benchmarks.qualified --asv FOLDER COMMIT

`xprnn qualify --share DIR` writes a JSON file, which is stored as
benchmarks/results/FOLDER/qualified.json, FOLDER being the name of the device or machine. The first
writes the table of docs/guide/qualify.md from all of them, and its picture from the first. The
second writes the times of one to benchmarks/results/asv/FOLDER, as results of COMMIT, whose kernels
must be those that were qualified; a hash or a tag, from a checkout with git.

Exit status: 0 written, 2 a file is not valid or cannot be written, or the kernels are others.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import result_store
from .reports import write_section

# xprnn is imported inside functions only: asv imports every module here, also with versions of
# xprnn that have no qualifications.
if TYPE_CHECKING:
    from xprnn.diagnostics.qualifying.report import Line
    from xprnn.kernels.qualification import Qualification

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "guide" / "qualify.md"
PICTURE = ROOT / "docs" / "_static" / "qualified.svg"
NAME = "qualified.json"
MARKS = (
    "<!-- qualified devices: `python -m benchmarks.qualified --docs` writes this -->",
    "<!-- end of qualified devices -->",
)
PICTURE_MARKS = (
    "<!-- picture: `python -m benchmarks.qualified --docs` writes this -->",
    "<!-- end of picture -->",
)
NOTHING = "Nothing yet."
HEAD = (
    "| cell | type | pass | `auto` takes | instead of | calls | times as fast | worst error |",
    "|---|---|---|---|---|---|---|---|",
)
KERNELS = ("cuda", "numba")  # packages of kernels
LIBRARIES = ("cupy", "numba", "numpy")  # whose versions asv's results name
VERSION = "1"  # of asv's benchmarks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.qualified", description=__doc__.splitlines()[0]
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--docs", action="store_true", help="write the table of the page")
    what.add_argument("--asv", nargs=2, metavar=("FOLDER", "COMMIT"), help="write asv's results")
    options = parser.parse_args(arguments)
    try:
        if options.docs:
            stored = read_all(RESULTS)
            write_section(PAGE, MARKS, section(stored))
            write_section(PAGE, PICTURE_MARKS, picture_section(stored))
            if stored:
                PICTURE.write_text(picture(stored[0]), "utf-8")
        else:
            folder, commit = options.asv
            one = read(RESULTS / folder / NAME)
            print(f"written: {write_asv(one, folder, resolved(commit), result_store.RESULTS)}")
    except (ValueError, OSError) as error:
        print(f"qualified: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> Qualification:
    """A stored qualification; ValueError names an invalid one."""
    from xprnn.kernels.qualification import QualificationError, parse

    try:
        return parse(path.read_bytes())
    except QualificationError as error:
        raise ValueError(f"{path}: {error}") from error


def read_all(results: Path) -> list[Qualification]:
    """The qualifications in the folders of `results`."""
    return [read(path) for path in sorted(results.glob(f"*/{NAME}"))]


# -- the table


def section(stored: Iterable[Qualification]) -> str:
    """What is between the marks of the page."""
    return "\n\n".join(map(_device, stored)) or NOTHING


def _device(stored: Qualification) -> str:
    """A device: what it is, the calls for which "auto" selects otherwise, and what failed."""
    from xprnn.diagnostics.qualifying.report import lines_of

    lines = [*lines_of(stored)]
    facts = {name: stored.facts[name] for name in ("xprnn", "system") if name in stored.facts}
    named = [f"{name} {value}" for name, value in {**stored.identity, **facts}.items()]
    about = ", ".join(part for part in named if not part.startswith("device "))
    text = f"**{escaped(stored.device)}**, {escaped(about)}, {stored.date}, file {stored.digest}:"
    rows = [*_changes(lines)]
    kept = f"{sum(not line.changed for line in lines)} of {len(lines)} calls: as without the file."
    table = "\n".join([*HEAD, *rows]) if rows else ""
    end = " ".join([kept, *_failures(stored)])
    return "\n\n".join(part for part in (text, table, end) if part)


def _changes(lines: Iterable[Line]) -> Iterator[str]:
    """A row for each cell, type, pass and pair of implementations."""
    every: dict[tuple[str, ...], int] = defaultdict(int)
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in lines:
        every[line.case[:3]] += 1
        if line.changed:
            groups[(*line.case[:3], line.selected, line.default)].append(line)
    for key, group in groups.items():
        gains = [line.gain for line in group if line.gain]
        ratio = f"{min(gains):.2f} to {max(gains):.2f}" if gains else "—"
        error = max(line.rows[line.selected].error or 0.0 for line in group)
        names = " | ".join(map(escaped, key))
        yield f"| {names} | {len(group)} of {every[key[:3]]} | {ratio} | {error:.2g} |"


def _failures(stored: Qualification) -> Iterator[str]:
    """A sentence for each implementation of a cell and type that failed."""
    failed: dict[tuple[str, ...], int] = defaultdict(int)
    for row in stored.rows:
        if row.faulty:
            failed[row.implementation, row.cell, row.dtype, row.kind, row.outcome] += 1
    for (name, *call, outcome), count in failed.items():
        yield f"**{name} {outcome}**: {escaped(' '.join(call))}, {count} calls."


def escaped(text: str) -> str:
    """A text of a file, without Markdown or HTML."""
    return re.sub(r"([\\`*\[\]<>|{}&])", r"\\\1", text)


# -- the picture


def picture_section(stored: Sequence[Qualification]) -> str:
    """The picture and what it is of, between its marks of the page."""
    if not stored:
        return ""
    lines, about = pictured(stored[0]), f"of {escaped(stored[0].device)}, file {stored[0].digest}"
    cell, dtype, _, shape = lines[0].case
    return (
        f"![A part of the table {about}](../_static/{PICTURE.name})\n\n"
        f"The rows of {escaped(f'{cell} {dtype}')} with H={shape.H} {about}."
    )


def pictured(stored: Qualification) -> list[Line]:
    """The calls of the first cell and type with its first H."""
    from xprnn.diagnostics.qualifying.report import lines_of

    def part(line: Line) -> tuple[object, ...]:
        return (*line.case[:2], line.case.shape.H)

    lines = [*lines_of(stored)]
    return [line for line in lines if part(line) == part(lines[0])]


def picture(stored: Qualification) -> str:
    """A part of the table that `xprnn qualify` prints, as SVG that loads nothing."""
    from rich.console import Console
    from rich.terminal_theme import DIMMED_MONOKAI

    from xprnn.diagnostics.qualifying.report import table_of
    from xprnn.diagnostics.tables import widen

    title = f"{stored.device} ({stored.facts.get('backend', 'unknown')}), {stored.date}"
    table = table_of(pictured(stored), title)
    console = Console(record=True, width=1, file=io.StringIO())
    widen(console, table)
    console.print(table)
    svg = console.export_svg(title="xprnn qualify", theme=DIMMED_MONOKAI)
    for foreign in (r"@font-face \{.*?\}", "<!--.*?-->"):  # of a content network, with an address
        svg = re.sub(rf"\s*{foreign}", "", svg, flags=re.DOTALL)
    return "".join(line.rstrip() + "\n" for line in svg.replace("Fira Code, ", "").splitlines())


# -- asv


def resolved(name: str) -> result_store.Commit:
    """A commit of the checkout; ValueError if there is none of this name."""
    command = ["git", "log", "-1", "--format=%H %ct", name, "--"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: not a commit of {ROOT.name}")
    return result_store.Commit(*done.stdout.split())


def write_asv(
    stored: Qualification, machine: str, commit: result_store.Commit, target: Path
) -> Path:
    """Write the times below asv's folder `target`.

    :raises ValueError: the commit's kernels are not those that were qualified.
    """
    if kernels_digest(commit.hash, stored.facts.get("kernels", "")) != stored.identity.get(
        "sources"
    ):
        raise ValueError(f"{commit.hash[:8]}: its kernels are not those that were qualified")
    described = target / machine / "machine.json"
    if not described.exists():
        result_store._write(described, _machine(stored, machine))
    machine_facts = result_store.read(described)
    del machine_facts["version"]
    python = ".".join(stored.facts.get("python", "").split(".")[:2])
    environment = f"{machine}-qualified-py{python}"
    results = _results(stored)
    content = {
        "commit_hash": commit.hash,
        "env_name": environment,
        "date": int(commit.date) * 1000,
        "params": machine_facts | {"python": python},
        "python": python,
        "requirements": {n: v for n, v in stored.identity.items() if n in LIBRARIES},
        "env_vars": {},
        "result_columns": ["result", "params", "version"],
        "results": results,
        "durations": {},
        "version": 2,
    }
    path = target / machine / f"{commit.hash[:8]}-{environment}.json"
    result_store._write(path, content)
    described_benchmarks = {name: _description(name, row[1]) for name, row in results.items()}
    result_store.write_benchmarks(target, {"version": 2, **described_benchmarks})
    return path


def kernels_digest(commit: str, package: str) -> str:
    """The digest of a package of kernels at a commit, as a qualification has it."""
    from xprnn.kernels.qualification import folder_digest

    if package not in KERNELS:
        raise ValueError(f"kernels: expected one of {', '.join(KERNELS)}; got {package!r}")
    sources = import_module(f"xprnn.kernels.{package}.package").SOURCES
    folders = [name.replace(".", "/") for name in sources]
    command = ["git", "archive", "--format=tar", commit, *folders]
    archived = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as into:
        with tarfile.open(fileobj=io.BytesIO(archived)) as tar:
            tar.extractall(into, filter="data")
        return folder_digest(*[Path(into, folder) for folder in folders])


def _machine(stored: Qualification, machine: str) -> dict[str, Any]:
    """asv's description of a machine of which nothing else is stored."""
    return {
        "machine": machine,
        "os": stored.facts.get("system", ""),
        "arch": stored.facts.get("machine", ""),
        "cpu": stored.device,
        "num_cpu": stored.facts.get("threads", ""),
        "ram": "",
        "version": 1,
    }


def _results(stored: Qualification) -> dict[str, list[Any]]:
    """asv's rows: a benchmark for each pass, with seconds for each combination, or null."""
    passes: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for row in stored.rows:
        if row.right and row.microseconds:
            implementation = f"xprnn-{stored.facts.get('backend', 'unknown')}-{row.implementation}"
            size = f"N={row.N} H={row.H}" + ("" if row.kind == "step" else f" T={row.T}")
            combination = (row.cell, implementation, row.dtype, size)
            passes[row.kind][combination] = row.microseconds / 1e6
    results: dict[str, list[Any]] = {}
    for kind, seconds in passes.items():
        axes = [[*dict.fromkeys(values)] for values in zip(*seconds, strict=True)]
        values = [seconds.get(combination) for combination in product(*axes)]
        params = [[repr(value) for value in axis] for axis in axes]
        results[f"qualified.{kind.capitalize()}.time_call"] = [values, params, VERSION]
    return results


def _description(name: str, params: list[list[str]]) -> dict[str, Any]:
    return {
        "code": "a call, measured by `xprnn qualify`",
        "name": name,
        "param_names": ["cell", "implementation", "dtype", "size"],
        "params": params,
        "timeout": 60,
        "type": "time",
        "unit": "seconds",
        "version": VERSION,
    }


if __name__ == "__main__":
    from xprnn.tools.output import standard_output

    with standard_output():
        sys.exit(main())
