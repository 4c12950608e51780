"""xprnn beside torch, ONNX Runtime and JAX on a CPU, with the products alone beside them.

    python -m benchmarks.cpu_report [--out FOLDER]
    python -m benchmarks.cpu_report --cells gru --shapes 128,1,32,32 --threads 1 --works forward \
--sides numba torch --rounds 5
    python -m benchmarks.cpu_report --readme

The first measures all, in some fifteen minutes on two cores, and writes cpu.json and cpu.md to
FOLDER, by default benchmarks/results/<machine>/. The second measures a part, and writes nothing
unless --out says where. The third writes the README's section from the reports that are filed.

Each library is a process of its own, held to the threads; all first have to find what xprnn's plain
code finds, and are then timed in turns. A line a call gives microseconds, medians of the rounds;
at the end stands which bars are met.

Exit status: 0 all is right, 1 a library found something else, 2 it cannot be measured or written.
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

from .filing import processor, versions
from .reports import check_writable, read_all, slug, write_section

# `cpu/` has no __init__.py, and is imported in functions only: asv imports all that it finds
# here beside versions of xprnn that are older than what `cpu/` needs.

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS = ("numpy", "numba", "torch", "onnxruntime", "jax")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        if options.readme:
            write_readme(ROOT / "README.md", RESULTS)
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
    for name in ("cells", "works", "sides"):
        choices = getattr(problems, name.upper())
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=problems.SHAPES)
    every = tuple(sorted({1, problems.all_threads()}))
    parser.add_argument("--threads", nargs="+", type=int, default=every)
    parser.add_argument("--rounds", type=int, default=7, help="of samples; 7")
    parser.add_argument("--first", type=int, help="rounds of first results; 5, of a part 0")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="write the README's section instead")
    options = parser.parse_args(arguments)
    parts = ("cells", "works", "sides", "shapes", "threads", "rounds")
    options.whole = all(getattr(options, name) == parser.get_default(name) for name in parts)
    if options.first is None:
        options.first = 5 if options.whole else 0
    return options


def _shape(text: str) -> tuple[int, ...]:
    T, N, width, H = map(int, text.split(","))
    return T, N, width, H


def measured_report(options: argparse.Namespace) -> dict[str, Any]:
    """Compare, time, write and say which bars are met: the report."""
    from .cpu import files
    from .cpu.bars import bars
    from .cpu.first import first_results, installed_sizes
    from .cpu.problems import all_threads
    from .cpu.turns import missing

    started = time.monotonic()
    machine = {
        "name": f"{processor()}, {all_threads()} cores",
        "system": platform.system(),
        "python": platform.python_version(),
    }
    folder = options.out
    if folder is None and options.whole:
        folder = RESULTS / slug(machine["name"])
    if folder is not None:
        check_writable(folder)
    absent = missing(options.sides)
    sides = [side for side in options.sides if side not in absent]
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions(VERSIONS),
        "absent": absent,
        "rows": [*measured(options, sides)],
        "first": first_results(sides, options.first) if options.first else {},
        "sizes": installed_sizes(sides),
    }
    report |= {"seconds": round(time.monotonic() - started, 1), **_sources()}
    print("\n".join(files.bar_table(bars(report["rows"], report["first"]))))
    print(f"{len(report['rows'])} calls in {report['seconds']:.0f} s")
    if folder is not None:
        print(f"written: {files.write(report, folder)}")
    return report


def _sources() -> dict[str, str]:
    """Which code ran; late, because it imports NumPy, and first results start from here."""
    from tests.support.machine import commit, digest

    return {"commit": commit(ROOT), "sources": digest(ROOT / "xprnn")}


def measured(options: argparse.Namespace, sides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows, thread count by thread count; steps on one thread alone."""
    from .cpu.problems import STEP, STEP_SHAPE, Problem
    from .cpu.turns import clients, timed

    layers = [work for work in options.works if work != STEP]
    for threads in options.threads:
        tasks = [(shape, layers) for shape in options.shapes if layers]
        if STEP in options.works and threads == 1:
            tasks.append((STEP_SHAPE, [STEP]))
        with clients(sides, threads) as found:
            for cell in options.cells:
                for shape, works in tasks:
                    rows = timed(Problem(cell, *shape), works, found, threads, options.rounds)
                    for row in rows:
                        print(f"{_name(row)}: {_times(row)}", flush=True)
                    yield from rows


def _name(row: dict[str, Any]) -> str:
    from .cpu.bars import place

    return place(row)


def _times(row: dict[str, Any]) -> str:
    times = [f"{side} {statistics.median(found):.4g}" for side, found in row["us"].items()]
    return ", ".join([*times, *[f"{side}: {why}" for side, why in row["not_timed"].items()]])


def write_readme(readme: Path, results: Path) -> None:
    """Write the README's section from the reports below `results`."""
    from .cpu import files

    reports = read_all(results, files.NAME, files.check_report)
    write_section(readme, files.MARKS, files.readme_section(reports))


if __name__ == "__main__":
    from xprnn.output import standard_output

    with standard_output():
        sys.exit(main())
