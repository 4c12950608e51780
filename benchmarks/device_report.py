"""Compare xprnn with torch's cuDNN on a GPU: correctness first, then times and roofline bounds.

    python -m benchmarks.device_report [--limit SECONDS] [--out FOLDER]
    python -m benchmarks.device_report --docs

The first processes the calls of the grid one by one. Each of xprnn's kernels that supports a call
is compared with float64 on the CPU: all results and gradients, with the same N and H over three
steps; four steps of a stepper of three layers; and stacks of two to four layers forward, as a
wavefront and layer by layer. Wrong kernels are not timed. The others and torch are timed at full
length in interleaved rounds, after their results have been compared. report.json and report.md in
FOLDER, by default benchmarks/results/<device>/, are written after each call, so that an aborted run
leaves its results; calls not reached within the time limit are marked. One line per call shows the
progress. The second writes the table of docs/gpu.md from all recorded reports.

xprnn's float16 and bfloat16 are mixed precision with float32 inputs and results, torch's are half
layers; TF32 is off in both for float32 and on in both for tf32. Times are measured with CUDA
events.

Exit status: 0 all results are correct, 1 some are wrong, 2 measuring or writing is not possible.
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

# `device/` has no __init__.py and is imported inside functions only: asv imports every module here,
# also with versions of xprnn that are too old for `device/`.

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 440.0  # seconds after which no new call begins


class RefusedError(Exception):
    """The report cannot be measured or written here; the message gives the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        if options.docs:
            if options.out:
                raise RefusedError("--out applies to measurements: --docs writes docs/gpu.md only")
            write_docs(ROOT / "docs" / "gpu.md", RESULTS)
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
    parser.add_argument(
        "--docs", action="store_true", help="write the table of docs/gpu.md instead"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=_seconds, metavar="SECONDS", default=LIMIT)
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    seconds = float(text)  # argparse reports a ValueError
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text}")
    return seconds


def usable_backend() -> Any:
    """The backend "cupy"; RefusedError if it or torch with CUDA is missing."""
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
    """Compare and time all calls and write the files after each; returns the complete report.

    :param grid: arguments of `problems.everything`; `sizes` are those of `measure_peaks`.
    :param limit: seconds after which no new call begins.
    """
    from tests.support.machine import commit, describe_device, digest, versions

    from .device import files

    started = time.monotonic()
    on_cpu = {"name": backend.describe(), "driver": "none"}  # in tests
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
    for results in measured(backend, started + limit, late, grid or {}, sizes):
        report = {**run, "seconds": round(time.monotonic() - started, 1), **results}
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

    :param end: the time after which no call begins; the remaining rows have the reason `late`.
    """
    from .device import rows, stacks, steps
    from .device.peaks import measure_peaks
    from .device.problems import StackProblem, StepProblem, everything

    kinds = {StepProblem: steps, StackProblem: stacks}
    work = [(kinds.get(type(p), rows), p) for p in everything(**grid)]
    peaks = measure_peaks(backend, tuple({p.dtype: 0 for _, p in work}), **sizes)
    by_call = [_untimed(kind, problem, backend, late) for kind, problem in work]
    absent: list[Any] = []

    def current() -> dict[str, Any]:
        every = [row for rows_of_call in by_call for row in rows_of_call]
        return {"ceilings": peaks.as_json(), "rows": every, "absent": absent}

    yield current()
    for k, (kind, problem) in enumerate(work):
        if time.monotonic() > end:
            return
        try:
            by_call[k], missing = kind.compared(problem, backend)
            absent += missing
            print(f"compared {problem}: {_errors(by_call[k])}", flush=True)
            kind.timed(problem, by_call[k], backend, peaks)
            print(f"timed {problem}: {_times(by_call[k])}", flush=True)
        except RuntimeError:
            if not refused_by(backend):
                raise
        if lost := refused_by(backend):
            lost = f"CUDA refuses every call since {problem}: {lost}"
            by_call[k] = _untimed(kind, problem, backend, lost, wrong=lost)
            by_call[k + 1 :] = [_untimed(*one, backend, lost) for one in work[k + 1 :]]
            yield current()
            return
        yield current()


def _untimed(kind: Any, problem: Any, backend: Any, reason: str, **facts: str) -> list[Any]:
    """The rows of a problem without times, with the reason."""
    from .device.rows import row_of

    each = [(what, name) for name in kind.candidates(backend) for what in problem.passes]
    return [row_of(problem, *one, not_timed=reason, **facts) for one in each]


def refused_by(backend: Any) -> str:
    """The error of a CUDA context in which every call fails, or ""."""
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


def write_docs(page: Path, results: Path) -> None:
    """Write the table of docs/gpu.md from the reports below `results`."""
    from .device import files

    try:
        write_section(page, files.MARKS, files.docs_section(files.read_all(results)))
    except (ValueError, OSError) as error:
        raise RefusedError(f"--docs: {error}") from error


if __name__ == "__main__":
    from xprnn.tools.output import standard_output

    with standard_output():
        sys.exit(main())
