"""How this package's functions are compiled: options, argument types, disk cache and logging."""

from __future__ import annotations

import hashlib
import logging
import pickle
import time
from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.compiler import Compiler
from numba.extending import register_jitable

_log = logging.getLogger("xprnn")

# Division by zero follows IEEE 754 instead of raising, which would keep loops scalar. Sums keep
# their order: the compiler may only contract them to fused multiply-adds. Views of arrays are not
# counted: with one row, that took half of the time. Hence a function can allocate or return none.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "_nrt": False,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}
INLINED: dict[str, Any] = {**OPTIONS, "forceinline": True}


class _NoAlias(Compiler):
    """Compiles functions whose array arguments do not overlap where one of them is written."""

    def define_pipelines(self) -> Any:
        """Return Numba's default passes, with a flag for which `njit` has no option."""
        self.state.flags.noalias = True
        return super().define_pipelines()


# Plain functions, no dispatchers: if a closure holds one, its bytecode is part of the cache key.
inlined: Any = register_jitable(**INLINED)
# For the loop over a row's units. Without `noalias` each pair of arrays is checked for overlap at
# every row, and a row of 32 units takes up to twice as long.
row: Any = numba.njit(pipeline_class=_NoAlias, **OPTIONS)
# For a sum over a row's units, whose order the compiler chooses: the same in every call
summed: Any = numba.njit(**{**OPTIONS, "fastmath": {"contract", "nsz", "reassoc"}})


def read(number: Any, ndim: int) -> types.Array:
    """Return the type of an `in` argument: any C-contiguous array."""
    return types.Array(number, ndim, "C", readonly=True, aligned=False)


def written(number: Any, ndim: int) -> types.Array:
    """Return the type of an `out` or `inout` argument."""
    return types.Array(number, ndim, "C")


def number_of(dtype: np.dtype[Any]) -> Any:
    """Return Numba's type for float32 or float64."""
    return types.float32 if dtype.itemsize == 4 else types.float64


def compile_for(function: Callable[..., None], signature: tuple[Any, ...]) -> Any:
    """Compile `function` for these argument types, or load it from the disk cache.

    A compilation is logged to logger "xprnn" at level INFO.

    :raises RuntimeError: the disk cache is damaged; the message names the folder.
    """
    # Numba detects changes in the function's own file only; the name on disk covers all files
    function.__qualname__ = f"{function.__name__}-{_digest()}"
    try:
        dispatcher = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError as error:  # neither the package's folder nor the user's can be written
        _log.info("compiled code will not be kept: %s", error)
        dispatcher = numba.njit(**OPTIONS)(function)
    start = time.perf_counter()
    try:
        dispatcher.compile(signature)
    except OSError as error:  # such as a full disk or a folder without permission
        _log.info("compiled code will not be kept: %s", error)
        if signature not in dispatcher.overloads:
            dispatcher = numba.njit(**OPTIONS)(function)
            dispatcher.compile(signature)
    except (EOFError, pickle.UnpicklingError) as error:
        folder, why = dispatcher.stats.cache_path, f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"{function.__name__}: its compiled code in {folder} is damaged ({why}); "
            "delete that folder: it is compiled anew"
        ) from error
    dispatcher.disable_compile()
    if not dispatcher.stats.cache_hits:
        seconds = time.perf_counter() - start
        _log.info("compiled %s for the CPU in %.1f s", function.__name__, seconds)
    return dispatcher


@cache
def _digest() -> str:
    """Return a hash of the sources of this package, eight hexadecimal digits."""
    files = [f for f in resources.files(__package__).iterdir() if f.name.endswith(".py")]
    texts = [f.read_bytes() for f in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:8]
