"""Output of commands: complete with any encoding, any terminal width, and in pipes."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from ..diagnostics.tables import widen

if TYPE_CHECKING:
    from rich.console import Console

LINE = 80  # columns, without a terminal
REPLACEMENTS = {"…": "...", "—": "-"}  # rich truncates lines with the first


@contextmanager
def standard_output() -> Iterator[None]:
    """Redirect standard output of a command during the block.

    Characters that its encoding does not support are replaced, most of them by a backslash escape.
    If the pipe is closed by its reader (`xprnn info | head -1`), further output is discarded and
    the command continues, so that its exit status is unaffected.

    :raises OSError: writing fails for another reason, such as a full disk.
    """
    if sys.stdout is None:  # closed when the process was started
        yield
        return
    output = _Output(sys.stdout)
    with redirect_stdout(output):
        try:
            yield
        finally:
            output.flush()


class _Output:
    """A text stream that accepts every character, and discards output once its pipe is closed."""

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
        """Write or flush; after an error the stream discards all further output."""
        try:
            action()
        except OSError as error:
            # or the interpreter would fail again at exit, when it flushes what is buffered
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                raise


def _encodable(error: UnicodeError) -> tuple[str, int]:
    """The ASCII replacement of characters that an encoding does not support."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = [REPLACEMENTS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text]
    return "".join(escaped), error.end


codecs.register_error("xprnn.encodable", _encodable)


def show(report: Any) -> None:
    """Print a table or a group of them."""
    from rich.console import Console

    console = Console()
    widen(console, report)
    console.print(report)


def line_console() -> Console:
    """A console for a progress bar: as wide as the terminal, or `LINE` columns without one."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, LINE)
    return console
