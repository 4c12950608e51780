"""Compare the generated kernels of the built-in cells with those that are written by hand.

    python -m tests.support.compare_generated [ARCHITECTURE ...]

It compiles both with NVRTC, without a GPU, for 9.0 by default ("90"), and prints a table of
registers, bytes spilled and machine instructions.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.support.nvrtc import FLAGS, Usage, cupy_source, usages
from tests.support.pointwise_cases import TYPES
from xprnn.cells.shipped import builtin_cell
from xprnn.kernels.codegen.cuda import KernelCall
from xprnn.kernels.cuda import generated, pointwise

# In the order of the launches of a step forward and backward
WRITTEN = {
    "rnn_tanh": ("rnn_tanh_forward_gates", "rnn_tanh_backward_gates"),
    "rnn_relu": ("rnn_relu_forward_gates", "rnn_relu_backward_gates"),
    "gru": ("gru_forward_gates_bias", "gru_backward_gates"),
    "gru_reset_before": (
        *("gru_forward_reset", "gru_forward_candidate"),
        *("gru_backward_candidate", "gru_backward_reset"),
    ),
    "lstm": ("lstm_forward_gates", "lstm_backward_gates"),
}
H = 64  # which is no part of a kernel
INSTRUCTION, NOP = 16, 0x918  # bytes of an instruction; the lower 12 bits of one without effect


class Compiled(NamedTuple):
    """A kernel as machine code."""

    usage: Usage
    instructions: int


def compile_kernel(kernel: Any, dtype: str, architecture: str) -> Compiled:
    """Compile an `ElementwiseKernel`."""
    from cupy._core import core
    from cupy.cuda import compiler

    head = "".join([f"#include <{name}>\n" for name in core._cupy_header_list])
    options = *core.assemble_cupy_compiler_options(()), *FLAGS, f"-arch=sm_{architecture}"
    program = compiler._NVRTCProgram(head + cupy_source(kernel, dtype), "k.cu", method="cubin")
    log = io.StringIO()
    cubin, _ = program.compile((*options, "--ptxas-options=-v"), log)
    (usage,) = usages(log.getvalue()).values()
    return Compiled(usage, instructions(cubin))


def instructions(cubin: bytes) -> int:
    """The number of machine instructions of a file's kernels, but those without effect."""
    start, size, count = struct.unpack_from("<Q10xHH", cubin, 40)  # of the section headers
    total = 0
    for k in range(count):
        _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, start + k * size)
        if kind == 1 and flags & 4:  # contents, executable
            words = struct.iter_unpack("<Q8x", cubin[offset : offset + length])
            total += sum(word & 0xFFF != NOP for (word,) in words)
    return total


def rows(architecture: str, *dtypes: str) -> Iterator[tuple[str, str, Compiled, Compiled]]:
    """The name of each hand-written kernel, a dtype, and both kernels."""
    import cupy

    for name, written in WRITTEN.items():
        for dtype in dtypes or TYPES:
            low = dtype in ("float16", "bfloat16")
            cell = generated.GeneratedCell(builtin_cell(name, H), True, low)
            steps = (*cell._forward.steps, *cell._backward.steps)
            sources = [step.source for step in steps if isinstance(step, KernelCall)]
            for kernel, source in zip(written, sources, strict=True):
                both = (
                    pointwise.build(cupy.ElementwiseKernel, kernel),
                    generated.build(cupy.ElementwiseKernel, source),
                )
                by_hand, made = (compile_kernel(each, dtype, architecture) for each in both)
                yield kernel, dtype, by_hand, made


def main(*architectures: str) -> None:
    """Print the tables: by hand, then generated."""
    for architecture in architectures or ("90",):
        print(f"sm_{architecture} | registers | instructions | spilled")
        for name, dtype, *both in rows(architecture):
            registers, spilled = (
                " ".join(str(getattr(each.usage, field)) for each in both)
                for field in ("registers", "spilled")
            )
            counts = " ".join(str(each.instructions) for each in both)
            print(f"{name} {dtype} | {registers} | {counts} | {spilled}")


if __name__ == "__main__":
    main(*sys.argv[1:])
