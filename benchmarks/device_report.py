"""xprnn beside torch's cuDNN on a GPU: first right, then timed, with the floor beside both.

    python -m benchmarks.device_report [--limit SECONDS] [--out FOLDER]
    python -m benchmarks.device_report --readme

The first takes the calls of the grid one by one. It compares each of xprnn's kernels that can serve
a call with float64 on the CPU: all results and gradients, at the same N and H over three steps; the
steps of a stepper through three layers, four of them; and stacks of two to four layers forward, in
a wave and layer by layer. What is wrong gets no time. What is right and torch are timed in turns,
at full length, after their results have been found alike. After each call report.json and report.md
are written to FOLDER, by default benchmarks/results/<device>/, so that they are there however the
run ends; what is not reached within the time limit is in them as such. A line a call says what it
is at. The second writes the README's table from all reports that are filed.

xprnn's float16 and bfloat16 are mixed precision, float32 outside, torch's are half layers; TF32 is
off in both for float32 and on in both for tf32. Times are those between CUDA events.

Exit status: 0 all is right, 1 something is wrong, 2 it cannot be measured or written here.
Needs CuPy, torch with CUDA and ml_dtypes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .reports import check_writable, slug, write_section

# `device/` has no __init__.py, and is imported in functions only: asv imports all that it finds
# here beside versions of xprnn that are older than what `device/` needs.

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 440.0  # seconds after which no further call is begun


class RefusedError(Exception):
    """It cannot be measured or written here; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        if options.readme:
            if options.out:
                raise RefusedError("--out is for what is measured: --readme writes README.md alone")
            write_readme(ROOT / "README.md", RESULTS)
            return 0
        backend = usable_backend()
        report = measured_report(backend, options.out, limit=options.limit)
    except RefusedError as error:
        print(f"device_report: {error}", file=sys.stderr)
        return 2
    wrong = [row for row in report["rows"] if row["wrong"]]
    for row in wrong:
        print(f"device_report: wrong: {_name(row)}: {row['wrong']}", file=sys.stderr)
    return 1 if wrong else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--readme", action="store_true", help="write the README's table instead")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=_seconds, metavar="SECONDS", default=LIMIT)
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse says what came where this is no number
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return seconds


def usable_backend() -> Any:
    """The backend "cupy" beside a torch with CUDA; RefusedError says what is missing."""
    import xprnn

    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        raise RefusedError(f"no GPU to measure on: {error}") from error
    for name in ("torch", "ml_dtypes"):
        try:
            __import__(name)
        except ImportError as error:
            raise RefusedError(f"{name} cannot be imported: {error}") from error
    import torch

    if not torch.cuda.is_available():
        raise RefusedError(f"torch {torch.__version__} has no usable CUDA device to compare with")
    return backend


def measured_report(
    backend: Any,
    folder: Path | None,
    grid: dict[str, Any] | None = None,
    limit: float = LIMIT,
    **sizes: int,
) -> dict[str, Any]:
    """Compare and time, and write after each call: the whole report.

    :param grid: of `problems`; `sizes` are those of `measure_ceilings`.
    :param limit: seconds after which no further call is begun.
    """
    from tests.support.machine import commit, describe_device, digest, versions

    from .device import files

    started = time.monotonic()
    on_cpu = {"name": backend.describe(), "driver": "none"}  # as the tests run it
    device = (describe_device() if backend.kernels else None) or on_cpu
    folder = folder or RESULTS / slug(device["name"])
    with _writing(folder):
        check_writable(folder)
    run = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(ROOT),
        "sources": digest(ROOT / "xprnn"),
        "device": device,
        "versions": versions(),
    }
    late = f"not reached in {limit:g} s"
    for found in measured(backend, started + limit, late, grid or {}, sizes):
        report = {**run, "seconds": round(time.monotonic() - started, 1), **found}
        with _writing(folder):
            path = files.write(report, folder)
    print(f"written: {path}")
    return report


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RefusedError(f"--out {folder}: cannot be written: {error.strerror}") from error


def measured(
    backend: Any, end: float, late: str, grid: dict[str, Any], sizes: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """The report's "ceilings", "rows" and "absent", before the first call and after each.

    :param end: the time after which no call is begun; the rows of the others say `late`.
    """
    from .device import rows, stacks, steps
    from .device.ceilings import measure_ceilings
    from .device.problems import StackProblem, StepProblem, everything

    kinds = {StepProblem: steps, StackProblem: stacks}
    work = [(kinds.get(type(p), rows), p) for p in everything(**grid)]
    ceilings = measure_ceilings(backend, tuple({p.dtype: 0 for _, p in work}), **sizes)
    found = [_untimed(kind, problem, backend, late) for kind, problem in work]
    absent: list[Any] = []

    def so_far() -> dict[str, Any]:
        every = [row for rows_of_one in found for row in rows_of_one]
        return {"ceilings": ceilings._asdict(), "rows": every, "absent": absent}

    yield so_far()
    for at, (kind, problem) in enumerate(work):
        if time.monotonic() > end:
            return
        try:
            found[at], missing = kind.compared(problem, backend)
            absent += missing
            print(f"compared {problem}: {_errors(found[at])}", flush=True)
            kind.timed(problem, found[at], backend, ceilings)
            print(f"timed {problem}: {_times(found[at])}", flush=True)
        except RuntimeError:
            if not refused_by(backend):
                raise
        if lost := refused_by(backend):
            lost = f"CUDA refuses every call since {problem}: {lost}"
            found[at] = _untimed(kind, problem, backend, lost, wrong=lost)
            found[at + 1 :] = [_untimed(*one, backend, lost) for one in work[at + 1 :]]
            yield so_far()
            return
        yield so_far()


def _untimed(kind: Any, problem: Any, backend: Any, why: str, **facts: str) -> list[Any]:
    """The rows of a problem that has no times, and why."""
    from .device.rows import row_of

    each = [(what, name) for name in kind.candidates(backend) for what in problem.passes]
    return [row_of(problem, *one, not_timed=why, **facts) for one in each]


def refused_by(backend: Any) -> str:
    """What CUDA refuses every call with from now on, or "" if it does not."""
    from tests.support.machine import context_error
    from xprnn.backend.cupy import CupyBackend

    return context_error(backend.xp) if isinstance(backend, CupyBackend) else ""


def _name(row: dict[str, Any]) -> str:
    names = ("cell", "dtype", "direction", "layers", "N", "H", "T", "pass", "kernels")
    return " ".join([str(row[name]) for name in names])


def _errors(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join([f"{row['kernels']} {row['wrong'] or row['error']}" for row in rows])


def _times(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        [
            f"{row['kernels']} {row['pass']} "
            + (row["not_timed"] or f"{row['ours_us']:.0f} us, ratio {row['ratio']:.2f}")
            for row in rows
        ]
    )


def write_readme(readme: Path, results: Path) -> None:
    """Write the README's table from the reports below `results`."""
    from .device import files

    try:
        write_section(readme, files.MARKS, files.readme_section(files.read_all(results)))
    except (ValueError, OSError) as error:
        raise RefusedError(f"--readme: {error}") from error


if __name__ == "__main__":
    from xprnn.output import standard_output

    with standard_output():
        sys.exit(main())
