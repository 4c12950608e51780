"""What `xprnn qualify` measured on this machine, and what "auto" selects because of it.

A qualification is a JSON file: an identity (device, versions, digest of the kernels' sources), and
a row for each implementation, cell, dtype, pass and shape, with the outcome of its comparison with
the float64 equations, and its time. It is data: nothing in it is executed, and a file that is not
exactly of this form, or of another identity, is not used.

An implementation is selected for a call only where it was right and fastest at every shape of the
measured grid around the call's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from functools import cached_property
from itertools import product
from pathlib import Path
from reprlib import repr as shown  # shortened
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_log = logging.getLogger("xprnn")

ENVIRONMENT_VARIABLE = "XPRNN_QUALIFIED"
OFF = "off"  # the value that ignores all files
FORMAT = "xprnn qualification 1"
MAX_BYTES = 4_000_000
MAX_TEXT = 1000
MAX_SIZE = 1 << 40
MARGIN = 1.1  # how much faster than the default a selected implementation must be

FAULTS = ("wrong", "timed out", "ended its process", "raised")
OUTCOMES = ("right", *FAULTS, "unsupported")
IMPLEMENTATIONS = ("reference", "pointwise", "sequence")
DTYPES = ("float64", "float32", "tf32", "float16", "bfloat16")
PASSES = ("forward", "training", "step")  # unrecorded; recorded, with backward; one of a stepper


@dataclass(frozen=True)
class Row:
    """One implementation at one shape."""

    cell: str  # a name of `cells.CELLS`
    dtype: str  # one of `DTYPES`
    kind: str  # one of `PASSES`
    implementation: str
    N: int
    I: int  # noqa: E741
    H: int
    T: int
    outcome: str  # one of `OUTCOMES`
    error: float | None  # the largest, in units of its limit; None if there was no comparison
    microseconds: float | None  # the median of a call; None if it was not timed
    bound: float | None  # the physical bound of the time, likewise
    detail: str  # of the largest error, or why there is no time
    default: bool = False  # whether "auto" selected it without the file

    @property
    def right(self) -> bool:
        """Whether it was compared, was right, and was timed."""
        return self.outcome == "right" and self.microseconds is not None

    @property
    def faulty(self) -> bool:
        """Whether it must not run such a call."""
        return self.outcome in FAULTS


class Shape(NamedTuple):
    """The sizes of a call that its time depends on."""

    N: int
    H: int
    T: int


class Choice(NamedTuple):
    """An implementation that is selected because of a qualification."""

    implementation: str
    reason: str


class QualificationError(ValueError):
    """A file is not a qualification; the message names what is wrong."""


@dataclass(frozen=True)
class Qualification:
    """A checked file."""

    identity: Mapping[str, str]
    facts: Mapping[str, str]  # about the run, without influence
    date: str  # of the run, "2026-12-03"
    seconds: float  # that the run took
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The name of the GPU or processor."""
        return self.identity["device"]

    @cached_property
    def digest(self) -> str:
        """Eight hexadecimal digits of the content."""
        return hashlib.sha256(as_json(self).encode()).hexdigest()[:8]

    @cached_property
    def _grids(self) -> dict[tuple[str, str, str], dict[Shape, dict[str, Row]]]:
        grids: dict[tuple[str, str, str], dict[Shape, dict[str, Row]]] = {}
        for row in self.rows:
            grid = grids.setdefault((row.cell, row.dtype, row.kind), {})
            grid.setdefault(Shape(row.N, row.H, row.T), {})[row.implementation] = row
        return grids

    @cached_property
    def _outcomes(self) -> dict[tuple[str, str, str], set[str]]:
        outcomes: dict[tuple[str, str, str], set[str]] = {}
        for row in self.rows:
            outcomes.setdefault((row.cell, row.dtype, row.implementation), set()).add(row.outcome)
        return outcomes

    def outcomes(self, cell: str, dtype: str, implementation: str) -> set[str]:
        """The outcomes of all calls for which an implementation exists."""
        return self._outcomes.get((cell, dtype, implementation), set()) - {"unsupported"}

    def choice(self, cell: str, dtype: str, kind: str, shape: Shape, default: str) -> Choice | None:
        """What "auto" selects for a call instead of `default`; None: the default.

        Another implementation must have been right at every shape of the grid around the call's.
        It is selected if the default was right and slower at each, or had a fault at one of them.
        Where the default was not compared, it stays.
        """
        grid = self._grids.get((cell, dtype, kind), {})
        corners = around(shape, grid)
        if not corners:
            return None
        right = [name for name in IMPLEMENTATIONS if all(name in _times(each) for each in corners)]
        faulty = any(default in corner and corner[default].faulty for corner in corners)
        times = [*map(_times, corners), *further(shape, grid)]
        better = [
            name
            for name in right
            if faulty or all(_is_faster(each, name, default) for each in times)
        ]
        if not better:
            return None
        best = min(better, key=lambda name: _mean(corners, name))
        return Choice(
            best, self._reason(corners, best, [name for name in right if name != best], default)
        )

    def _reason(
        self, corners: Sequence[Mapping[str, Row]], best: str, others: list[str], default: str
    ) -> str:
        """Why an implementation is selected; `others` were right too."""
        worst = max(corner[best].error or 0.0 for corner in corners)
        text = (
            f"qualified {self.date} on {self.device} (file {self.digest}), worst error {worst:.2g} "
            "of the limit"
        )
        if others:
            other = (
                default if default in others else min(others, key=lambda name: _mean(corners, name))
            )
            text += f", {_mean(corners, other) / _mean(corners, best):.1f} times as fast as {other}"
        if default not in others:
            text += f"; {default} was not right there"
        return text


def _mean(corners: Sequence[Mapping[str, Row]], name: str) -> float:
    """The geometric mean of an implementation's times."""
    times = [corner[name].microseconds or math.inf for corner in corners]
    return math.exp(math.fsum(map(math.log, times)) / len(times))


def _times(corner: Mapping[str, Row]) -> dict[str, float]:
    """The times at a shape of the implementations that were right."""
    return {name: row.microseconds or 0.0 for name, row in corner.items() if row.right}


def _is_faster(times: Mapping[str, float], name: str, default: str) -> bool:
    """Whether an implementation is faster by MARGIN; False if one has no time."""
    own, other = times.get(name, 0.0), times.get(default, 0.0)
    return 0 < own * MARGIN <= other


def around(shape: Shape, grid: Mapping[Shape, dict[str, Row]]) -> list[dict[str, Row]]:
    """The rows at the shapes of a grid around `shape`; none if it is outside, or one is missing.

    For a call of more steps than any in the grid the largest number counts; see `further`.
    """
    if not grid:
        return []
    Ns, Hs, Ts = (sorted(set(axis)) for axis in zip(*grid, strict=True))
    steps = min(shape.T, Ts[-1])
    sizes = neighbours(shape.N, Ns), neighbours(shape.H, Hs), neighbours(steps, Ts)
    corners = [Shape(*corner) for corner in product(*sizes)]
    return [grid[corner] for corner in corners] if all(c in grid for c in corners) else []


def further(shape: Shape, grid: Mapping[Shape, dict[str, Row]]) -> list[dict[str, float]]:
    """The times of the steps that the largest T of the grid has more than the next, by name.

    A part of a call's time does not depend on T, such as that of packing weights. For more steps
    than were measured, an implementation must be faster in these too. None if `shape` has no more;
    one without times if the grid has no other T.
    """
    *fewer, most = sorted({each.T for each in grid})
    if most >= shape.T:
        return []
    long, short = (around(shape._replace(T=T), grid) for T in (most, fewer[-1] if fewer else 0))
    pairs = zip(map(_times, long), map(_times, short), strict=False)
    return [{n: more[n] - less[n] for n in more.keys() & less.keys()} for more, less in pairs] or [
        {}
    ]


def neighbours(size: int, axis: Sequence[int]) -> list[int]:
    """The values of an axis around a size, or the one that equals it; none if it is outside."""
    below = [value for value in axis if value <= size]
    above = [value for value in axis if value >= size]
    return sorted({below[-1], above[0]}) if below and above else []


# -- files


def as_json(qualification: Qualification) -> str:
    """The content of a file."""
    content = {
        "format": FORMAT,
        "identity": dict(qualification.identity),
        "facts": dict(qualification.facts),
        "date": qualification.date,
        "seconds": qualification.seconds,
        "columns": list(COLUMNS),
        "rows": [[getattr(row, name) for name in COLUMNS] for row in qualification.rows],
    }
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=0)


COLUMNS = tuple(field.name for field in fields(Row))
_TOP = {"format", "identity", "facts", "date", "seconds", "columns", "rows"}


def parse(data: bytes) -> Qualification:
    """Check the content of a file.

    :raises QualificationError: it has another form; the message names the field.
    """
    if len(data) > MAX_BYTES:
        raise QualificationError(f"expected at most {MAX_BYTES:,} bytes, got {len(data):,}")
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_reject)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise QualificationError(f"not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.keys() != _TOP:
        raise QualificationError(f"expected an object with the fields {sorted(_TOP)}")
    if content["format"] != FORMAT:
        raise QualificationError(f"format: expected {FORMAT!r}, got {shown(content['format'])}")
    if content["columns"] != list(COLUMNS):
        raise QualificationError(f"columns: expected {list(COLUMNS)}")
    identity, facts = (_texts(name, content[name]) for name in ("identity", "facts"))
    if "device" not in identity:
        raise QualificationError("identity: expected a field 'device'")
    day = _day(content["date"])
    seconds = _number("seconds", content["seconds"])
    if not isinstance(content["rows"], list):
        raise QualificationError("rows: expected a list")
    rows = tuple([_row(number, row) for number, row in enumerate(content["rows"])])
    keys = {
        (row.cell, row.dtype, row.kind, row.implementation, row.N, row.H, row.T) for row in rows
    }
    if len(keys) < len(rows):
        raise QualificationError("rows: two have the same call and implementation")
    return Qualification(identity, facts, day, seconds, rows)


def _day(value: Any) -> str:
    try:
        if date.fromisoformat(value).isoformat() == value:
            return str(value)
    except (TypeError, ValueError):
        pass
    raise QualificationError(f"date: expected YYYY-MM-DD, got {shown(value)}")


def _reject(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _texts(name: str, value: Any) -> dict[str, str]:
    """A mapping of names to short texts without control characters."""
    if not isinstance(value, dict) or len(value) > 100:
        raise QualificationError(f"{name}: expected an object of at most 100 texts")
    for key, text in value.items():
        _text(f"{name}: {shown(key)}", key)
        _text(f"{name}: {shown(key)}", text)
    return value


def _text(name: str, value: Any) -> str:
    if not (isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()):
        raise QualificationError(f"{name}: expected a printable text, got {shown(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise QualificationError(f"{name}: expected a number of at least 0, got {shown(value)}")
    return float(value)


_NAMES = {"dtype": DTYPES, "kind": PASSES, "implementation": IMPLEMENTATIONS, "outcome": OUTCOMES}


def _row(number: int, values: Any) -> Row:
    """A checked row."""
    if not isinstance(values, list) or len(values) != len(COLUMNS):
        raise QualificationError(f"rows[{number}]: expected {len(COLUMNS)} values")
    columns: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
    for name, value in columns.items():
        where = f"rows[{number}]: {name}"
        if name in _NAMES:
            if value not in _NAMES[name]:
                raise QualificationError(
                    f"{where}: expected one of {', '.join(_NAMES[name])}; got {shown(value)}"
                )
        elif name in Shape._fields or name == "I":
            if type(value) is not int or not 0 < value < MAX_SIZE:
                raise QualificationError(f"{where}: expected an integer > 0, got {shown(value)}")
        elif name in ("cell", "detail"):
            _text(where, value)
        elif name == "default":
            if type(value) is not bool:
                raise QualificationError(f"{where}: expected true or false, got {shown(value)}")
        elif value is not None:
            columns[name] = _number(where, value)
    row = Row(**columns)
    if row.microseconds == 0:
        raise QualificationError(f"rows[{number}]: microseconds: expected more than 0")
    if row.outcome == "right" and (row.error is None or row.error > 1):
        raise QualificationError(f"rows[{number}]: right, with the error {shown(row.error)}")
    return row


# -- the files of this machine


def folder() -> Path | None:
    """The folder of this user's files; None where there is no home folder."""
    from platformdirs import user_cache_path

    try:
        path = user_cache_path("xprnn", appauthor=False) / "qualified"
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


class Found(NamedTuple):
    """The result of a search for this machine's file."""

    qualification: Qualification | None
    path: Path | None
    why_not: str  # why a file that is there is not used, or ""


NOTHING = Found(None, None, "")


def find(kernels: str, identity: Callable[[], Mapping[str, str]]) -> Found:
    """The qualification of this machine: the latest with its identity, or why there is none.

    :param kernels: the kernel package, "cuda" or "numba", with which a file's name begins.
    :param identity: gives this machine's; only called if there is a file.
    """
    requested = os.environ.get(ENVIRONMENT_VARIABLE) or ""
    if requested == OFF:
        return NOTHING
    try:
        paths = _candidates(kernels, requested)
    except OSError as error:
        return Found(None, None, _named(error.filename or requested, error))
    if requested and not paths:
        return Found(None, None, _named(requested, f"no file {kernels}-*.json"))
    own = identity() if paths else {}
    usable: list[tuple[Qualification, Path]] = []
    reasons: list[str] = []
    for path in paths:
        try:
            qualification = parse(read(path))
            if differing := difference(qualification.identity, own):
                raise QualificationError(differing)
        except (OSError, QualificationError) as error:
            reasons.append(_named(path, error))
        else:
            usable.append((qualification, path))
    if usable:
        return Found(*max(usable, key=lambda pair: pair[0].date), "")
    if not reasons:
        return NOTHING
    _log.warning("qualification not used: %s", "; ".join(reasons))
    more = f"; nor {len(reasons) - 1} other files" if len(reasons) > 1 else ""
    return Found(None, None, reasons[-1] + more)


def _named(path: Path | str, why: OSError | QualificationError | str) -> str:
    """A reason with its file, printable whatever the bytes of its path are."""
    text = (isinstance(why, OSError) and why.strerror) or why
    return f"{os.fsencode(path).decode(errors='backslashreplace')}: {text}"


def _candidates(kernels: str, requested: str) -> list[Path]:
    """The files that are read; a file that is requested by name must exist."""
    location = Path(requested) if requested else folder()
    if location is not None and location.is_dir():
        return sorted(path for path in location.iterdir() if path.match(f"{kernels}-*.json"))
    return [Path(requested)] if requested else []


def read(path: Path) -> bytes:
    """The content of a file, or of its first bytes if it is too large.

    :raises QualificationError: it is not a file; a pipe, for example, would block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise QualificationError("not a regular file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def difference(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """In what a file's identity differs from this machine's; "" if in nothing."""
    differing = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    return "; ".join(
        f"{name}: {there.get(name, 'nothing')} in the file, {here.get(name, 'nothing')} here"
        for name in differing
    )


def sources_digest(*packages: str) -> str:
    """A hash of the source files of packages of kernels, sixteen hexadecimal digits."""
    from importlib import resources  # which `import xprnn` does not need

    return folder_digest(*[resources.files(package) for package in packages])


def folder_digest(*folders: Traversable) -> str:
    """The same of folders, which need not be importable."""
    every = [f for folder in folders for f in folder.iterdir()]
    files = [f for f in every if f.name.endswith((".py", ".cu", ".h"))]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
