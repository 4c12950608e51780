"""What a qualification found: a row for each call, with what "auto" selects, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...kernels.qualification import Qualification, Row, Shape
from ..tables import unwrapped
from ..verification.report import plain
from .grid import Case

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Progress = Callable[[int, int, float], None]  # tasks done, their total, seconds left at most

LEGEND = (
    "x next: the time of the fastest other implementation that was right / that of the selected "
    "one; error: the largest of the selected one, in units of its limit; bound: the time that the "
    "selected one's products or memory accesses take at the speed of a plain product or copy / its "
    "time, which exceeds 100% if it is faster than these."
)


class Line(NamedTuple):
    """One call: what "auto" selected without the qualification, and what it selects with it."""

    case: Case
    default: str
    selected: str
    rows: Mapping[str, Row]  # by implementation

    @property
    def changed(self) -> bool:
        """Whether that is another implementation."""
        return self.selected != self.default

    @property
    def gain(self) -> float | None:
        """The time of the default / that of the selected; None if one was not timed."""
        times = [self.rows[name].microseconds for name in (self.default, self.selected)]
        return times[0] / times[1] if times[0] and times[1] else None

    @property
    def lead(self) -> float | None:
        """The time of the next best that was right / that of the selected one."""
        own = self.rows[self.selected]
        others = [
            row.microseconds
            for name, row in self.rows.items()
            if row.right and name != self.selected and row.microseconds
        ]
        return min(others) / own.microseconds if others and own.microseconds else None


@dataclass(frozen=True)
class QualifyReport:
    """The result of a qualification; `str` is a table."""

    backend: str
    qualification: Qualification | None
    why_not: str  # why there is nothing to qualify, or ""
    missed: int  # rows that were not reached in time
    path: Path | None = None  # of the file, once it is written

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of kernels that were wrong, hung, raised, or ended their process."""
        rows = self.qualification.rows if self.qualification else ()
        return tuple(row for row in rows if row.faulty)

    @property
    def ok(self) -> bool:
        """Whether no kernel failed."""
        return not self.failed

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """A line for each call that was measured."""
        return tuple(lines_of(self.qualification)) if self.qualification else ()

    @property
    def changes(self) -> tuple[Line, ...]:
        """The calls for which "auto" selects another implementation than without the file."""
        return tuple(line for line in self.lines if line.changed)

    def __rich__(self) -> Group:
        """The report for a terminal."""
        from rich.console import Group
        from rich.text import Text

        if self.qualification is None:
            return Group(Text(f"nothing to qualify on {self.backend}: {self.why_not}"))
        title = f"{self.qualification.device} ({self.backend}), {self.qualification.date}"
        return Group(table_of(self.lines, title), *map(Text, [LEGEND, *self.summary()]))

    def __str__(self) -> str:
        """The report as plain text."""
        return plain(self)

    def summary(self) -> list[str]:
        """What changes, what failed, and where the file is."""
        assert self.qualification is not None
        lines = [*_changes(self.changes)] or ["auto selects what it selects without the file"]
        if self.missed:
            lines.append(f"{self.missed} rows were not reached in time: the defaults apply there")
        lines += [
            f"FAILED: {row.cell} {row.dtype} {row.kind} N={row.N} H={row.H} T={row.T} "
            f"{row.implementation}: {row.outcome}: {row.detail}"
            for row in self.failed
        ]
        lines.append(f"{self.qualification.seconds:.0f} s, file {self.qualification.digest}")
        return lines


def table_of(lines: Iterable[Line], title: str) -> Table:
    """A row for each call."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for heading in ("cell", "type", "pass", "N", "H", "T", "auto takes"):
        table.add_column(heading, justify="right" if heading in "NHT" else "left")
    for heading in ("us", "x next", "error", "bound"):
        table.add_column(heading, justify="right")
    table.add_column("not selected")
    for line in lines:
        table.add_row(
            *map(Text, (*line.case[:3], *map(str, line.case.shape))),
            Text(line.selected, "bold" if line.changed else ""),
            *map(Text, _numbers(line, line.rows[line.selected])),
            Text("; ".join(_reasons(line))),
        )
    return unwrapped(table)


def lines_of(qualification: Qualification) -> Iterator[Line]:
    """A line for each call whose default is known."""
    cases: dict[Case, dict[str, Row]] = {}
    for row in qualification.rows:
        case = Case(row.cell, row.dtype, row.kind, Shape(row.N, row.H, row.T))
        cases.setdefault(case, {})[row.implementation] = row
    for case, rows in cases.items():
        for default in [name for name, row in rows.items() if row.default][:1]:
            choice = qualification.choice(*case, default)
            yield Line(case, default, choice.implementation if choice else default, rows)


def _numbers(line: Line, own: Row) -> tuple[str, ...]:
    bound = own.bound / own.microseconds if own.bound and own.microseconds else None
    return (
        "" if own.microseconds is None else microseconds(own.microseconds),
        "" if line.lead is None else f"{line.lead:.2f}",
        "" if own.error is None else f"{own.error:.2g}",
        "" if bound is None else f"{bound:.0%}",
    )


def microseconds(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _reasons(line: Line) -> Iterator[str]:
    """Why the other implementations are not selected."""
    own = line.rows[line.selected].microseconds
    for name, row in line.rows.items():
        if name == line.selected:
            continue
        if row.right and own and row.microseconds:
            yield f"{name} {row.microseconds / own:.2f} x the time"
        elif row.outcome == "unsupported":
            yield f"{name} not supported"
        elif not row.right:
            yield f"{name} {row.outcome}"


def _changes(changes: Sequence[Line]) -> Iterator[str]:
    """One line for each cell, type, pass, and pair of implementations, with the ratios."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in changes:
        groups.setdefault((*line.case[:3], line.default, line.selected), []).append(line)
    for (cell, dtype, kind, default, selected), lines in groups.items():
        shapes = ", ".join(
            f"N={line.case.shape.N} H={line.case.shape.H} T={line.case.shape.T}"
            + (f" ({line.gain:.2f} x)" if line.gain else "")
            for line in lines
        )
        yield f"changed: {cell} {dtype} {kind}: {selected} instead of {default} at {shapes}"
