"""Fused kernels for the CPU, compiled by Numba, which is imported when one of them is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ...arithmetic import Arithmetic
from ...backend import Backend
from ...cells import Cell

if TYPE_CHECKING:
    from .sequence import SequenceKernels

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "lstm")
STEP = (*SEQUENCE, "gru_reset_before")


def refusal(arithmetic: Arithmetic) -> str:
    """Why none of them serves in these types on this machine; "" where they do."""
    if arithmetic.narrow:
        return f"the CPU's kernels compute in float32 or float64, not in {arithmetic.compute_dtype}"
    return _lacks()


@cache
def _lacks() -> str:
    """Why Numba cannot be used, or "": it is imported."""
    if find_spec("numba") is None:
        return "fused kernels for the CPU need Numba, which is not installed; " + (
            "pip install xprnn[numba]"
        )
    try:
        import numba  # noqa: F401
    except ImportError as error:  # it says so of a NumPy that it does not know
        return f"Numba cannot be imported: {error}"
    return ""


def fused_cells() -> Mapping[str, Cell]:
    """The cells whose parts are one compiled function each, by name."""
    from .cells import POINTWISE

    return POINTWISE


def has_sequences(cell: str) -> bool:
    """Whether there are sequence kernels for a cell."""
    return cell in SEQUENCE


def refuse_step(cell: str, arithmetic: Arithmetic) -> str | None:
    """Why no kernel takes a step of all layers of a cell in one call; None: `step` has one."""
    return refusal(arithmetic) or (None if cell in STEP else f"no kernel of a step for '{cell}'")


def step_outdone(cell: str, sizes: tuple[int, int, int, int]) -> str:
    """Why "auto" leaves the steps of a stack (L, N, I, H) to NumPy; "" where it does not."""
    from .step import outdone

    return outdone(cell, sizes)


def sequences(cell: str, backend: Backend, arithmetic: Arithmetic) -> SequenceKernels:
    """Those for a cell."""
    from .sequence import SequenceKernels

    return SequenceKernels(backend, cell, arithmetic)


def compilations() -> list[Callable[[], Any]]:
    """What compiles each kernel ahead, or takes it from the cache on disk, if it is called.

    :raises RuntimeError: Numba cannot be used; the message says why.
    """
    if reason := _lacks():
        raise RuntimeError(reason)
    from . import cells, sequence, step

    return [*sequence.compilations(), *step.compilations(), *cells.compilations()]


__all__ = [
    "compilations",
    "fused_cells",
    "has_sequences",
    "refusal",
    "refuse_step",
    "sequences",
    "step_outdone",
]
