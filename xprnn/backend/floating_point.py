"""The floating-point environment of a call on a CPU: subnormals are flushed, no errors are raised.

A gradient that vanishes over many steps becomes subnormal, smaller than the smallest normal number
(1.2e-38 in float32, 2.2e-308 in float64), and many processors need a hundred times as long for an
operation on subnormal numbers. Within a call they are treated as zero, as operands and as results
(denormals-are-zero and flush-to-zero). Therefore

- a result whose intermediate results are all normal numbers or zero is bitwise unchanged;
- the absolute error of any other result is at most (terms) x (smallest normal number) x (largest
  factor): each term of a sum loses less than the smallest normal number, times its later factors;
- the bits do not depend on the number of xprnn's threads.

A call does not depend on `np.errstate`, `np.seterr` or warnings filters either: infinity and NaN
appear in results as IEEE 754 specifies, without an exception or a warning. An overflow is infinity,
and what is computed from it is infinity or NaN.

When a call ends, also by an exception, the thread's control bits and NumPy's error state are
restored: a thread that flushed before the call does so after it. (A keyboard interrupt in the
microsecond in which a call ends may leave those of the call in place.)

Conversions and copies (`xprnn.asarray`, `to`, `state_dict`, `load_state_dict`, files) are not
arithmetic: they preserve subnormal numbers exactly, and overflow as NumPy's `astype` does.

Subnormal numbers are flushed on Linux with glibc 2.25 or later, on x86-64 (MXCSR) and AArch64
(FPCR), in the calling thread and in xprnn's own threads; Numba's code for a single step sets MXCSR
itself. On other systems (musl, macOS, Windows) they are computed as IEEE 754 specifies. The error
state is set everywhere. A BLAS's own threads are not affected: their part of a large product may
contain subnormal numbers, within the same bound, and the next operation treats them as zero. On a
GPU nothing is set: CuPy compiles its kernels and xprnn's with `-ftz=true`, which flushes float32
but not float64; cuBLAS's products are as NVIDIA compiled them.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from contextvars import ContextVar, copy_context
from threading import local
from typing import Any

import numpy as np

# By machine, in the 64 bits of glibc's femode_t: the bits that flush operands and results, and
# those of MXCSR's exception flags, which are not control bits and which fesetmode does not set
_FLUSHING = {"x86_64": 0x8040 << 32, "aarch64": 1 << 24}
_FLAGS = {"x86_64": 0x3F << 32, "aarch64": 0}


class _ErrorState:
    """The interface of a context variable, for a NumPy that stores its error state elsewhere."""

    def get(self) -> dict[str, Any]:
        return dict(np.geterr())

    def set(self, settings: dict[str, Any]) -> None:
        np.seterr(**settings)


def _find_error_state() -> tuple[Any, Any]:
    """The context variable of `np.errstate`, and its value when all errors are ignored.

    `np.errstate` takes 2 microseconds, a fifth of a small step; setting the variable takes a tenth.
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
    """The environment of a call, for one `with` block; this class does not flush subnormals."""

    __slots__ = ("_settings",)

    flushes = False  # whether subnormal numbers are treated as zero

    def __enter__(self) -> None:
        """Set it in the calling thread."""
        self._settings = _error_state.get()
        _error_state.set(_ignoring)

    def __exit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> None:
        """Restore the caller's."""
        _error_state.set(self._settings)


def _flushing_environment() -> type[Environment]:
    """An `Environment` that flushes, where this system supports it."""
    machine = platform.machine()
    if sys.platform != "linux" or sys.maxsize < 2**32 or machine not in _FLUSHING:
        return Environment
    try:  # PyDLL does not release the GIL: a call takes a tenth of a microsecond
        library = ctypes.PyDLL("libm.so.6")
        get_mode, set_mode = library.fegetmode, library.fesetmode
    except (OSError, AttributeError):  # another C library, or a glibc before 2.25
        return Environment
    get_mode.restype = set_mode.restype = None
    flushing, control = _FLUSHING[machine], ~_FLAGS[machine]

    class ThreadBuffer(local):
        """A buffer of the thread that `fegetmode` writes to, and its address."""

        def __init__(self) -> None:
            mode = ctypes.c_uint64()
            self.mode = mode, ctypes.byref(mode)

    buffer = ThreadBuffer()
    addresses: dict[int, tuple[Any, Any]] = {}  # by mode: of it, and of the same with flushing

    def store(mode: int) -> tuple[Any, Any]:
        both = ctypes.c_uint64(mode), ctypes.c_uint64(mode | flushing)
        return addresses.setdefault(mode, (ctypes.byref(both[0]), ctypes.byref(both[1])))

    class Flushing(Environment):
        __slots__ = ("_before",)

        flushes = True

        def __enter__(self) -> None:
            self._settings = _error_state.get()
            current, address = buffer.mode
            get_mode(address)
            mode = current.value & control
            self._before, during = addresses.get(mode) or store(mode)
            try:
                _error_state.set(_ignoring)
                set_mode(during)
            except BaseException:  # an interrupt: the block is not entered, and not exited either
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
    np.finfo(_dtype)  # NumPy computes this once, at first use, which must not be while flushing
