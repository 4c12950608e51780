"""Compiled files, built once for all processes and runs.

They are stored in the temporary folder, keyed by everything that they are made from.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def build_once(
    kind: str, suffix: str, made_from: tuple[object, ...], make: Callable[[Path], None]
) -> Path:
    """The path of a file that `make` writes, unless it exists."""
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"xprnn-{kind}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}{suffix}"
    if not target.exists():
        partial = folder / f"{key}-{os.getpid()}{suffix}"
        make(partial)
        partial.replace(target)  # atomic, even if another process builds it now
    return target
