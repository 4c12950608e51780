"""Compile kernels as CuPy does, for any architecture, without a GPU.

CuPy's source of an ElementwiseKernel, or the source of a RawModule, is compiled by CuPy's NVRTC
with CuPy's flags; only the architecture, which CuPy would query from the device, is specified.
Registers and memory are read from the assembler's log.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.support.build_cache import build_once
from tests.support.pointwise_cases import TYPES, dtype_of
from xprnn.kernels.cuda.pointwise import KERNELS, build

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ("-ftz=true", "--device-as-default-execution-space")  # as cupy.cuda.compiler adds them
ENTRY, REGISTERS = re.compile(r"Compiling entry function '(\w+)'"), re.compile(r"Used (\d+) reg")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
NDARRAY, INDEXER, SCALAR = 1, 2, 3  # CuPy's codes for kinds of arguments


class Usage(NamedTuple):
    """Registers of a kernel and the functions that it calls, and bytes of stack and spills."""

    registers: int
    stack: int
    spilled: int


def usages(log: str) -> dict[str, Usage]:
    """The usage of each kernel, by its name in the assembler's log."""
    _, *parts = ENTRY.split(log)
    usage_of = {}
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        stack, stores, loads = (
            sum(map(int, sizes)) for sizes in zip(*MEMORY.findall(text), strict=True)
        )
        usage_of[name] = Usage(max(map(int, REGISTERS.findall(text))), stack, stores + loads)
    return usage_of


def problems(usage: Mapping[str, Usage], most: Mapping[str, int]) -> list[str]:
    """Problems of compiled kernels: missing, spilled to memory, or too many registers."""
    messages = [f"{name}: not compiled" for name in sorted(most.keys() - usage.keys())]
    for name, used in usage.items():
        if used.stack or used.spilled:
            messages.append(f"{name}: {used.stack} bytes of stack, {used.spilled} spilled")
        if used.registers > most[name]:
            messages.append(f"{name}: {used.registers} registers, expected at most {most[name]}")
    return messages


def cupy_source(kernel: Any, C: str, large: bool = False) -> str:
    """CuPy's source for an ElementwiseKernel of raw, contiguous arrays.

    :param large: for arrays of 2 GiB and more, which CuPy indexes with 64 bits.
    """
    import cupy
    from cupy._core import _carray, _kernel, _scalar

    types = {"C": dtype_of(C), "A": dtype_of(TYPES[C])}
    dtypes = [
        tuple([types[p.ctype] if p.raw else None for p in parameters])
        for parameters in (kernel.in_params, kernel.out_params)
    ]
    ins, outs, type_map = kernel._decide_params_type(*dtypes)
    infos = []
    for parameter, dtype in zip(kernel.in_params + kernel.out_params, ins + outs, strict=True):
        if parameter.raw:
            dims = 1 if parameter.name.startswith(("bias_hh", "vector")) else 2
            info = (NDARRAY, cupy.ndarray, np.dtype(dtype), dims, True, not large)
        else:
            info = (SCALAR, _scalar.CScalar, np.dtype(dtype), 0, True, True)
        infos.append(_kernel._ArgInfo(*info))
    infos.append(_kernel._ArgInfo(INDEXER, _carray.Indexer, None, 1, True, not large))
    body = (kernel.params, kernel.operation, kernel.name, kernel.preamble)
    return _kernel._get_elementwise_kernel_code(tuple(infos), type_map, *body)


def compile_sources(sources: Sequence[str], architecture: str) -> dict[str, Usage]:
    """Compile the concatenated sources of kernels to machine code; their usage by name.

    :raises RuntimeError: NVRTC does not accept them.
    """
    from cupy._core import core

    head = "".join([f"#include <{name}>\n" for name in core._cupy_header_list])
    options = core.assemble_cupy_compiler_options(())
    return usages(_compile(head + "\n".join(sources), options, architecture)[0])


def compile_instantiation(source: str, instantiation: str, architecture: str) -> Usage:
    """Compile one instantiation of a RawModule's source to machine code; its usage.

    :raises RuntimeError: NVRTC does not accept it.
    """
    log, names = _compile(source, ("--std=c++17",), architecture, (instantiation,))
    return usages(log)[names[instantiation]]


def ptx(source: str, instantiation: str) -> str:
    """The PTX of one instantiation."""
    from cupy.cuda import compiler

    program = compiler._NVRTCProgram(
        source, "kernels.cu", name_expressions=(instantiation,), method="ptx"
    )
    text, _ = program.compile(("--std=c++17", *FLAGS, "-arch=compute_80"))
    return text.decode()


def _compile(
    source: str, options: tuple[str, ...], architecture: str, instantiations: tuple[str, ...] = ()
) -> tuple[str, dict[str, str]]:
    """The compiler's log, and each instantiation's name in it; cached between runs."""
    options += (*FLAGS, f"-arch=sm_{architecture}", "--ptxas-options=-v")

    def compile_to(path: Path) -> None:
        path.write_text(json.dumps(_log(source, options, instantiations)), "utf-8")

    made_from = _versions(), source, options, instantiations
    log, names = json.loads(build_once("nvrtc", ".json", made_from, compile_to).read_text("utf-8"))
    return log, names


@cache
def _versions() -> tuple[str, ...]:
    """The exact versions of the compilers, as far as they come from packages."""
    import cupy

    installed = [(d.name, d.version) for d in distributions()]
    compilers = sorted({pair for pair in installed if pair[0].startswith("nvidia-cuda")})
    return (cupy.__version__, str(cupy.cuda.nvrtc.getVersion()), str(compilers))


def _log(
    source: str, options: tuple[str, ...], instantiations: tuple[str, ...]
) -> tuple[str, dict[str, str]]:
    """The result of `_compile`, from the compiler."""
    from cupy.cuda import compiler

    program = compiler._NVRTCProgram(
        source, "kernels.cu", name_expressions=instantiations or None, method="cubin"
    )
    log = io.StringIO()
    try:
        _, names = program.compile(options, log)
    except compiler.CompileException as error:  # which cannot be pickled
        architecture = next(option for option in options if option.startswith("-arch="))
        raise RuntimeError(f"{architecture[6:]}: NVRTC refuses the kernel: {error}") from None
    return log.getvalue(), names or {}


def compile_header(header: str, C: str, architecture: str, large: bool) -> dict[str, Usage]:
    """Compile all kernels of a header at once."""
    import cupy

    sources: list[str] = []
    for kernel in (k for k in KERNELS if k.header == header):
        made = build(cupy.ElementwiseKernel, kernel.name)
        source = cupy_source(made, C, large)
        sources.append(source.replace(made.preamble, "") if sources else source)
    return compile_sources(sources, architecture)
