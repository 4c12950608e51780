"""The CPU's kernels as a `KernelPackage` of `kernels/interface.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ...backend import Backend, optional
from ...backend.processors import processor_name, usable
from ...cells import Cell, definition
from ...cells.definition.defined_cell import DefinedCell
from ...core.precision import PrecisionPolicy
from .. import codegen
from ..interface import Unsupported
from ..qualification import sources_digest
from .table import SEQUENCE, STEP

if TYPE_CHECKING:
    from .sequence import NumbaRunner

# Packages that kernels are made from
SOURCES = __package__, codegen.__name__, definition.__name__
_log = logging.getLogger("xprnn")
_failed: list[Unsupported] = []  # why a kernel could not be compiled; from then on none is used


def unsupported(precision: PrecisionPolicy) -> Unsupported | None:
    """Why no kernel can be used with this precision on this machine."""
    if precision.is_mixed:
        dtype = precision.compute_dtype
        return Unsupported(f"the CPU's kernels compute in float32 or float64, not in {dtype}")
    return unusable()


def identity(backend: Backend) -> dict[str, str]:
    """What a qualification depends on."""
    import numba

    return {
        "device": processor_name(),
        "numba": numba.__version__,
        "numpy": np.__version__,
        "threads": str(usable()),  # with others, other implementations are faster
        "sources": sources_digest(*SOURCES),
    }


def unusable() -> Unsupported | None:
    """Why Numba, or a kernel, cannot be used in this process."""
    return _numba_unusable() or next(iter(_failed), None)


@cache
def _numba_unusable() -> Unsupported | None:
    """Why Numba cannot be used; the first call imports it, and logs a failure."""
    try:
        numba = optional.load("numba", "xprnn[numba]")
        for name in ("cells", "sequence", "step"):  # these import further modules of Numba
            optional.load(f"{__package__}.{name}")
    except optional.OptionalPackageError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError) or error.__cause__.name != "numba":
            _warn(str(error))
        return Unsupported(f"fused kernels for the CPU need Numba; {error}")
    if numba.config.DISABLE_JIT:
        return _warn("NUMBA_DISABLE_JIT is set: Numba compiles nothing")
    return None


def _warn(why: str) -> Unsupported:
    """Log a reason, and return it."""
    _log.warning("no compiled kernels on the CPU, only the plain code: %s", why)
    return Unsupported(why)


def prepare(implementation: str, cell: Cell, precision: PrecisionPolicy, record: bool) -> bool:
    """Compile the kernels of a call at their first use; False if that failed.

    `unsupported` then gives the reason.

    :param implementation: "pointwise", "sequence", or "step" for a step of all layers.
    """
    return not _failed and _compiled(implementation, cell, precision.dtype, record)


@cache
def _compiled(implementation: str, cell: Cell, dtype: np.dtype[Any], record: bool) -> bool:
    from . import cells, sequence, step

    try:
        if implementation == "pointwise":
            needed = cells.needed(cell.name, dtype, record)
        else:
            module = sequence if implementation == "sequence" else step
            needed = module.needed(cell, dtype, record)
        for compilation in needed:
            compilation()
    except MemoryError:
        raise
    except Exception as error:  # of Numba, of LLVM or of the cache on disk
        why = f"the CPU's kernels cannot be compiled: {optional.reason(error)}"
        _failed.append(_warn(why))
        return False
    return True


def fused_cell(cell: Cell, precision: PrecisionPolicy, record: bool) -> Cell | None:
    """A built-in cell whose pointwise ops are one compiled function each."""
    from .cells import POINTWISE

    return POINTWISE.get(cell.name)


def has_sequence_kernels(cell: Cell) -> bool:
    """Whether there are sequence kernels for a cell."""
    return isinstance(cell, DefinedCell) or cell.name in SEQUENCE


def step_unsupported(cell: Cell, precision: PrecisionPolicy) -> Unsupported | None:
    """Why no kernel runs a step of all layers of a cell in one call."""
    if isinstance(cell, DefinedCell) or cell.name in STEP:
        return unsupported(precision)
    return unsupported(precision) or Unsupported(f"no step kernel for cell '{cell.name}'")


def step_not_profitable(cell: Cell, sizes: tuple[int, int, int, int]) -> Unsupported | None:
    """Why "auto" uses NumPy for the steps of a stack (L, N, I, H)."""
    from .step import not_profitable

    return not_profitable(cell, sizes)


def layer_runner(cell: Cell, backend: Backend, precision: PrecisionPolicy) -> NumbaRunner:
    """The runner of a cell."""
    from .sequence import NumbaRunner

    return NumbaRunner(backend, cell, precision)


def compilations() -> list[Callable[[], Any]]:
    """Functions that each compile a kernel or load it from the cache on disk.

    :raises RuntimeError: Numba cannot be used; the message says why.
    """
    if reason := unusable():
        raise RuntimeError(str(reason))
    from . import cells, sequence, step

    return [*sequence.compilations(), *step.compilations(), *cells.compilations()]
