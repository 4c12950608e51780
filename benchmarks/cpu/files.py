"""The CPU report's files, `cpu.json` and `cpu.md`, and the tables of README and docs from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..reports import check_fields
from ..reports import write as write_texts
from .problems import BOTH, FORWARD, IMPLEMENTATIONS, SHAPES, STEP, STEP_SHAPE
from .thresholds import Check, call_name, evaluate, geometric, ratio

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
MARKS = (  # in README.md and docs/performance.md
    "<!-- speed on a CPU: `python -m benchmarks.cpu_report --docs` writes this -->",
    "<!-- end of speed on a CPU -->",
)
README_ROWS = (  # rows on one thread, with those in which a peer is faster
    ("gru", FORWARD, (128, 1, 32, 32)),
    ("gru", FORWARD, (64, 32, 256, 256)),
    ("gru", BOTH, (64, 32, 256, 256)),
    ("lstm", FORWARD, (128, 1, 128, 128)),
    ("lstm", FORWARD, (64, 32, 256, 256)),
    ("lstm", BOTH, (64, 32, 256, 256)),
    ("gru", STEP, STEP_SHAPE),
    ("lstm", STEP, STEP_SHAPE),
)
HEADS = {
    "numpy": "xprnn, NumPy",
    "numba": "xprnn, Numba",
    "torch": "torch",
    "onnxruntime": "ONNX Runtime",
    "jax": "JAX",
    "products": "products alone",
}
NO_RUN = "No run has been recorded."


# -- written


def check_report(report: Any) -> None:
    """Raise ValueError, naming the field, unless a report has the fields of `FIELDS` and `ROW`."""
    check_fields(report, FIELDS, "report")
    for number, row in enumerate(report["rows"]):
        check_fields(row, ROW, f"rows[{number}]")
        if set(row["us"]) & set(row["not_timed"]):
            raise ValueError(f"rows[{number}]: expected either times or a reason for having none")


def write(report: Report, folder: Path) -> Path:
    """Write both files, each atomically; returns the JSON file's path."""
    check_report(report)
    write_texts(folder, {NAME: json.dumps(report), "cpu.md": markdown(report)})
    return folder / NAME


# -- Markdown


def markdown(report: Report) -> str:
    """The complete report."""
    facts = ", ".join(f"{name} {fact}" for name, fact in report["machine"].items())
    lines = [
        f"# Speed on a CPU: {report['machine']['name']}, {report['date']}",
        "",
        f"- commit {report['commit']}; sha256 of the sources {report['sources'][:16]}",
        f"- {facts}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        f"- {len(report['rows'])} calls in {report['seconds']:.0f} s",
        *[f"- not available: {HEADS[name]}: {reason}" for name, reason in report["absent"].items()],
        *_reasons(report["rows"]),
        *_over_limit(report["rows"]),
        "",
        "## Acceptance thresholds",
        "",
        *threshold_table(evaluate(report["rows"], report["first"])),
    ]
    for work in dict.fromkeys([row["work"] for row in report["rows"]]):
        rows = [row for row in report["rows"] if row["work"] == work]
        lines += ["", f"## {work}", "", *_spread_table(rows)]
    if report["first"]:
        lines += ["", "## Import and first result", "", *first_table(report)]
    return "\n".join(lines)


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Why calls have no times."""
    for row in rows:
        for name, reason in row["not_timed"].items():
            yield f"- not timed: {call_name(row)}, {HEADS[name]}: {reason}"


def _over_limit(rows: Sequence[Row]) -> Iterator[str]:
    """Implementations that used more cores than their number of threads."""
    for row in rows:
        for name, cores in row["cores"].items():
            if cores > row["threads"] + 0.1:
                used = f"{HEADS[name]} used {cores} cores, limit {row['threads']}"
                yield f"- thread limit exceeded: {call_name(row)}, {used}"


def _size(row: Row) -> str:
    return ", ".join([str(row[name]) for name in "TNIH"])


def threshold_table(checks: Sequence[Check]) -> list[str]:
    """Each threshold, failed ones first."""
    head = f"{sum(check.passed for check in checks)} of {len(checks)} passed."
    lines = [head, "", "| | call | threshold | measured |", "|---|---|---|---|"]
    for check in sorted(checks, key=lambda check: check.passed):
        verdict = "passed" if check.passed else "**failed**"
        lines.append(f"| {verdict} | {check.call} | {check.criterion} | {check.measured} |")
    return lines


def _spread_table(rows: Sequence[Row]) -> list[str]:
    """Medians with quartiles, in microseconds."""
    names = _timed(rows)
    lines = [
        "Microseconds: medians of the rounds, with quartiles.",
        "",
        "| cell | T, N, I, H | threads | " + " | ".join(HEADS[name] for name in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = " | ".join(_spread(row["us"].get(name)) for name in names)
        lines.append(f"| {row['cell']} | {_size(row)} | {row['threads']} | {cells} |")
    return lines


def _timed(rows: Sequence[Row]) -> list[str]:
    """The implementations that have a time in one of the rows."""
    return [name for name in IMPLEMENTATIONS if any(row["us"].get(name) for row in rows)]


def _spread(samples: Sequence[float] | None) -> str:
    if not samples:
        return "—"
    if len(samples) < 2:
        return f"{samples[0]:.4g}"
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return f"{middle:.4g} ({low:.4g} to {high:.4g})"


def first_table(report: Report) -> list[str]:
    """Import and first result."""
    lines = ["| | seconds | peak memory, MiB | installed, MiB |", "|---|---|---|---|"]
    for name, measured in report["first"].items():
        seconds = statistics.median(measured["seconds"])
        size = report["sizes"].get(name, "—")
        lines.append(f"| {HEADS[name]} | {seconds:.2f} | {measured['MiB']} | {size} |")
    return lines


# -- README and docs


def readme_table(reports: Sequence[Report]) -> str:
    """The table between the README's marks: a few rows of each report."""
    return "\n\n".join(map(_few_rows, reports)) or NO_RUN


def _few_rows(report: Report) -> str:
    names = ("numba", "numpy", "torch", "onnxruntime")
    by_call = {
        (row["cell"], row["work"], tuple(row[name] for name in "TNIH")): row
        for row in report["rows"]
        if row["threads"] == 1
    }
    lines = [
        f"Milliseconds of a call in float32 on one thread of an {report['machine']['name']}, "
        f"{report['date']}, medians:",
        "",
        "| | T, N, I, H | " + " | ".join(HEADS[name] for name in names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for cell, work, shape in README_ROWS:
        if row := by_call.get((cell, work, shape)):
            times = " | ".join(_median(row["us"].get(name), 1e-3) for name in names)
            lines.append(f"| {cell.upper()}, {work} | {_size(row)} | {times} |")
    return "\n".join(lines)


def docs_section(reports: Sequence[Report]) -> str:
    """The text between the marks of docs/performance.md."""
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
    lines += ["", "Import and first result of a GRU, each in a new process:", ""]
    lines += first_table(report)
    checks = evaluate(rows, report["first"])
    passed = sum(check.passed for check in checks)
    lines += ["", f"{passed} of the report's {len(checks)} acceptance thresholds passed."]
    return "\n".join(lines)


def _median_table(rows: Sequence[Row], work: str) -> list[str]:
    of_work = [row for row in rows if (row["cell"], row["work"]) == ("gru", work)]
    names = _timed(of_work)
    head = "| T, N, I, H | threads | " + " | ".join(HEADS[name] for name in names) + " |"
    lines = [head, "|---|---|" + "---|" * len(names)]
    for row in sorted(of_work, key=lambda row: row["threads"]):
        cells = " | ".join(_median(row["us"].get(name), 1e-3) for name in names)
        lines.append(f"| {_size(row)} | {row['threads']} | {cells} |")
    return lines


def _step_table(rows: Sequence[Row]) -> list[str]:
    steps = [row for row in rows if row["work"] == STEP]
    names = _timed(steps)
    head = "| | N, I, H | " + " | ".join(HEADS[name] for name in names) + " |"
    lines = [head, "|---|---|" + "---|" * len(names)]
    for row in steps:
        cells = " | ".join(_median(row["us"].get(name), 1.0) for name in names)
        lines.append(f"| {row['cell']} | {row['N']}, {row['I']}, {row['H']} | {cells} |")
    return lines


def _median(samples: Sequence[float] | None, unit: float) -> str:
    return f"{unit * statistics.median(samples):#.3g}".rstrip(".") if samples else "—"


def _mean_table(rows: Sequence[Row]) -> list[str]:
    """Ratios over the shapes: geometric mean, minimum and maximum."""
    lines = [
        "Time of each library / time of xprnn with Numba, over all shapes: geometric mean, minimum "
        "and maximum.",
        "",
        "| cell | | threads | torch | ONNX Runtime | JAX |",
        "|---|---|---|---|---|---|",
    ]
    kinds = dict.fromkeys([(r["cell"], r["work"], r["threads"]) for r in rows if r["work"] != STEP])
    for cell, work, threads in kinds:
        of_kind = [r for r in rows if (r["cell"], r["work"], r["threads"]) == (cell, work, threads)]
        cells = [_range(of_kind, peer) for peer in ("torch", "onnxruntime", "jax")]
        lines.append(f"| {cell} | {work} | {threads} | " + " | ".join(cells) + " |")
    return lines


def _range(rows: Sequence[Row], peer: str) -> str:
    ratios = [r for row in rows if (r := ratio(row, "numba", peer))]
    if len(ratios) != len(SHAPES):
        return "—"
    return f"{geometric(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
