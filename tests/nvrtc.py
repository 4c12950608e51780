"""Compile CuPy's kernels for any architecture where there is no GPU.

CuPy's own source of an ElementwiseKernel goes through CuPy's own NVRTC with CuPy's own flags; only
the architecture, for which CuPy would ask the device, is given. What the assembler says of the
result, registers and memory, is read from its log.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from kernel_parts import TYPES, dtype_of

from xprnn.kernels.cuda.pointwise import KERNELS, build

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ("-ftz=true", "--device-as-default-execution-space")  # as cupy.cuda.compiler adds them
USAGE = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
NDARRAY, INDEXER, SCALAR = 1, 2, 3  # CuPy's numbers for kinds of arguments


class Usage(NamedTuple):
    """What a kernel takes of the device; of stack and spilled registers, bytes."""

    registers: int
    stack: int
    spilled: int


def cupy_source(kernel: Any, T: str, large: bool = False) -> str:
    """What CuPy makes of an ElementwiseKernel of raw, contiguous arrays.

    `large` is for arrays of 2 GiB and more, in which CuPy indexes with 64 bits.
    """
    import cupy
    from cupy._core import _carray, _kernel, _scalar

    types = {"T": dtype_of(T), "A": dtype_of(TYPES[T])}
    given = [
        tuple([types[p.ctype] if p.raw else None for p in parameters])
        for parameters in (kernel.in_params, kernel.out_params)
    ]
    ins, outs, type_map = kernel._decide_params_type(*given)
    infos = []
    for parameter, dtype in zip(kernel.in_params + kernel.out_params, ins + outs, strict=True):
        if parameter.raw:
            dims = 1 if parameter.name == "bias_hh" else 2
            info = (NDARRAY, cupy.ndarray, np.dtype(dtype), dims, True, not large)
        else:
            info = (SCALAR, _scalar.CScalar, np.dtype(dtype), 0, True, True)
        infos.append(_kernel._ArgInfo(*info))
    infos.append(_kernel._ArgInfo(INDEXER, _carray.Indexer, None, 1, True, not large))
    body = (kernel.params, kernel.operation, kernel.name, kernel.preamble)
    return _kernel._get_elementwise_kernel_code(tuple(infos), type_map, *body)


def compile_sources(sources: Sequence[str], architecture: str) -> dict[str, Usage]:
    """Compile the sources of kernels, as one, to machine code; what each of them takes, by name.

    :raises RuntimeError: NVRTC does not accept them.
    """
    from cupy._core import core
    from cupy.cuda import compiler

    head = "".join([f"#include <{name}>\n" for name in core._cupy_header_list])
    options = core.assemble_cupy_compiler_options(())
    options += (*FLAGS, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    program = compiler._NVRTCProgram(head + "\n".join(sources), "kernels.cu", method="cubin")
    log = io.StringIO()
    try:
        program.compile(options, log)
    except compiler.CompileException as error:  # which no other process can receive
        raise RuntimeError(f"sm_{architecture}: NVRTC refuses the kernel: {error}") from None
    return {
        name: Usage(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in USAGE.findall(log.getvalue())
    }


def compile_header(header: str, T: str, architecture: str, large: bool) -> dict[str, Usage]:
    """Compile all kernels of the package's table that have a header, in one go."""
    import cupy

    sources: list[str] = []
    for kernel in (k for k in KERNELS if k.header == header):
        made = build(cupy.ElementwiseKernel, kernel.name)
        source = cupy_source(made, T, large)
        sources.append(source.replace(made.preamble, "") if sources else source)
    return compile_sources(sources, architecture)
