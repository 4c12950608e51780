"""Tables that a terminal shows without truncating a cell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 10_000  # columns


def unwrapped(table: Table) -> Table:
    """Set a table's minimum width so that each of its rows fits on one line."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=UNBOUNDED)
    table.min_width = Measurement.get(console, console.options, table).maximum
    return table


def widen(console: Console, report: Any) -> None:
    """Make a console wide enough that no cell is truncated: the terminal wraps lines instead."""
    from rich.measure import Measurement

    options = console.options.update(max_width=UNBOUNDED)
    console.width = max(console.width, Measurement.get(console, options, report).minimum)
