"""The calling thread's floating-point control bits, and calls in the caller's environment."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

from tests.support.implementations import new_thread
from xprnn.backend import Backend
from xprnn.backend.floating_point import environment

# by machine: the offset of the control word in glibc's fenv_t (of `fegetenv` and `fesetenv`), its
# control bits, and those that flush subnormal numbers
LAYOUTS = {"x86_64": (28, 0xFFC0, 0x8040), "aarch64": (0, 0xFFFFFFFF, 1 << 24)}
FENV_LAYOUT = LAYOUTS.get(platform.machine()) if sys.platform == "linux" else None
UPWARD = {"x86_64": 1 << 14, "aarch64": 1 << 22}.get(platform.machine(), 0)  # rounding

needs_flushing = pytest.mark.skipif(
    not environment.flushes, reason="subnormal numbers are not flushed on this system"
)


def control() -> int:
    """The control bits, or 0 if they are not accessible."""
    offset, mask, _ = FENV_LAYOUT or (0, 0, 0)
    return _word(_read(), offset).value & mask if FENV_LAYOUT else 0


def is_flushing() -> bool:
    bits = FENV_LAYOUT[2] if FENV_LAYOUT else 0
    return bits != 0 and control() & bits == bits


@contextmanager
def with_bits(bits: int) -> Iterator[None]:
    """Set these control bits in addition, as another library may do."""
    before = _read()
    changed = (ctypes.c_char * 32)(*before)
    _word(changed, FENV_LAYOUT[0] if FENV_LAYOUT else 0).value |= bits
    _libm().fesetenv(changed)
    try:
        yield
    finally:
        _libm().fesetenv(before)


def flushing() -> Any:
    """Flush-to-zero, set by the caller."""
    return with_bits(FENV_LAYOUT[2] if FENV_LAYOUT else 0)


@contextmanager
def callers_environment() -> Iterator[None]:
    """Let calls on NumPy compute in the environment and error state of their caller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "activate", lambda self: nullcontext())
        yield


def subnormals_are_lost() -> bool:
    """Whether Python and NumPy treat subnormal numbers as zero in this thread."""
    least = float(np.nextafter(0.0, 1.0))
    single = np.full(5, np.finfo(np.float32).tiny) * np.float32(0.5)
    lost = {least * 1.0 == 0.0, bool((single == 0.0).any())}
    assert len(lost) == 1
    return lost.pop()


def subnormals(arrays: list[np.ndarray]) -> int:
    """The number of subnormal elements in arrays of float32 and float64."""
    small = [(a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny) for a in arrays]
    return sum(int(each.sum()) for each in small)


def in_a_thread(function: Callable[[], None]) -> None:
    """Call a function in a new thread; re-raise its exception."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # re-raised by the waiting thread
            errors.append(error)

    other = new_thread(run)
    other.start()
    other.join()
    if errors:
        raise errors[0]


def _libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")


def _read() -> Any:
    memory = (ctypes.c_char * 32)()
    assert _libm().fegetenv(memory) == 0
    return memory


def _word(memory: Any, offset: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_buffer(memory, offset)
