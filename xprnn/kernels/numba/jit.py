"""How this folder's functions are compiled: options, types, the cache on disk, and saying so."""

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
from numba.extending import overload, register_jitable

_log = logging.getLogger("xprnn")

# Divisions as IEEE has them, not Python's error, which would keep loops scalar. Sums stay in
# their order: a fused multiply-add is all that a compiler may make of them.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz"},
}
INLINED: dict[str, Any] = {**OPTIONS, "forceinline": True}


class _Distinct(Compiler):
    """Compiles functions whose array arguments do not overlap where one of them is written."""

    def define_pipelines(self) -> Any:
        """Numba's own passes, with a flag for which `njit` has no option."""
        self.state.flags.noalias = True
        return super().define_pipelines()


# They stay plain functions, for where one is in a closure its bytes are part of the cache's key.
inlined: Any = register_jitable(**INLINED)
# The loop over a row's units. Without the promise each pair of arrays is checked for an overlap at
# every row, and a row of 32 units takes up to twice as long.
row: Any = numba.njit(pipeline_class=_Distinct, **OPTIONS)


def at(arrays: Any, n: Any) -> Any:
    """`arrays[n]`, or None where None is given instead: known when it is compiled."""


@overload(at, jit_options=INLINED)
def _at_by_type(arrays, n):  # type: ignore[no-untyped-def]
    if isinstance(arrays, types.NoneType):
        return lambda arrays, n: None
    return lambda arrays, n: arrays[n]


def read(number: Any, ndim: int) -> types.Array:
    """The type of an argument that is only read: any C-contiguous array fits."""
    return types.Array(number, ndim, "C", readonly=True, aligned=False)


def written(number: Any, ndim: int) -> types.Array:
    """The type of an argument that is written."""
    return types.Array(number, ndim, "C")


def number_of(dtype: np.dtype[Any]) -> Any:
    """Numba's type for float32 or float64."""
    return types.float32 if dtype.itemsize == 4 else types.float64


def compile_for(function: Callable[..., None], signature: tuple[Any, ...]) -> Any:
    """`function` compiled for these argument types, or taken from the cache on disk.

    It logs what it compiled to logger "xprnn", as information.

    :raises RuntimeError: what is kept on disk is damaged; the message names the folder.
    """
    # Numba looks for changes in the function's own file only; the name on disk tells of all
    function.__qualname__ = f"{function.__name__}-{_digest()}"
    try:
        dispatcher = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError as error:  # neither the package's folder nor the user's can be written
        _log.info("compiled code will not be kept: %s", error)
        dispatcher = numba.njit(**OPTIONS)(function)
    start = time.perf_counter()
    try:
        dispatcher.compile(signature)
    except OSError as error:  # the disk is full, say, or the folder may not be looked into
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
    """What the sources of this folder are, in eight letters."""
    files = [f for f in resources.files(__package__).iterdir() if f.name.endswith(".py")]
    texts = [f.read_bytes() for f in sorted(files, key=lambda f: f.name)]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:8]
