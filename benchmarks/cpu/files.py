"""The CPU report as files: `cpu.json`, `cpu.md` beside it, and the README's section of both."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..reports import check_fields
from ..reports import write as write_texts
from .bars import Bar, bars, geometric, ratio
from .problems import BOTH, FORWARD, SHAPES, SIDES, STEP

Report = dict[str, Any]
Row = dict[str, Any]
NAME = "cpu.json"
FIELDS: dict[str, tuple[type, ...]] = {  # of a report
    **dict.fromkeys(("date", "commit", "sources"), (str,)),
    **dict.fromkeys(("machine", "versions", "absent", "first", "sizes"), (dict,)),
    "rows": (list,),
    "seconds": (float,),
}
ROW: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("cell", "work"), (str,)),
    **dict.fromkeys(("T", "N", "I", "H", "threads"), (int,)),
    **dict.fromkeys(("us", "cores", "notes", "not_timed"), (dict,)),
    "wrong": (list,),
}
MARKS = (
    "<!-- speed on a CPU: `python -m benchmarks.cpu_report --readme` writes this -->",
    "<!-- end of speed on a CPU -->",
)
HEADS = {
    "numpy": "xprnn, NumPy",
    "numba": "xprnn, Numba",
    "torch": "torch",
    "onnxruntime": "ONNX Runtime",
    "jax": "JAX",
    "products": "products alone",
}
NO_RUN = "No run has been filed."


# -- written


def check_report(report: Any) -> None:
    """ValueError, naming the field, unless a report is as `FIELDS` and `ROW` say."""
    check_fields(report, FIELDS, "report")
    for number, row in enumerate(report["rows"]):
        check_fields(row, ROW, f"rows[{number}]")
        if set(row["us"]) & set(row["not_timed"]):
            raise ValueError(f"rows[{number}]: expected either times or why there are none")


def write(report: Report, folder: Path) -> Path:
    """Write both files, each whole or not at all; returns the JSON file's path."""
    check_report(report)
    write_texts(folder, {NAME: json.dumps(report), "cpu.md": markdown(report)})
    return folder / NAME


# -- for people


def markdown(report: Report) -> str:
    """All of a report."""
    facts = ", ".join(f"{name} {fact}" for name, fact in report["machine"].items())
    lines = [
        f"# Speed on a CPU: {report['machine']['name']}, {report['date']}",
        "",
        f"- commit {report['commit']}; sha256 of the sources {report['sources'][:16]}",
        f"- {facts}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"- {len(report['rows'])} calls in {report['seconds']:.0f} s",
        *[f"- not there: {HEADS[side]}: {why}" for side, why in report["absent"].items()],
        *_reasons(report["rows"]),
        *_held(report["rows"]),
        "",
        "## Bars",
        "",
        *bar_table(bars(report["rows"], report["first"])),
    ]
    for work in dict.fromkeys([row["work"] for row in report["rows"]]):
        rows = [row for row in report["rows"] if row["work"] == work]
        lines += ["", f"## {work}", "", *_spread_table(rows)]
    if report["first"]:
        lines += ["", "## Import and first result", "", *first_table(report)]
    return "\n".join(lines)


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """What has no time, and why."""
    for row in rows:
        for side, why in row["not_timed"].items():
            yield f"- not timed: {_call(row)}, {HEADS[side]}: {why}"


def _held(rows: Sequence[Row]) -> Iterator[str]:
    """Who took more processors than the threads it was given."""
    for row in rows:
        for side, cores in row["cores"].items():
            if cores > row["threads"] + 0.1:
                took = f"took {cores} of the {row['threads']} that it was to be held to"
                yield f"- not held: {_call(row)}, {HEADS[side]} {took}"


def _call(row: Row) -> str:
    return f"{row['cell']} {_size(row)} {row['work']}, threads {row['threads']}"


def _size(row: Row) -> str:
    return ", ".join([str(row[name]) for name in "TNIH"])


def bar_table(found: Sequence[Bar]) -> list[str]:
    """Each bar, those that are not met first."""
    head = f"{sum(bar.met for bar in found)} of {len(found)} are met."
    lines = [head, "", "| | call | bar | found |", "|---|---|---|---|"]
    for bar in sorted(found, key=lambda bar: bar.met):
        met = "met" if bar.met else "**not met**"
        lines.append(f"| {met} | {bar.where} | {bar.what} | {bar.found} |")
    return lines


def _spread_table(rows: Sequence[Row]) -> list[str]:
    """Medians with quartiles, in microseconds."""
    sides = [side for side in SIDES if any(row["us"].get(side) for row in rows)]
    lines = [
        "Microseconds: medians of the rounds, and quartiles.",
        "",
        "| cell | T, N, I, H | threads | " + " | ".join(HEADS[side] for side in sides) + " |",
        "|---|---|---|" + "---|" * len(sides),
    ]
    for row in rows:
        cells = " | ".join(_spread(row["us"].get(side)) for side in sides)
        lines.append(f"| {row['cell']} | {_size(row)} | {row['threads']} | {cells} |")
    return lines


def _spread(samples: Sequence[float] | None) -> str:
    if not samples:
        return "—"
    if len(samples) < 2:
        return f"{samples[0]:.4g}"
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def first_table(report: Report) -> list[str]:
    """Import and first result."""
    lines = ["| | seconds | most memory, MiB | installed, MiB |", "|---|---|---|---|"]
    for side, found in report["first"].items():
        seconds = statistics.median(found["seconds"])
        size = report["sizes"].get(side, "—")
        lines.append(f"| {HEADS[side]} | {seconds:.2f} | {found['MiB']} | {size} |")
    return lines


# -- the README


def readme_section(reports: Sequence[Report]) -> str:
    """What stands between the README's marks."""
    return "\n\n".join(map(_machine_section, reports)) or NO_RUN


def _machine_section(report: Report) -> str:
    rows, versions = report["rows"], report["versions"]
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"**{report['machine']['name']}**, {report['date']}, commit {report['commit'][:8]}; "
        f"{libraries}. Milliseconds of one call in float32, medians.",
    ]
    for work in (FORWARD, BOTH):
        lines += ["", f"One GRU, {work}:", "", *_median_table(rows, work)]
    lines += ["", *_mean_table(rows), "", "One step, microseconds:", "", *_step_table(rows)]
    lines += ["", "Import and first result of a GRU, a process each:", "", *first_table(report)]
    found = bars(rows, report["first"])
    lines += ["", f"Of the {len(found)} bars of the report {sum(b.met for b in found)} are met."]
    return "\n".join(lines)


def _median_table(rows: Sequence[Row], work: str) -> list[str]:
    mine = [row for row in rows if (row["cell"], row["work"]) == ("gru", work)]
    sides = [side for side in SIDES if any(row["us"].get(side) for row in mine)]
    head = "| T, N, I, H | threads | " + " | ".join(HEADS[side] for side in sides) + " |"
    lines = [head, "|---|---|" + "---|" * len(sides)]
    for row in sorted(mine, key=lambda row: row["threads"]):
        cells = " | ".join(_median(row["us"].get(side), 1e-3) for side in sides)
        lines.append(f"| {_size(row)} | {row['threads']} | {cells} |")
    return lines


def _step_table(rows: Sequence[Row]) -> list[str]:
    mine = [row for row in rows if row["work"] == STEP]
    sides = [side for side in SIDES if any(row["us"].get(side) for row in mine)]
    head = "| | N, I, H | " + " | ".join(HEADS[side] for side in sides) + " |"
    lines = [head, "|---|---|" + "---|" * len(sides)]
    for row in mine:
        cells = " | ".join(_median(row["us"].get(side), 1.0) for side in sides)
        lines.append(f"| {row['cell']} | {row['N']}, {row['I']}, {row['H']} | {cells} |")
    return lines


def _median(samples: Sequence[float] | None, unit: float) -> str:
    return f"{unit * statistics.median(samples):#.3g}".rstrip(".") if samples else "—"


def _mean_table(rows: Sequence[Row]) -> list[str]:
    """Ratios over the shapes: the geometric mean, the least and the most."""
    lines = [
        "The other's time by that of xprnn with Numba, over all shapes: geometric mean, least and "
        "most.",
        "",
        "| cell | | threads | torch | ONNX Runtime | JAX |",
        "|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys([(r["cell"], r["work"], r["threads"]) for r in rows if r["work"] != STEP])
    for cell, work, threads in kinds:
        mine = [r for r in rows if (r["cell"], r["work"], r["threads"]) == (cell, work, threads)]
        cells = [_range(mine, peer) for peer in ("torch", "onnxruntime", "jax")]
        lines.append(f"| {cell} | {work} | {threads} | " + " | ".join(cells) + " |")
    return lines


def _range(rows: Sequence[Row], peer: str) -> str:
    ratios = [r for row in rows if (r := ratio(row, "numba", peer))]
    if len(ratios) != len(SHAPES):
        return "—"
    return f"{geometric(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
