"""Floating-point control bits of the calling thread, set within compiled code in nanoseconds.

For functions that take a few microseconds; others are called in `floating_point.environment`.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ...backend.floating_point import environment

# on other machines the caller enters the environment
FLUSHES = environment.flushes and platform.machine() == "x86_64"
_FLUSHING = 0x8040  # of MXCSR: flush-to-zero and denormals-are-zero


@intrinsic
def flush_subnormals(typing: Any) -> Any:
    """Flush subnormal numbers from here on; return the previous control word, for `restore`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        if not FLUSHES:
            return number(0)
        address = cgutils.alloca_once(builder, number)
        _call(builder, "llvm.x86.sse.stmxcsr", address)
        before = builder.load(address)
        _set(builder, builder.or_(before, number(_FLUSHING)))
        return before

    return types.uint32(), generate


@intrinsic
def restore(typing: Any, before: Any) -> Any:
    """Restore the control word `before`, which `flush_subnormals` returned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if FLUSHES:
            _set(builder, arguments[0])
        return context.get_dummy_value()

    return types.none(types.uint32), generate


def _set(builder: Any, word: Any) -> None:
    address = cgutils.alloca_once_value(builder, word)
    _call(builder, "llvm.x86.sse.ldmxcsr", address)


def _call(builder: Any, name: str, address: Any) -> None:
    pointer = cgutils.voidptr_t
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [builder.bitcast(address, pointer)])
