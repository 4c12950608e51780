"""Compare xprnn on a CPU with torch, ONNX Runtime, JAX and the matrix products alone.

    python -m benchmarks.cpu_report [--out FOLDER]
    python -m benchmarks.cpu_report --cells gru --shapes 128,1,32,32 --threads 1 --works forward \
--implementations numba torch --rounds 5
    python -m benchmarks.cpu_report --docs

The first measures everything, in about fifteen minutes on two cores, and writes cpu.json and cpu.md
to FOLDER, by default benchmarks/results/<machine>/. The second measures a part and writes files
only with --out. The third writes the tables of README.md and docs/performance.md from the recorded
reports.

Each implementation runs in its own process with a fixed number of threads. Its results are first
compared with those of xprnn's plain code; then all are timed in interleaved rounds. One line per
call gives the medians of the rounds in microseconds; the acceptance thresholds follow at the end.

Exit status: 0 all results agree, 1 some do not, 2 measuring or writing is not possible.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .reports import check_writable, read_all, slug, write_section
from .result_store import processor, versions

# `cpu/` has no __init__.py and is imported inside functions only: asv imports every module here,
# also with versions of xprnn that are too old for `cpu/`.

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = ("numpy", "numba", "torch", "onnxruntime", "jax")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        if options.docs:
            write_docs(ROOT, RESULTS)
            return 0
        report = measured_report(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"cpu_report: {error}", file=sys.stderr)
        return 2
    wrong = [row for row in report["rows"] if row["wrong"]]
    for row in wrong:
        print(f"cpu_report: wrong: {_name(row)}: {row['not_timed']}", file=sys.stderr)
    return 1 if wrong else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    from .cpu import problems

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_report", description=__doc__.splitlines()[0]
    )
    for names in (["--cells"], ["--works"], ["--implementations", "--sides"]):
        choices = getattr(problems, names[0][2:].upper())
        parser.add_argument(*names, nargs="+", choices=choices, default=choices)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=problems.SHAPES)
    every = tuple(sorted({1, problems.all_threads()}))
    parser.add_argument("--threads", nargs="+", type=int, default=every)
    parser.add_argument("--rounds", type=int, default=7, help="of samples; default 7")
    parser.add_argument(
        "--first", type=int, help="rounds of first results; default 5, or 0 for a partial report"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--docs", action="store_true", help="write the tables of README and docs instead"
    )
    options = parser.parse_args(arguments)
    parts = ("cells", "works", "implementations", "shapes", "threads", "rounds")
    options.complete = all(getattr(options, name) == parser.get_default(name) for name in parts)
    if options.first is None:
        options.first = 5 if options.complete else 0
    return options


def _shape(text: str) -> tuple[int, ...]:
    T, N, width, H = map(int, text.split(","))
    return T, N, width, H


def measured_report(options: argparse.Namespace) -> dict[str, Any]:
    """Compare results, time, write the files and print the acceptance thresholds."""
    from .cpu import files
    from .cpu.problems import all_threads
    from .cpu.rounds import missing
    from .cpu.startup import first_results, installed_sizes
    from .cpu.thresholds import evaluate

    started = time.monotonic()
    machine = {
        "name": f"{processor()}, {all_threads()} cores",
        "system": platform.system(),
        "python": platform.python_version(),
    }
    folder = options.out
    if folder is None and options.complete:
        folder = RESULTS / slug(machine["name"])
    if folder is not None:
        check_writable(folder)
    absent = missing(options.implementations)
    implementations = [name for name in options.implementations if name not in absent]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions(VERSIONS),
        "absent": absent,
        "rows": [*measured(options, implementations)],
        "first": first_results(implementations, options.first) if options.first else {},
        "sizes": installed_sizes(implementations),
    }
    report |= {"seconds": round(time.monotonic() - started, 1), **_sources()}
    print("\n".join(files.threshold_table(evaluate(report["rows"], report["first"]))))
    print(f"{len(report['rows'])} calls in {report['seconds']:.0f} s")
    if folder is not None:
        print(f"written: {files.write(report, folder)}")
    return report


def _sources() -> dict[str, str]:
    """The code that ran; called last, because it imports NumPy into the parent of the workers."""
    from tests.support.machine import commit, digest

    return {"commit": commit(ROOT), "sources": digest(ROOT / "xprnn")}


def measured(
    options: argparse.Namespace, implementations: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows by number of threads; steps on one thread only."""
    from .cpu.problems import STEP, STEP_SHAPE, Problem
    from .cpu.rounds import clients, timed

    layers = [work for work in options.works if work != STEP]
    for threads in options.threads:
        tasks = [(shape, layers) for shape in options.shapes if layers]
        if STEP in options.works and threads == 1:
            tasks.append((STEP_SHAPE, [STEP]))
        with clients(implementations, threads) as started:
            for cell in options.cells:
                for shape, works in tasks:
                    rows = timed(Problem(cell, *shape), works, started, threads, options.rounds)
                    for row in rows:
                        print(f"{_name(row)}: {_times(row)}", flush=True)
                    yield from rows


def _name(row: dict[str, Any]) -> str:
    from .cpu.thresholds import call_name

    return call_name(row)


def _times(row: dict[str, Any]) -> str:
    times = [f"{name} {statistics.median(samples):.4g}" for name, samples in row["us"].items()]
    reasons = [f"{name}: {reason}" for name, reason in row["not_timed"].items()]
    return ", ".join([*times, *reasons])


def write_docs(root: Path, results: Path) -> None:
    """Write the tables of README.md and docs/performance.md from the reports below `results`."""
    from .cpu import files

    reports = read_all(results, files.NAME, files.check_report)
    write_section(root / "README.md", files.MARKS, files.readme_table(reports))
    write_section(root / "docs" / "performance.md", files.MARKS, files.docs_section(reports))


if __name__ == "__main__":
    from xprnn.tools.output import standard_output

    with standard_output():
        sys.exit(main())
