"""The device report's files, `report.json` and `report.md`, and the table of docs/gpu.md from them.

"ceilings" and "floor" in the JSON file are the measured peaks and the roofline bounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..reports import check_fields
from ..reports import read_all as read_reports
from ..reports import with_section as with_marked_section
from ..reports import write as write_texts
from .problems import DTYPES, PASSES, STEP

Report = dict[str, Any]
Row = dict[str, Any]
NAME = "report.json"
OPTIONAL = type(None)
NUMBER, PAIR, TEXT = (float, OPTIONAL), (list, OPTIONAL), (str, OPTIONAL)
FIELDS: dict[str, tuple[type, ...]] = {  # of a report
    **dict.fromkeys(("date", "commit", "sources"), (str,)),
    **dict.fromkeys(("device", "versions", "ceilings"), (dict,)),
    **dict.fromkeys(("rows", "absent"), (list,)),
    "seconds": (float,),
}
ROW: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("cell", "dtype", "direction", "pass", "kernels", "wrong"), (str,)),
    **dict.fromkeys(("layers", "N", "H", "T"), (int,)),
    **dict.fromkeys(("error", "limit", "ours_us", "torch_us", "ratio", "floor_us"), NUMBER),
    **dict.fromkeys(("ours_quartiles_us", "torch_quartiles_us", "ratio_quartiles"), PAIR),
    **dict.fromkeys(("of", "floor_of", "not_timed"), TEXT),
}
MARKS = BEGIN, END = (
    "<!-- speed on GPUs: `python -m benchmarks.device_report --docs` writes this -->",
    "<!-- end of speed on GPUs -->",
)
CALL = (
    "direction",
    "cell",
    "dtype",
    "N",
    "H",
    "T",
    "pass",
    "kernels",
    "layers",
)  # identify a row
SHORT = {"pointwise": "pw", "sequence": "seq"}
NEAR = 1.5  # target for steps: at most this times their bound
NO_RUN = "No GPU run has been recorded yet, and nothing is claimed about speed on a GPU."


# -- read and written


def check_report(report: Any) -> None:
    """Raise ValueError, naming the field, unless a report has the fields of `FIELDS` and `ROW`."""
    check_fields(report, FIELDS, "report")
    for name in ("name", "driver"):
        if not isinstance(report["device"].get(name), str):
            raise ValueError(f"report: device: expected its {name}, got {report['device']}")
    for number, row in enumerate(report["rows"]):
        check_fields(row, ROW, f"rows[{number}]")
        if (row["ours_us"] is None) == (row["not_timed"] is None):
            raise ValueError(f"rows[{number}]: expected either times or a reason for having none")
        if row["wrong"] and row["ours_us"] is not None:
            raise ValueError(f"rows[{number}]: is wrong but has a time")


def write(report: Report, folder: Path) -> Path:
    """Write both files, each atomically; returns the JSON file's path."""
    check_report(report)
    write_texts(folder, {NAME: json.dumps(report, indent=1), "report.md": markdown(report)})
    return folder / NAME


def read_all(results: Path) -> list[Report]:
    """Every device's report below `results`; ValueError names an invalid file."""
    return read_reports(results, NAME, check_report)


# -- Markdown


def markdown(report: Report) -> str:
    """The complete report."""
    rates = report["ceilings"]["rates"]
    measured = [
        f"{dtype} products {rate / 1e12:.1f} T operations/s" for dtype, rate in rates.items()
    ]
    measured.append(f"copy {report['ceilings']['bandwidth'] / 1e9:.0f} GB/s")
    latencies = {"latency": "latency", "poll": "look", "launch": "launch"}
    for name, field in latencies.items():
        if seconds := report["ceilings"][field]:
            measured.append(f"{name} {1e9 * seconds:.0f} ns")
    lines = [
        f"# Speed on {report['device']['name']}, {report['date']}",
        "",
        *provenance(report),
        "- measured in this run: " + ", ".join(measured),
        f"- {len(report['rows'])} rows in {report['seconds']:.0f} s, "
        f"{sum(bool(row['wrong']) for row in report['rows'])} of them wrong",
        *_absences(report["absent"]),
        *_near(report["rows"]),
        "",
        "Microseconds per call, medians with quartiles; ratio: torch / xprnn, round by round. The "
        "roofline bound is explained in `benchmarks/device/bounds.py`. A step is one of a stepper, "
        "compared with one of stacked torch cells; graph: its single launch, replayed.",
        "",
        "| cell | type | N, H, T | pass | kernels | error (limit) | xprnn | torch | ratio | bound "
        "| xprnn / bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, report["rows"]),
        *_both_directions(report["rows"]),
        *_wavefronts(report["rows"]),
    ]
    return "\n".join(lines)


def provenance(report: Report) -> list[str]:
    """Commit, device and versions."""
    facts = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in report["device"].items())
    return [
        f"- commit {report['commit']}; sha256 of the sources {report['sources'][:16]}",
        f"- {facts}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]


def _absences(absent: Iterable[Row]) -> list[str]:
    by_reason: dict[str, set[str]] = {}
    for one in absent:
        key = f"{one['kernels']}: {one['reason']}"
        by_reason.setdefault(key, set()).add(f"{one['cell']} {one['dtype']}")
    return [f"- not available, {', '.join(sorted(c))}: {key}" for key, c in by_reason.items()]


def _near(rows: Sequence[Row]) -> list[str]:
    """The number of steps whose fastest implementation is near its bound."""
    least: dict[tuple[Any, ...], float] = {}
    for row in rows:
        if row["pass"] == STEP and row["ours_us"]:
            call = row["cell"], row["dtype"], row["N"], row["H"]
            times = row["ours_us"] / row["floor_us"]
            least[call] = min(times, least.get(call, times))
    near = sum(times <= NEAR for times in least.values())
    return [f"- steps within {NEAR} times their bound: {near} of {len(least)}"] if least else []


def _both_directions(rows: Sequence[Row]) -> list[str]:
    """A table that compares both directions in one call with sequential calls, where timed."""
    times = {tuple(row[name] for name in CALL): row["ours_us"] for row in rows}
    lines = []
    for row in rows:
        call = tuple(row[name] for name in CALL)
        single = times.get(("forward", *call[1:]))
        if row["direction"] == "both" and row["ours_us"] and single:
            cells = *call[1:3], ", ".join(map(str, call[3:6])), *call[6:8]
            lines.append(f"| {' | '.join(cells)} | {2 * single / row['ours_us']:.2f} |")
    head = "Both directions: twice the time of one direction / time of a bidirectional layer."
    columns = "| cell | type | N, H, T | pass | kernels | ratio |", "|---|---|---|---|---|---|"
    return ["", head, "", *columns, *lines] if lines else []


def _wavefronts(rows: Sequence[Row]) -> list[str]:
    """A table that compares stacks as a wavefront with layer by layer, where both are timed."""
    times = {tuple(row[name] for name in CALL): row["ours_us"] for row in rows}
    ratios = {}
    for call, ours in times.items():
        layerwise = times.get((*call[:7], "sequence", call[8]))
        if call[7] == "wave" and ours and layerwise:
            ratios[call] = layerwise / ours
    lines = [
        f"| {cell} | {dtype} | {N}, {H}, {T} | {layers} | {ratio:.2f} |"
        for (_, cell, dtype, N, H, T, _, _, layers), ratio in ratios.items()
    ]
    faster = sum(ratio > 1 for ratio in ratios.values())
    head = (
        "Layers in a wavefront: layer-by-layer time / wavefront time; "
        f"faster in {faster} of {len(lines)}."
    )
    columns = "| cell | type | N, H, T | layers | ratio |", "|---|---|---|---|---|"
    return ["", head, "", *columns, *lines] if lines else []


def _line(row: Row) -> str:
    size = f"{row['N']}, {row['H']}, {row['T']}"
    error = "" if row["error"] is None else f"{row['error']:.1e} ({row['limit']:.1e})"
    head = f"| {_kind(row)} | {row['dtype']} | {size} | {row['pass']} | {row['kernels']} | {error} "
    if row["ours_us"] is None:
        return head + f"| {'**' + row['wrong'] + '**' if row['wrong'] else row['not_timed']} |||||"
    return head + (
        f"| {_spread(row['ours_us'], row['ours_quartiles_us'], '.1f')} "
        f"| {_spread(row['torch_us'], row['torch_quartiles_us'], '.1f')} "
        f"| {_spread(row['ratio'], row['ratio_quartiles'], '.2f')} "
        f"| {row['floor_us']:.1f}, {row['floor_of']} | {row['ours_us'] / row['floor_us']:.2f} |"
    )


def _kind(row: Row) -> str:
    stack = f", {row['layers']} layers" if row["layers"] > 1 else ""
    if row["pass"] == STEP:
        stack = f", step of {row['layers']} layers"
    return row["cell"] + stack + ", both directions" * (row["direction"] == "both")


def _spread(middle: float, quartiles: Sequence[float], form: str) -> str:
    low, high = quartiles
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


# -- docs/gpu.md


def docs_section(reports: Sequence[Report]) -> str:
    """The text between the page's marks."""
    if not reports:
        return NO_RUN
    return "\n\n".join(_device_table(report) for report in reports)


def _device_table(report: Report) -> str:
    by_call: dict[tuple[str, str], dict[tuple[str, str], list[Row]]] = {}
    for row in report["rows"]:
        call = _kind(row), f"{row['N']}, {row['H']}, {row['T']}"
        by_call.setdefault(call, {}).setdefault((row["dtype"], row["pass"]), []).append(row)
    lines = [
        f"**{report['device']['name']}**, driver {report['device']['driver']}, "
        f"torch {report['versions'].get('torch', 'unknown')}, {report['date']}, commit "
        f"{report['commit'][:8]}: torch's time / xprnn's, forward / forward and backward, for "
        "stacks forward only, for a stepper's step with torch's cells, with the fastest of "
        "xprnn's kernels (pw: pointwise; seq: sequence; wave: a stack in one launch, with "
        "`XPRNN_KERNELS`; graph: a step in one launch, replayed).",
        "",
        "| cell | N, H, T | " + " | ".join(DTYPES) + " |",
        "|---|---|" + "---|" * len(DTYPES),
    ]
    for (cell, size), rows in by_call.items():
        first = next(iter(rows.values()))[0]
        passes = (first["pass"],) if first["layers"] > 1 else PASSES
        entries = [
            " / ".join(_entry(rows.get((dtype, what), [])) for what in passes) for dtype in DTYPES
        ]
        lines.append(f"| {cell} | {size} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _entry(rows: Sequence[Row]) -> str:
    """The ratio of the fastest; a wrong result is never hidden by a correct one."""
    if any(row["wrong"] for row in rows):
        return "wrong"
    timed = [row for row in rows if row["ratio"] is not None]
    if not timed:
        return "—"
    best = max(timed, key=lambda row: row["ratio"])
    return f"{best['ratio']:.2f} {SHORT.get(best['kernels'], best['kernels'])}"


def with_section(page: str, section: str) -> str:
    """The page with `section` between the marks; ValueError unless it has each mark once."""
    return with_marked_section(page, MARKS, section)
