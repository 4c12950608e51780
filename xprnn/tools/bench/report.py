"""The results of a benchmark: one row per library and pass, and their table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ...diagnostics.tables import unwrapped
from ...diagnostics.verification.report import plain

if TYPE_CHECKING:
    from rich.console import Group


class Row(NamedTuple):
    """The seconds per call of one library in each round, with xprnn's of the same round."""

    what: str  # "forward" or "with backward", which includes forward
    library: str
    seconds: list[float]
    xprnn_seconds: list[float]

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The quartiles of the ratio to xprnn's seconds, the median first."""
        pairs = zip(self.seconds, self.xprnn_seconds, strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, low, high


@dataclass(frozen=True)
class BenchReport:
    """The results of `run`; `str` is a table.

    A time step is one step of all N rows, which is N sequence steps.
    """

    title: str
    steps: int  # T
    batch: int  # N
    rows: tuple[Row, ...]
    lines: tuple[str, ...]  # machine and versions, and differences of the results

    def __rich__(self) -> Group:
        """The report for a terminal."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, box=None)
        for heading in ("", "", "us / time step", "sequence steps / s", "peer / xprnn"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in self.rows:
            ratio = "" if row.library == "xprnn" else "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio)
            step = row.median / self.steps  # of all rows: N sequence steps
            rate = self.batch / step
            cells = (row.what, row.library, f"{1e6 * step:.2f}", f"{rate:,.0f}", ratio)
            table.add_row(*map(Text, cells))
        return Group(unwrapped(table), *map(Text, self.lines))

    def __str__(self) -> str:
        """The report as plain text."""
        return plain(self)
