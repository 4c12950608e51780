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

# by machine: where the control word is in glibc's fenv_t (of `fegetenv` and `fesetenv`), its
# control bits, and those that flush
LAYOUTS = {"x86_64": (28, 0xFFC0, 0x8040), "aarch64": (0, 0xFFFFFFFF, 1 << 24)}
FOUND = LAYOUTS.get(platform.machine()) if sys.platform == "linux" else None
UPWARD = {"x86_64": 1 << 14, "aarch64": 1 << 22}.get(platform.machine(), 0)  # rounding

needs_flushing = pytest.mark.skipif(
    not environment.flushes, reason="subnormal numbers are not flushed on this system"
)


def control() -> int:
    """The control bits; 0 where they are not reached."""
    place, mask, _ = FOUND or (0, 0, 0)
    return _word(_read(), place).value & mask if FOUND else 0


def is_flushing() -> bool:
    bits = FOUND[2] if FOUND else 0
    return bits != 0 and control() & bits == bits


@contextmanager
def with_bits(bits: int) -> Iterator[None]:
    """These control bits set too, as another library may set them."""
    before = _read()
    changed = (ctypes.c_char * 32)(*before)
    _word(changed, FOUND[0] if FOUND else 0).value |= bits
    _libm().fesetenv(changed)
    try:
        yield
    finally:
        _libm().fesetenv(before)


def flushing() -> Any:
    """The caller's own flush-to-zero."""
    return with_bits(FOUND[2] if FOUND else 0)


@contextmanager
def callers_environment() -> Iterator[None]:
    """Calls on NumPy compute in the environment of their caller, with its error state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backend, "activate", lambda self: nullcontext())
        yield


def subnormals_are_lost() -> bool:
    """Whether arithmetic here, Python's or NumPy's, takes subnormal numbers for zero."""
    least = float(np.nextafter(0.0, 1.0))
    single = np.full(5, np.finfo(np.float32).tiny) * np.float32(0.5)
    lost = {least * 1.0 == 0.0, bool((single == 0.0).any())}
    assert len(lost) == 1
    return lost.pop()


def subnormals(arrays: list[np.ndarray]) -> int:
    """How many numbers are subnormal, in arrays of float32 and float64."""
    small = [(a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny) for a in arrays]
    return sum(int(each.sum()) for each in small)


def in_a_thread(function: Callable[[], None]) -> None:
    """Call it in a new thread; raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:  # for the thread that waits
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


def _word(memory: Any, place: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_buffer(memory, place)
