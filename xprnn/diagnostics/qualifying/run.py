"""A qualification: comparison and timing of all implementations, its file and its report."""

from __future__ import annotations

import hashlib
import os
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

from ...backend import BackendName, BackendUnavailableError
from ...backend.exports import exported_from
from ...kernels import IMPLEMENTATIONS, forget_plans
from ...kernels import qualification as files
from ...kernels.qualification import Qualification, Row
from ...nn.serialization import replacing
from ..verification.suite import LAYERS
from . import grid as grids
from .grid import Case, Grid
from .processes import ANSWERED, COMMAND, TIMED_OUT, Answer, Request, Workers
from .report import QualifyReport
from .timing import least_bytes, multiply_adds

Progress = Callable[[int, int, float], None]  # tasks done, their total, seconds left at most


@dataclass(frozen=True)
class Limits:
    """Times in seconds."""

    total: float
    comparing: float  # of the total
    start: float = 60.0  # of a worker and of its first answer
    compare: float = 45.0  # of a request, including compilation
    sample: float = 15.0


LIMITS = {  # by whether it is a GPU, and whether it is quick
    (False, False): Limits(115.0, 60.0),
    (False, True): Limits(57.0, 32.0),
    (True, False): Limits(170.0, 100.0),
    (True, True): Limits(57.0, 35.0),
}
ROUNDS = 5
MIN_ROUNDS = 3  # with fewer, the rows are not timed
PAUSE = 0.03  # seconds before a worker's turn: idle threads of another's BLAS go to sleep
ITEMSIZES = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
MAX_DETAIL = 300
SPACE = 1 << 20  # bytes that must be free on the disk


@exported_from("xprnn")
def qualify(
    backend: BackendName | None = None,
    cells: Collection[str] | None = None,
    *,
    quick: bool = False,
    output: str | os.PathLike[str] | None = None,
    share: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QualifyReport:
    """Compare and time all kernels on this machine; "auto" then selects by the result.

    Each implementation (plain code, pointwise kernels, sequence kernels) runs in a process of its
    own. Each cell, type, pass and shape of a grid is first compared with the float64 equations: all
    results and gradients by value, rows of different length, both directions, the bits of repeated
    and of simultaneous calls, NaN and infinity. What was right is timed, in turns. A process that
    does not answer is killed and one that ends is replaced; both cost a row. It takes less than two
    minutes on a CPU and three on a GPU.

    The result is a small JSON file, from which `xprnn` selects implementations from then on. It is
    written to the user's cache folder, or to `output`, which `XPRNN_QUALIFIED` can name.

    :param backend: as for `get_backend`.
    :param cells: names as `xprnn qualify --cell` accepts; None: all.
    :param quick: less than a minute, with fewer types and shapes.
    :param output: the path of the file; None: in the user's cache folder.
    :param share: a folder for a copy of the file, and a table of it in Markdown. They have no name
        of a host, user or folder.
    :param progress: called with the number of tasks done, their total, and the seconds left at
        most.
    :return: a report whose `str` is a table; `ok` is True if no kernel failed.
    :raises ValueError: an argument is invalid, or there is no folder for the file.
    :raises BackendUnavailableError: the backend cannot be used.
    :raises OSError: the file cannot be written; this is checked before the measurement.
    """
    check_outputs(output, share)
    report = measure(backend, cells, quick=quick, progress=progress)
    return write(report, output, share)


def measure(
    backend: str | None = None,
    cells: Collection[str] | None = None,
    *,
    quick: bool = False,
    progress: Progress | None = None,
    grid: Sequence[Grid] | None = None,
    limits: Limits | None = None,
    command: Sequence[str] = COMMAND,
) -> QualifyReport:
    """The report of a qualification, without a file.

    :param grid: None: that of the backend.
    :param limits: likewise.
    :param command: of a worker.
    """
    unknown = {*(cells or ())} - LAYERS.keys()
    if unknown:
        raise ValueError(f"cells: expected names of {', '.join(LAYERS)}; got {sorted(unknown)}")
    start = time.monotonic()
    with Workers(requested_backend(backend), IMPLEMENTATIONS, command) as workers:
        first = workers.ask(IMPLEMENTATIONS[0], Request("describe", (), 120.0))
        if first.outcome != ANSWERED:
            raise _unavailable(first)
        here = first.value
        if "unsupported" in here:
            return QualifyReport(here["backend"], None, here["unsupported"], {}, 0)
        if grid is None:
            grid = {
                (False, False): grids.CPU,
                (False, True): grids.CPU_QUICK,
                (True, False): grids.GPU,
                (True, True): grids.GPU_QUICK,
            }[here["gpu"], quick]
        limits = limits or LIMITS[here["gpu"], quick]
        names = [name for name in LAYERS if cells is None or name in cells]
        cases = [case for part in grid for case in part.cases(names, here["dtypes"])]
        run = Run(workers, cases, limits, start, progress)
        rows = run.rows()
        return QualifyReport(
            here["backend"],
            Qualification(
                here["identity"],
                {**here["facts"], "kernels": here["kernels"]},
                date.today().isoformat(),
                round(time.monotonic() - start, 1),
                run.settings(),
                tuple(rows),
            ),
            "",
            run.defaults,
            len(cases) * len(IMPLEMENTATIONS) - len(rows),
        )


def requested_backend(name: str | None) -> str:
    """The name that a worker opens: the argument, or that of `use_backend` or the environment."""
    from ...backend.registry import requested_name

    return requested_name(name)


def _unavailable(answer: Answer) -> Exception:
    kind, _, text = answer.detail.partition(": ")
    if kind == "BackendUnavailableError":
        return BackendUnavailableError(text)
    if kind == "ValueError":
        return ValueError(text)
    return RuntimeError(f"a worker process {answer.outcome}: {answer.detail}")


Key = tuple[Case, str]  # a call and an implementation


class Run:
    """The measurement of cases by workers."""

    def __init__(
        self,
        workers: Workers,
        cases: Sequence[Case],
        limits: Limits,
        start: float,
        progress: Progress | None,
    ) -> None:
        self._workers, self._cases, self._limits = workers, cases, limits
        self._start, self._progress = start, progress
        self._outcomes: dict[Key, tuple[str, float | None, str]] = {}
        self._seconds: dict[Key, float] = {}
        self._bounds: dict[str, tuple[float, float]] = {}
        self._per_thread: int | None = None
        self.defaults: dict[Case, str] = {}
        self._done = 0
        groups = len({case[:2] for case in cases})
        self._total = len(self._compared(cases)) * len(IMPLEMENTATIONS) + groups * (ROUNDS + 1)

    def rows(self) -> list[Row]:
        """Compare, then time; the rows of what was reached."""
        self._compare()
        self._constants()
        for _, group in groupby(self._cases, key=lambda case: case[:2]):
            if self._left() > 0:
                self._time([*group])
        rows = []
        for case in self._cases:
            for name in IMPLEMENTATIONS:
                outcome = self._outcomes.get((case, name))
                seconds = self._seconds.get((case, name))
                if outcome is None or (outcome[0] == "right" and seconds is None):
                    continue
                rows.append(self._row(case, name, outcome, seconds))
        return rows

    def settings(self) -> dict[str, int]:
        """The measured constants."""
        return {} if self._per_thread is None else {"per_thread": self._per_thread}

    def _left(self) -> float:
        return self._start + self._limits.total - time.monotonic()

    def _advance(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total, max(self._left(), 0.0))

    # -- comparison

    @staticmethod
    def _compared(cases: Sequence[Case]) -> list[Case]:
        """The cases that are compared: the largest T stands for all, with the same kernels."""
        largest = {(c.cell, c.dtype, c.kind, c.shape.N, c.shape.H): c for c in cases}
        return [*largest.values()]

    def _compare(self) -> None:
        end = self._start + self._limits.comparing
        hung: dict[tuple[str, ...], str] = {}

        def requests(name: str) -> Iterator[Request]:
            for case in self._compared(self._cases):
                if earlier := hung.get((name, *case[:3])):
                    self._compared_as(case, name, (TIMED_OUT, None, f"not run: {earlier}"))
                    continue
                yield Request("compare", (case,), self._limits.compare)

        lanes = {name: requests(name) for name in IMPLEMENTATIONS}
        for name, request, answer in self._workers.ask_all(lanes, end):
            (case,) = request.arguments
            if answer.outcome == TIMED_OUT:
                N, H, _ = case.shape
                hung[(name, *case[:3])] = f"N={N} H={H} gave {answer.detail}"
            self._compared_as(case, name, self._outcome(case, answer))
            self._advance()

    def _compared_as(self, case: Case, name: str, outcome: tuple[str, float | None, str]) -> None:
        """Note the outcome of a comparison for every T."""
        for other in self._cases:
            if other[:3] == case[:3] and other.shape[:2] == case.shape[:2]:
                self._outcomes[other, name] = outcome

    @staticmethod
    def _outcome(case: Case, answer: Answer) -> tuple[str, float | None, str]:
        if answer.outcome == ANSWERED:
            value = answer.value
            return value["outcome"], value["error"], value["detail"]
        return answer.outcome, None, answer.detail

    # -- times

    def _constants(self) -> None:
        """The peaks that bounds follow from, and the amount of work for which threads pay."""
        for dtype in dict.fromkeys(case.dtype for case in self._cases):
            peaks = self._workers.ask("reference", Request("peaks", (dtype,), self._limits.sample))
            if peaks.outcome == ANSWERED:
                self._bounds[dtype] = peaks.value
        right = {
            case[:3]
            for (case, name), outcome in self._outcomes.items()
            if name == "sequence" and outcome[0] == "right"
        }
        if ("gru", "float32", "forward") in right:
            answer = self._workers.ask("sequence", Request("per_thread", (), self._limits.sample))
            self._per_thread = answer.value

    def _time(self, group: Sequence[Case]) -> None:
        """Time the cases of one cell and type, in turns of the implementations."""
        right = {
            name: [case for case in group if self._outcomes.get((case, name), ("",))[0] == "right"]
            for name in IMPLEMENTATIONS
        }
        self._select_defaults(group)
        samples: dict[Key, list[float]] = {}
        self._turn(right, samples, together=True)  # compile and allocate; not counted
        samples.clear()
        rounds = 0
        while rounds < ROUNDS and self._left() > 0:
            for name in IMPLEMENTATIONS:
                if right[name]:
                    time.sleep(PAUSE)
                    self._turn({name: right[name]}, samples)
            rounds += 1
            self._advance()
        if rounds >= MIN_ROUNDS:
            self._seconds |= {key: statistics.median(times) for key, times in samples.items()}

    def _turn(
        self,
        right: dict[str, list[Case]],
        samples: dict[Key, list[float]],
        together: bool = False,
    ) -> None:
        """One sample of each case; those that fail are removed."""
        limit = self._limits.start if together else self._limits.sample
        lanes = {
            name: iter([Request("sample", (case,), limit) for case in cases])
            for name, cases in right.items()
        }
        for name, request, answer in self._workers.ask_all(lanes, time.monotonic() + self._left()):
            (case,) = request.arguments
            if answer.outcome == ANSWERED:
                samples.setdefault((case, name), []).append(answer.value)
            else:
                right[name].remove(case)
                samples.pop((case, name), None)
                self._outcomes[case, name] = answer.outcome, None, f"while timed: {answer.detail}"
        if together:
            self._advance()

    def _select_defaults(self, group: Sequence[Case]) -> None:
        """What "auto" selects without a qualification."""
        for case in group:
            name = IMPLEMENTATIONS[0]
            answer = self._workers.ask(name, Request("default", (case,), self._limits.compare))
            if answer.outcome == ANSWERED:
                self.defaults[case] = answer.value

    def _row(
        self, case: Case, name: str, outcome: tuple[str, float | None, str], seconds: float | None
    ) -> Row:
        N, H, T = case.shape
        bound = None
        if seconds is not None and case.dtype in self._bounds:
            products, bytes_ = self._bounds[case.dtype]
            bound = 1e6 * max(
                multiply_adds(case) / products,
                least_bytes(case, ITEMSIZES[case.dtype]) / bytes_,
            )
        kind, error, detail = outcome
        microseconds = None if seconds is None else 1e6 * seconds
        sizes = N, H, H, T
        text = impersonal(detail)
        return Row(*case[:3], name, *sizes, kind, error, microseconds, bound, text)


# -- files


def default_path(qualification: Qualification, folder: Path) -> Path:
    """The path of a file in a folder; another run with the same identity replaces it."""
    slug = re.sub(r"[^A-Za-z0-9]+", "-", qualification.device).strip("-")[:60]
    identity = repr(sorted(qualification.identity.items())).encode()
    digest = hashlib.sha256(identity).hexdigest()[:8]
    return folder / f"{qualification.facts['kernels']}-{slug}-{digest}.json"


def check_outputs(
    output: str | os.PathLike[str] | None, share: str | os.PathLike[str] | None
) -> None:
    """Fail now rather than after the measurement if a file cannot be written.

    :raises OSError, ValueError: it cannot; the message names the path.
    """
    if output is None:
        _probe(_cache_folder() / "probe")
    else:
        _probe(Path(output))
    if share is not None:
        Path(share).mkdir(parents=True, exist_ok=True)
        _probe(Path(share) / "probe")


def _cache_folder() -> Path:
    folder = files.folder()
    if folder is None:
        raise ValueError("output: there is no home folder; name the file with -o FILE")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class _NotWrittenError(Exception):
    """Ends a `replacing` block without replacing."""


def _probe(path: Path) -> None:
    """Check that a file can be replaced, and that there is space; nothing remains."""
    with suppress(_NotWrittenError), replacing(path) as part:
        part.write_bytes(bytes(SPACE))
        raise _NotWrittenError


def write(
    report: QualifyReport,
    output: str | os.PathLike[str] | None = None,
    share: str | os.PathLike[str] | None = None,
) -> QualifyReport:
    """Write the files of a report, and let all layers make new plans.

    :return: the report with the path.
    """
    qualification = report.qualification
    if qualification is None:
        return report
    content = files.as_json(qualification).encode()
    files.parse(content)  # nothing is written that would not be read
    path = default_path(qualification, _cache_folder()) if output is None else Path(output)
    _replace(path, content)
    forget_plans()
    if share is not None:
        shared = default_path(qualification, Path(share))
        _replace(shared, content)
        text = f"# {qualification.device}\n\n```text\n{report}\n```\n"
        _replace(shared.with_suffix(".md"), text.encode())
    return replace(report, path=path)


def _replace(path: Path, content: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(content)


_FOLDERS = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/\s:'\"]+[\\/])+")


def impersonal(text: str) -> str:
    """One printable line without folders and the names of the user and the host."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = _FOLDERS.sub("", line)
    for name in _personal_names():
        line = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "...", line)
    return line[:MAX_DETAIL]


def _personal_names() -> list[str]:
    import getpass
    import platform

    names = [platform.node(), Path.home().name if os.environ.get("HOME") else ""]
    with suppress(Exception):  # a user without a name
        names.append(getpass.getuser())
    return [name for name in names if len(name) > 1]
