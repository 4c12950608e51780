"""What commands print: whole on a stream of any encoding, on a terminal of any width, in a pipe."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNBOUNDED = 10_000  # columns
LINE = 80  # columns, of what is not a terminal
ENCODABLE = {"…": "...", "—": "-"}  # the first is rich's, where a line is cut


@contextmanager
def standard_output() -> Iterator[None]:
    """Standard output of a command, until the block ends.

    Characters that its encoding lacks are replaced, most of them by a backslash and their number.
    Where its reader has gone (`xprnn info | head -1`) what is printed is dropped, and the work
    goes on: the exit status is that of the work.

    :raises OSError: it cannot be written for another reason, such as a full disk.
    """
    if sys.stdout is None:  # it was closed when the process began
        yield
        return
    output = _Output(sys.stdout)
    with redirect_stdout(output):
        try:
            yield
        finally:
            output.flush()


class _Output:
    """A text stream that takes every character, and goes on when its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        encodable = text.encode(encoding, "xprnn.encodable").decode(encoding)
        self._try(lambda: self._stream.write(encodable))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            # what is still in its buffer must not fail again when the interpreter ends
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                raise


def _encodable(error: UnicodeError) -> tuple[str, int]:
    """For characters that an encoding lacks: what stands for them, in ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    found = [ENCODABLE.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking]
    return "".join(found), error.end


codecs.register_error("xprnn.encodable", _encodable)


def show(report: Any) -> None:
    """Print a table or a group of them."""
    from rich.console import Console

    console = Console()
    widen(console, report)
    console.print(report)


def unbroken(table: Table) -> Table:
    """A table with its rows, which from now on takes the width that one line for each needs."""
    from rich.console import Console
    from rich.measure import Measurement

    wide = Console(width=UNBOUNDED)
    table.min_width = Measurement.get(wide, wide.options, table).maximum
    return table


def widen(console: Console, report: Any) -> None:
    """Make a console as wide as a report needs, so that no cell is cut: a terminal wraps lines."""
    from rich.measure import Measurement

    options = console.options.update(max_width=UNBOUNDED)
    console.width = max(console.width, Measurement.get(console, options, report).minimum)


def line_console() -> Console:
    """A console for a progress bar: on a terminal as wide as that, else as wide as any line."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LINE)
    return console
