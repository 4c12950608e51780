"""The results of a verification: one row per check, and their table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from ..tables import unwrapped, widen

if TYPE_CHECKING:
    from rich.console import Group

GRADCHECK = "gradcheck"
LEGEND = (
    "An error is the largest in an array / the array's largest element, in units of eps, the "
    "distance from 1 to the next number of the type; that of a gradcheck is in units of its "
    "tolerance. Gradients of weights are compared gate by gate."
)


class Row(NamedTuple):
    """One check of one implementation: the array with the largest excess."""

    #: "gru", for example.
    cell: str
    #: "reference", for example.
    implementation: str
    #: The type of the computation, such as "float32", or "gradcheck".
    check: str
    #: In units of that type's ε, or of the gradcheck's tolerance.
    error: float
    #: The name of the array.
    array: str
    #: In units as `error`.
    limit: float

    @property
    def excess(self) -> float:
        """The error in units of the limit: above 1 the check has failed."""
        return self.error / self.limit

    @property
    def ok(self) -> bool:
        """Whether the error is within the limit."""
        return self.excess <= 1


class Absent(NamedTuple):
    """A check that is not made, with the reason."""

    #: An implementation or a type.
    check: str
    #: "gru", for example.
    cell: str
    #: Why it is not made.
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """The results of a verification; `str` is a table."""

    #: The heading of the table.
    title: str
    #: The checks that were made.
    rows: tuple[Row, ...]
    #: The checks that were not made.
    absent: tuple[Absent, ...]

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.rows) and not self.failed

    def __rich__(self) -> Group:
        """The report for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, box=None, padding=(0, 1, 0, 0))
        for heading in ("cell", "implementation", "type", "error", "in", "limit", ""):
            numeric = heading in ("error", "limit")
            table.add_column(heading, justify="right" if numeric else "left")
        for row in self.rows:
            unit = "" if row.check == GRADCHECK else " eps"
            error, limit = (f"{value:.3g}{unit}" for value in (row.error, row.limit))
            table.add_row(
                *map(Text, (row.cell, row.implementation, row.check, error, row.array, limit)),
                Text("ok", "green") if row.ok else Text("FAILED", "bold red"),
            )
        return Group(unwrapped(table), *map(Text, [LEGEND, *self._not_compared()]))

    def _not_compared(self) -> list[str]:
        """A line for each check, with cells grouped by reason."""
        reasons: dict[str, dict[str, list[str]]] = {}
        for check, cell, reason in dict.fromkeys(self.absent):
            reasons.setdefault(check, {}).setdefault(reason, []).append(cell)
        return [
            f"not compared: {check} "
            + "; ".join(f"of {', '.join(cells)}: {reason}" for reason, cells in by_reason.items())
            for check, by_reason in reasons.items()
        ]

    def __str__(self) -> str:
        """The report as plain text."""
        return plain(self)


def plain(report: Any) -> str:
    """The report as printed by rich, without colours."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, width=100, color_system=None)
    widen(console, report)
    console.print(report)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def worst_of(rows: Iterable[Row]) -> tuple[Row, ...]:
    """For each check the row with the largest excess, in order of first appearance."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row[:3]
        if key not in worst or row.excess > worst[key].excess:
            worst[key] = row
    return tuple(worst.values())
