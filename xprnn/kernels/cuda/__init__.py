"""Fused kernels for NVIDIA GPUs: a header of arithmetic per cell, and what launches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...arithmetic import PrecisionPolicy
from ...cells import Cell
from .cells import POINTWISE
from .table import KERNELS

if TYPE_CHECKING:
    from ...backend.cupy import CupyBackend
    from .sequence import SequenceKernels


def refusal(arithmetic: PrecisionPolicy) -> str:
    """Nothing stands against them: they take every type that the layer takes."""
    return ""


def fused_cells() -> Mapping[str, Cell]:
    """The cells whose parts are one kernel each, by name."""
    return POINTWISE


def prepare(implementation: str, cell: str, arithmetic: PrecisionPolicy, record: bool) -> bool:
    """Nothing is made ahead: CuPy compiles a kernel when it is first launched."""
    return True


def has_sequences(cell: str) -> bool:
    """Whether there are sequence kernels for a cell, whatever they fit."""
    return (cell, "forward") in KERNELS


def sequences(cell: str, backend: CupyBackend, arithmetic: PrecisionPolicy) -> SequenceKernels:
    """Those for a cell."""
    from .sequence import SequenceKernels

    return SequenceKernels(backend, cell, arithmetic)


__all__ = ["POINTWISE", "fused_cells", "has_sequences", "prepare", "refusal", "sequences"]
