"""The table that chooses who serves a cell: the plain code of `cells/`, or a faster kernel.

There are two seams, and the plain code is the fallback and the oracle of both: "pointwise"
(the gates of one step in one kernel) and "sequence" (all steps in one launch). No kernel is
registered yet, so the plain code, "reference", serves everything and `explain` says so.
"""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

ENVIRONMENT_VARIABLE = "XPRNN_KERNELS"
IMPLEMENTATIONS = ("reference", "pointwise", "sequence")


class KernelUnavailableError(RuntimeError):
    """`XPRNN_KERNELS` forces an implementation that cannot serve this call."""


class Choice(NamedTuple):
    """Who serves, and why each faster implementation does not."""

    implementation: str
    reasons: tuple[tuple[str, str], ...]


def choose(cell: str, backend: str) -> Choice:
    """Who serves the cell of this name on the backend of this name.

    :raises ValueError: `XPRNN_KERNELS` is not auto, reference, pointwise or sequence.
    :raises KernelUnavailableError: it forces what is not there.
    """
    return _choose(cell, backend, os.environ.get(ENVIRONMENT_VARIABLE) or "auto")


@cache
def _choose(cell: str, backend: str, forced: str) -> Choice:
    if forced not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}: expected auto, {', '.join(IMPLEMENTATIONS)}; got {forced!r}"
        )
    missing = f"no kernel for cell '{cell}' on backend '{backend}' in this version"
    if forced in ("pointwise", "sequence"):
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={forced}: {missing}")
    return Choice("reference", tuple((name, missing) for name in IMPLEMENTATIONS[1:]))
