"""The floating-point environment of a call on a CPU: subnormal numbers are zero, nothing is raised.

A gradient that vanishes over many steps becomes subnormal, smaller than the smallest normal number
(1.2e-38 in float32, 2.2e-308 in float64), and then many processors take a hundred times as long
for each operation on it. Within a call such numbers are zero, as operands and as results
(denormals-are-zero and flush-to-zero). So

- a result all of whose intermediate results are normal numbers or zero has the bits it would have
  without;
- the absolute error of any other is at most (terms) x (smallest normal number) x (largest factor):
  each term of a sum loses less than the smallest normal number, times what it is multiplied with
  afterwards;
- the bits are the same by any number of xprnn's threads.

Nor does a call depend on `np.errstate`, `np.seterr` or warnings filters: infinity and NaN come as
IEEE 754 has them, in the results, without an exception and without a warning. An overflow is
infinity, and what is computed from it is infinity or NaN.

Afterwards the thread's control bits and NumPy's error state are the caller's again, also where the
call raised: a thread that flushed before the call does so after it. (An interrupt from the keyboard
that comes in the microsecond in which a call ends may leave them as they were within it.)

Conversions and copies (`xprnn.asarray`, `to`, `state_dict`, `load_state_dict`, files) are no
arithmetic: they keep subnormal numbers to the last bit, and overflow as NumPy's `astype` does.

Subnormal numbers are flushed on Linux with glibc 2.25 or later, on x86-64 (MXCSR) and AArch64
(FPCR), in the thread that calls and in xprnn's own threads; Numba's code for a single step sets
MXCSR itself. Elsewhere, with musl, on macOS and on
Windows, nothing changes: they are computed as IEEE 754 has them. The error state is set everywhere.
A BLAS's own threads are not reached: their part of a large product may hold subnormal numbers,
within the same bound, and the next operation takes them for zero. On a GPU nothing is set: CuPy
compiles its kernels and xprnn's with `-ftz=true`, by which float32's are flushed and float64's are
not; cuBLAS's products are as NVIDIA compiled them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from contextvars import ContextVar, copy_context
from threading import local
from typing import Any

import numpy as np

# By machine, in the 64 bits that hold glibc's femode_t: the bits that flush operands and results,
# and those that are no control bits but MXCSR's exception flags, which fesetmode leaves alone
_FLUSHING = {"x86_64": 0x8040 << 32, "aarch64": 1 << 24}
_FLAGS = {"x86_64": 0x3F << 32, "aarch64": 0}


class _ErrorState:
    """`np.errstate` as a context variable is used, for a NumPy that keeps its state elsewhere."""

    def get(self) -> dict[str, Any]:
        return dict(np.geterr())

    def set(self, settings: dict[str, Any]) -> None:
        np.seterr(**settings)


def _find_error_state() -> tuple[Any, Any]:
    """The context variable that `np.errstate` sets, and what it sets to have all errors ignored.

    `np.errstate` itself takes 2 microseconds, a fifth of a small step; this takes a tenth of that.
    """
    settings: dict[str, Any] = {"all": "ignore"}
    before = copy_context()
    with np.errstate(**settings):
        inside = copy_context()
    changed: list[ContextVar[Any]] = [v for v in inside if inside[v] is not before.get(v)]
    if len(changed) == 1:
        return changed[0], inside[changed[0]]
    return _ErrorState(), settings


_error_state, _ignoring = _find_error_state()


class Environment:
    """The environment of a call, for one `with` block; this one leaves subnormal numbers alone."""

    __slots__ = ("_settings",)

    flushes = False  # whether it takes subnormal numbers for zero

    def __enter__(self) -> None:
        """Begin it in the calling thread."""
        self._settings = _error_state.get()
        _error_state.set(_ignoring)

    def __exit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        """Go back to the caller's."""
        _error_state.set(self._settings)


def _flushing_environment() -> type[Environment]:
    """An `Environment` that flushes, where that is possible on this system."""
    machine = platform.machine()
    if sys.platform != "linux" or sys.maxsize < 2**32 or machine not in _FLUSHING:
        return Environment
    try:  # PyDLL keeps Python's lock: a call takes a tenth of a microsecond
        library = ctypes.PyDLL("libm.so.6")
        get_mode, set_mode = library.fegetmode, library.fesetmode
    except (OSError, AttributeError):  # another C library, or a glibc before 2.25
        return Environment
    get_mode.restype = set_mode.restype = None
    flushing, control = _FLUSHING[machine], ~_FLAGS[machine]

    class Own(local):
        """Where a thread's mode is read to."""

        def __init__(self) -> None:
            mode = ctypes.c_uint64()
            self.mode = mode, ctypes.byref(mode)

    own = Own()
    places: dict[int, tuple[Any, Any]] = {}  # of each mode, and of the same with flushing

    def store(mode: int) -> tuple[Any, Any]:
        both = ctypes.c_uint64(mode), ctypes.c_uint64(mode | flushing)
        return places.setdefault(mode, (ctypes.byref(both[0]), ctypes.byref(both[1])))

    class Flushing(Environment):
        __slots__ = ("_before",)

        flushes = True

        def __enter__(self) -> None:
            self._settings = _error_state.get()
            mine, place = own.mode
            get_mode(place)
            mode = mine.value & control
            self._before, during = places.get(mode) or store(mode)
            try:
                _error_state.set(_ignoring)
                set_mode(during)
            except BaseException:  # an interrupt: no block begins, and nothing else would end it
                self.__exit__()
                raise

        def __exit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
            try:
                set_mode(self._before)
            finally:
                _error_state.set(self._settings)

    return Flushing


environment: type[Environment] = _flushing_environment()
for _dtype in (np.float16, np.float32, np.float64, np.longdouble):
    np.finfo(_dtype)  # NumPy works out what it knows of a type once, and not where it is flushed
