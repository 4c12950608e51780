"""A qualification: comparison and timing of all implementations, its file and its report."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ...backend import BackendUnavailableError
from ...backend.processors import usable
from ...backend.registry import requested_name
from ...kernels import IMPLEMENTATIONS, forget_plans
from ...kernels import qualification as files
from ...kernels.qualification import Qualification, Row
from ...nn.serialization import replacing
from ..verification.suite import LAYERS
from . import grid as grids
from .grid import Case, Grid
from .processes import ANSWERED, COMMAND, TIMED_OUT, Answer, Lane, Request, Workers
from .report import Progress, QualifyReport
from .timing import least_bytes, multiply_adds


@dataclass(frozen=True)
class Limits:
    """Times in seconds."""

    total: float
    compare: float = 45.0  # of a request, including compilation
    sample: float = 15.0


PLANS = {  # by whether it is a GPU, and whether it is quick
    (False, False): (grids.CPU, Limits(112.0)),
    (False, True): (grids.CPU_QUICK, Limits(55.0)),
    (True, False): (grids.GPU, Limits(170.0)),
    (True, True): (grids.GPU_QUICK, Limits(55.0)),
}
COMPARING = 0.6  # of the time that is left, at most, is for comparisons before the next timing
LEAST = 5.0  # seconds that must be left for another cell and type
MAX_LANES = 4  # that compare sequence kernels, which take longest to compile, at the same time
ROUNDS = 5
MIN_ROUNDS = 3  # with fewer, the rows are not timed
PAUSE = 0.03  # seconds before a worker's turn: idle threads of another's BLAS go to sleep
ITEMSIZES = {"float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
MAX_DETAIL = 300
SPACE = 1 << 20  # bytes that must be free on the disk


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
    :raises RuntimeError: nothing was measured before the time was over.
    """
    unknown = {*(cells or ())} - LAYERS.keys()
    if unknown:
        raise ValueError(f"cells: expected names of {', '.join(LAYERS)}; got {sorted(unknown)}")
    start = time.monotonic()
    with Workers(requested_name(backend), command) as workers:
        first = workers.ask(REFERENCE, Request("describe", (), 90.0))
        if first.outcome != ANSWERED:
            raise _unavailable(first)
        described = first.value
        if "unsupported" in described:
            return QualifyReport(described["backend"], None, described["unsupported"], 0)
        usual, usual_limits = PLANS[described["gpu"], quick]
        names = [name for name in grids.CELLS if cells is None or name in cells]
        parts = [
            [*part.cases(names, dtype)]
            for part in grid or usual
            for dtype in part.dtypes
            if dtype in described["dtypes"]
        ]
        run = Run(workers, parts, limits or usual_limits, start, progress)
        run.measure()
        rows = run.rows()
        if not any(row.right or row.faulty for row in rows):
            raise RuntimeError(
                "nothing was measured before the time was over, and no file is written: "
                "qualify an idle machine, or fewer cells"
            )
        qualification = Qualification(
            described["identity"],
            {**described["facts"], "kernels": described["kernels"]},
            date.today().isoformat(),
            round(time.monotonic() - start, 1),
            rows,
        )
        planned = len(IMPLEMENTATIONS) * sum(map(len, parts))
        return QualifyReport(described["backend"], qualification, "", planned - len(rows))


def _unavailable(answer: Answer) -> Exception:
    kind, _, text = answer.detail.partition(": ")
    if kind == "BackendUnavailableError":
        return BackendUnavailableError(text)
    if kind == "ValueError":
        return ValueError(text)
    return RuntimeError(f"a worker process {answer.outcome}: {answer.detail}")


Key = tuple[Case, str]  # a call and an implementation
REFERENCE = Lane("reference")
RIGHT = "right"


class Result(NamedTuple):
    """The result of comparing an implementation, as in a row."""

    outcome: str
    error: float | None
    detail: str


class Run:
    """The measurement of cases by workers.

    :param parts: the cases of each type; the next type begins when one is compared and timed.
    """

    def __init__(
        self,
        workers: Workers,
        parts: Sequence[Sequence[Case]],
        limits: Limits,
        start: float,
        progress: Progress | None,
    ) -> None:
        self._workers, self._parts, self._limits = workers, parts, limits
        self._end, self._progress = start + limits.total, progress
        self._results: dict[Key, Result] = {}
        self._seconds: dict[Key, float] = {}
        self._hung: dict[tuple[str, ...], str] = {}  # what, by implementation, cell, type and pass
        self._peaks: dict[str, tuple[float, float]] = {}  # by type
        self._defaults: dict[Case, str] = {}
        groups = len({case[:2] for part in parts for case in part})
        compared = sum(len(representatives(part)) for part in parts)
        self._done, self._total = 0, compared * len(IMPLEMENTATIONS) + groups * ROUNDS

    def measure(self) -> None:
        """Compare and time the cases until the time is over."""
        for part in self._parts:
            pending = [[*group] for _, group in groupby(part, key=lambda case: case[:2])]
            while pending and self._left() > LEAST:
                self._compare([case for group in pending for case in group])
                complete = [group for group in pending if self._is_compared(group)]
                if complete:
                    self._measure_peaks(part[0].dtype)
                for group in complete:
                    self._time(group, time.monotonic() + self._left() / len(pending))
                    pending.remove(group)

    def _is_compared(self, group: Sequence[Case]) -> bool:
        return all((case, name) in self._results for case in group for name in IMPLEMENTATIONS)

    def rows(self) -> tuple[Row, ...]:
        """The rows of what was reached: what is right was timed too."""
        return tuple(
            self._row(case, name, self._results[case, name])
            for part in self._parts
            for case in part
            for name in IMPLEMENTATIONS
            if (case, name) in self._results
            and (self._results[case, name].outcome != RIGHT or (case, name) in self._seconds)
        )

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _advance(self) -> None:
        self._done += 1
        if self._progress:
            self._progress(min(self._done, self._total), self._total, max(self._left(), 0.0))

    # -- comparison

    def _compare(self, part: Sequence[Case]) -> None:
        """Compare the cases of a type, the implementations at the same time."""
        hung = self._hung

        def requests(name: str, cases: Iterator[Case]) -> Iterator[Request]:
            for case in cases:
                if (case, name) in self._results:
                    continue
                if earlier := hung.get((name, *case[:3])):
                    self._note(part, case, name, Result(TIMED_OUT, None, f"not run: {earlier}"))
                else:
                    yield Request("compare", (case,), self._limits.compare)

        lanes = {}
        for name in IMPLEMENTATIONS:
            count = sequence_lanes() if name == "sequence" else 1
            for number, cases in enumerate(shares(representatives(part), count)):
                lanes[Lane(name, True, number)] = requests(name, cases)
        end = time.monotonic() + COMPARING * self._left()
        for lane, request, answer in self._workers.ask_all(lanes, end):
            (case,) = request.arguments
            if answer.outcome == TIMED_OUT:
                key = lane.implementation, *case[:3]
                hung[key] = f"{answer.detail} for N={case.shape.N} H={case.shape.H}"
            if answer.outcome == ANSWERED:
                result = Result(**answer.value)
            else:
                result = Result(answer.outcome, None, answer.detail)
            self._note(part, case, lane.implementation, result)
            self._advance()
        for lane in lanes:
            self._workers.end(lane)

    def _note(self, part: Sequence[Case], case: Case, name: str, result: Result) -> None:
        """Keep the result of a comparison for every T."""
        for other in part:
            if compared_as(other) == compared_as(case):
                self._results[other, name] = result

    # -- times

    def _measure_peaks(self, dtype: str) -> None:
        """The peaks that bounds follow from."""
        if dtype not in self._peaks:
            peaks = self._workers.ask(REFERENCE, Request("peaks", (dtype,), self._limits.sample))
            if peaks.outcome == ANSWERED:
                self._peaks[dtype] = peaks.value

    def _is_right(self, case: Case, name: str) -> bool:
        return (case, name) in self._results and self._results[case, name].outcome == RIGHT

    def _time(self, group: Sequence[Case], until: float) -> None:
        """Time the cases of one cell and type, the implementations interleaved.

        After MIN_ROUNDS no new one begins after the time `until`.
        """
        right = {
            Lane(name): [case for case in group if self._is_right(case, name)]
            for name in IMPLEMENTATIONS
        }
        if not any(right.values()) or self._left() <= 0:
            return
        self._select_defaults([case for case in group if self._is_right(case, "reference")])
        samples: dict[Key, list[float]] = {}
        for done in range(ROUNDS):
            if self._left() <= 0 and done < MIN_ROUNDS:
                return
            if done >= MIN_ROUNDS and time.monotonic() > until:
                break
            for lane, cases in right.items():
                if cases:
                    time.sleep(PAUSE)
                    self._turn(lane, cases, samples)
            self._advance()
        # other processes only make samples longer
        self._seconds |= {key: min(times) for key, times in samples.items()}

    def _turn(self, lane: Lane, cases: list[Case], samples: dict[Key, list[float]]) -> None:
        """One sample of each case; those that fail are removed."""
        requests = [Request("sample", (case,), self._limits.sample) for case in cases]
        for _, request, answer in self._workers.ask_all({lane: iter(requests)}, self._end):
            (case,) = request.arguments
            key = case, lane.implementation
            if answer.outcome == ANSWERED:
                samples.setdefault(key, []).append(answer.value)
            else:
                cases.remove(case)
                samples.pop(key, None)
                self._results[key] = Result(answer.outcome, None, f"timed: {answer.detail}")

    def _select_defaults(self, cases: Sequence[Case]) -> None:
        """What "auto" selects without a qualification."""
        requests = [Request("default", (case,), self._limits.compare) for case in cases]
        for _, request, answer in self._workers.ask_all({REFERENCE: iter(requests)}, self._end):
            if answer.outcome == ANSWERED:
                self._defaults[request.arguments[0]] = answer.value

    def _row(self, case: Case, name: str, result: Result) -> Row:
        N, H, T = case.shape
        seconds, bound = self._seconds.get((case, name)), None
        if seconds is not None and case.dtype in self._peaks:
            products, copied = self._peaks[case.dtype]
            least = least_bytes(case, ITEMSIZES[case.dtype])
            bound = 1e6 * max(multiply_adds(case) / products, least / copied)
        return Row(
            *case[:3],
            name,
            *(N, H, H, T),
            result.outcome,
            result.error,
            None if seconds is None else 1e6 * seconds,
            bound,
            impersonal(result.detail),
            self._defaults.get(case) == name,
        )


def compared_as(case: Case) -> tuple[object, ...]:
    """What a comparison depends on: not T, which no kernel is compiled for."""
    return (*case[:3], *case.shape[:2])


def representatives(cases: Sequence[Case]) -> list[Case]:
    """The cases that are compared: of those that differ in T the last."""
    return [*{compared_as(case): case for case in cases}.values()]


def shares(cases: Sequence[Case], count: int) -> list[Iterator[Case]]:
    """Iterators over parts of the cases; one that is at its end continues with others' last."""
    size = -(-len(cases) // count)
    queues = [deque(cases[k * size : (k + 1) * size]) for k in range(count)]

    def share(own: deque[Case]) -> Iterator[Case]:
        while any(queues):
            yield own.popleft() if own else max(queues, key=len).pop()

    return [share(queue) for queue in queues]


def sequence_lanes() -> int:
    """The number of workers that compare sequence kernels; two more compare the others."""
    return max(1, min(MAX_LANES, usable() // 2 - 1))


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
        try:
            _probe(_cache_folder() / "probe")
        except OSError as error:
            raise type(error)(f"output: {error}; name another file with -o FILE") from error
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
