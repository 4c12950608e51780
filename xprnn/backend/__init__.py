"""Array modules and devices: NumPy on the CPU, CuPy on NVIDIA GPUs.

A `Backend` is an array module `xp` together with a device. The other packages write their
equations in terms of `xp`, and use a backend only to allocate, to transfer and to synchronise. A
new backend is one file here and one line in `registry.BACKENDS`.
"""

from .arrays import (
    AnyArray,
    AnyDTypeLike,
    Array,
    BackendName,
    ComputeDTypeLike,
    DTypeLike,
    Integers,
    Lengths,
    Nonlinearity,
    Pair,
    PairLike,
    Precision,
    Rows,
    States,
    StatesLike,
    StateTypes,
)
from .base import ALIGNMENT, Backend, BackendUnavailableError
from .cooperative import KernelStoppedError
from .dlpack import device_text, dlpack_device
from .registry import (
    BACKENDS,
    asarray,
    auto_choice,
    backend_of,
    get_backend,
    owning_backend,
    synchronize,
    to_numpy,
    use_backend,
)

__all__ = [
    "ALIGNMENT",
    "BACKENDS",
    "AnyArray",
    "AnyDTypeLike",
    "Array",
    "Backend",
    "BackendName",
    "BackendUnavailableError",
    "ComputeDTypeLike",
    "DTypeLike",
    "Integers",
    "KernelStoppedError",
    "Lengths",
    "Nonlinearity",
    "Pair",
    "PairLike",
    "Precision",
    "Rows",
    "StateTypes",
    "States",
    "StatesLike",
    "asarray",
    "auto_choice",
    "backend_of",
    "device_text",
    "dlpack_device",
    "get_backend",
    "owning_backend",
    "synchronize",
    "to_numpy",
    "use_backend",
]
