"""What a benchmark measured: one row a library and pass, and the table of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ..output import unbroken
from ..verify.report import plain

if TYPE_CHECKING:
    from rich.console import Group


class Row(NamedTuple):
    """The seconds of one call of one library in each round, beside xprnn's in the same round."""

    what: str  # "forward" or "with backward", which is both
    who: str
    seconds: list[float]
    ours: list[float]

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The quartiles of the ratio to xprnn's seconds, the median first."""
        ratios = [theirs / ours for theirs, ours in zip(self.seconds, self.ours, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, low, high


@dataclass(frozen=True)
class BenchReport:
    """What `run` measured; `str` is a table.

    A time step is one step of all N rows, N sequence steps.
    """

    title: str
    steps: int  # T
    batch: int  # N
    rows: tuple[Row, ...]
    lines: tuple[str, ...]  # on what and with what, and how far the results differ

    def __rich__(self) -> Group:
        """The report for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, box=None)
        for heading in ("", "", "us / time step", "sequence steps / s", "peer / xprnn"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in self.rows:
            ratio = "" if row.who == "xprnn" else "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio)
            step = row.median / self.steps  # of all rows: N sequence steps
            rate = self.batch / step
            cells = (row.what, row.who, f"{1e6 * step:.2f}", f"{rate:,.0f}", ratio)
            table.add_row(*map(Text, cells))
        return Group(unbroken(table), *map(Text, self.lines))

    def __str__(self) -> str:
        """The report as plain text."""
        return plain(self)
