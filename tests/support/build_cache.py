"""What takes long to compile, compiled once for all processes and runs.

It is kept in the folder of temporary files, by all that it is made from.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def once(
    kind: str, suffix: str, made_from: tuple[object, ...], make: Callable[[Path], None]
) -> Path:
    """The file that `make` writes to a path, made where it is not there yet."""
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"xprnn-{kind}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}{suffix}"
    if not target.exists():
        mine = folder / f"{key}-{os.getpid()}{suffix}"
        make(mine)
        mine.replace(target)  # whole or not at all, also where another process makes it now
    return target
