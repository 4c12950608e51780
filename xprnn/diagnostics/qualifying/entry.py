"""The public function; what it needs is imported when it is called."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING

from ...backend import BackendName
from ...backend.exports import exported_from

if TYPE_CHECKING:
    from .report import Progress, QualifyReport


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
    and of simultaneous calls, NaN and infinity. What was right is timed, interleaved. A
    process that does not answer is killed and one that ends is replaced; both cost a row. It
    stops after two minutes on a CPU and three on a GPU, and leaves out what it has not reached.

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
    :raises RuntimeError: nothing was measured before the time was over; no file is written.
    """
    from .run import check_outputs, measure, write  # which `import xprnn` does not need

    check_outputs(output, share)
    report = measure(backend, cells, quick=quick, progress=progress)
    return write(report, output, share)
