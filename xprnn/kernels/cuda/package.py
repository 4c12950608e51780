"""The CUDA kernels as a `KernelPackage` of `kernels/interface.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...cells import Cell, definition
from ...cells.definition.defined_cell import DefinedCell
from ...core.precision import PrecisionPolicy
from .. import codegen
from ..interface import Unsupported
from ..qualification import sources_digest
from .cells import POINTWISE
from .table import KERNELS

if TYPE_CHECKING:
    from ...backend.cupy import CupyBackend
    from .sequence import CudaRunner

# Packages that kernels are made from
SOURCES = __package__, codegen.__name__, definition.__name__


def unsupported(precision: PrecisionPolicy) -> Unsupported | None:
    """None: the pointwise kernels support every dtype of a layer."""
    return None


def identity(backend: CupyBackend) -> dict[str, str]:
    """What a qualification depends on."""
    cuda = backend.xp.cuda.runtime
    name, capability, _ = backend.device_facts()
    return {
        "device": name,
        "capability": capability,
        "driver": str(cuda.driverGetVersion()),
        "runtime": str(cuda.runtimeGetVersion()),
        "cupy": str(backend.xp.__version__),
        "sources": sources_digest(*SOURCES),
    }


def fused_cell(cell: Cell, precision: PrecisionPolicy, record: bool) -> Cell | None:
    """The cell with one kernel for what is between two products; generated for a definition."""
    if isinstance(cell, DefinedCell):
        from .generated import generated_cell

        return generated_cell(cell, record, precision.is_mixed)
    return POINTWISE.get(cell.name)


def prepare(implementation: str, cell: Cell, precision: PrecisionPolicy, record: bool) -> bool:
    """True: CuPy compiles a kernel at its first launch."""
    return True


def has_sequence_kernels(cell: Cell) -> bool:
    """Whether there are sequence kernels for a cell, for any sizes."""
    return (cell.name, "forward") in KERNELS


def layer_runner(cell: Cell, backend: CupyBackend, precision: PrecisionPolicy) -> CudaRunner:
    """The runner of a cell."""
    from .sequence import CudaRunner

    return CudaRunner(backend, cell, precision)
