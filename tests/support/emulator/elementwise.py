"""CuPy's ElementwiseKernel on the host: the same source, compiled by g++, run on NumPy arrays.

It is stricter than CuPy, as the kernels require: every array is raw and C-contiguous, outputs are
passed by the caller, and the size of the loop is explicit.
"""

from __future__ import annotations

import atexit
import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from xprnn.kernels.cuda import loading

HOST = Path(__file__).parent / "host"
DEVICE, HOST_ROWS = ((HOST / name).read_text("utf-8") for name in ("device.h", "rows.h"))
ROWS, ROW_THREADS = loading.text("rows.h"), 128
COMPILER = shutil.which("g++")
WARNINGS = ("-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror")
FLAGS = ("-std=c++17", "-O2", *WARNINGS, "-shared", "-fPIC")
C_TYPES = {
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float",
    "float64": "double",
    "int32": "int",
    "int64": "long long",
}

needs_compiler = pytest.mark.compiler


class Parameter(NamedTuple):
    """One parameter of a kernel: `raw C gates` or `int32 H`."""

    type: str  # the name of a dtype, or a capital letter for the dtype of the arrays
    name: str
    raw: bool
    const: bool


def _parse(declarations: str, const: bool) -> list[Parameter]:
    parameters = []
    for declaration in filter(None, map(str.strip, declarations.split(","))):
        *qualifiers, kind, name = declaration.split()
        if qualifiers not in ([], ["raw"]):
            raise ValueError(f"{declaration!r}: expected 'raw TYPE NAME' or 'TYPE NAME'")
        parameters.append(Parameter(kind, name, bool(qualifiers), const))
    return parameters


class HostElementwiseKernel:
    """The subset of `cupy.ElementwiseKernel` that the package uses, on NumPy arrays."""

    backwards = False  # order of the elements; results must not depend on it

    def __init__(
        self,
        in_params: str,
        out_params: str,
        operation: str,
        name: str = "kernel",
        *,
        preamble: str = "",
        no_return: bool = False,
    ) -> None:
        self.parameters = _parse(in_params, const=True) + _parse(out_params, const=False)
        self.operation = operation
        self.name = name
        self.preamble = preamble
        self._functions: dict[tuple[Any, ...], Any] = {}  # by the dtypes of the type parameters
        if not no_return:
            raise ValueError(f"{name}: expected no_return=True, outputs are passed by the caller")
        if any(not p.raw for p in self.parameters if not p.const):
            raise ValueError(f"{name}: expected every output to be raw")

    def __call__(self, *args: Any, size: int, block_size: int = 128) -> None:
        """Run the operation for i = 0 .. size - 1; rows have blocks of their own."""
        if ROWS in self.preamble and (block_size != ROW_THREADS or size % ROW_THREADS):
            raise ValueError(f"{self.name}: {size} threads in blocks of {block_size}")
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name}: expected {len(self.parameters)} arguments: {len(args)}")
        types: dict[str, np.dtype[Any]] = {}
        for parameter, arg in zip(self.parameters, args, strict=True):
            self._check(parameter, arg, types)
        if size == 0:
            return  # like CuPy, which launches nothing
        key = tuple(types.items())
        if key not in self._functions:
            self._functions[key] = getattr(_library(self.source(types)), self.name)
        self._functions[key](
            ctypes.c_ssize_t(size),
            ctypes.c_bool(self.backwards),
            *map(_argument, self.parameters, args),
        )

    def source(self, types: dict[str, np.dtype[Any]]) -> str:
        """The C++ source for dtypes of the type parameters."""
        typedefs = [f"typedef {C_TYPES[types[t].name]} {t};" for t in sorted(types)]
        head = ", ".join(["ptrdiff_t size_", "bool backwards_", *map(_declare, self.parameters)])
        body = (
            f'extern "C" void {self.name}({head}) {{',
            "  for (ptrdiff_t k_ = 0; k_ < size_; ++k_) {",
            "    const ptrdiff_t i = backwards_ ? size_ - 1 - k_ : k_;",
            f"    {self.operation};",
            "  }",
            "}",
        )
        preamble = self.preamble.replace(ROWS, HOST_ROWS)
        return "\n".join([DEVICE, *typedefs, preamble, *body, ""])

    def _check(self, parameter: Parameter, arg: Any, types: dict[str, np.dtype[Any]]) -> None:
        """Raise for arguments that CuPy or the kernels do not accept; record the dtypes."""
        what = f"{self.name}: {parameter.name}"
        if not parameter.raw:
            if not isinstance(arg, (int, np.integer)):
                raise TypeError(f"{what}: expected an integer, got {type(arg)}")
            return
        if not isinstance(arg, np.ndarray):
            raise TypeError(f"{what}: expected an array, got {type(arg)}")
        if not arg.flags.c_contiguous:
            raise ValueError(f"{what}: expected a C-contiguous array, got strides {arg.strides}")
        if not (parameter.const or arg.flags.writeable):
            raise ValueError(f"{what}: the array is read-only")
        expected = arg.dtype if len(parameter.type) == 1 else np.dtype(parameter.type)
        if len(parameter.type) == 1:
            expected = types.setdefault(parameter.type, arg.dtype)
        if arg.dtype != expected:
            raise TypeError(f"{what}: Type is mismatched. {arg.dtype} {expected}")


def _declare(parameter: Parameter) -> str:
    kind = C_TYPES.get(parameter.type, parameter.type)
    const = "const " if parameter.const else ""
    return f"{const}{kind} {'*' if parameter.raw else ''}{parameter.name}"


def _argument(parameter: Parameter, arg: Any) -> Any:
    if parameter.raw:
        return ctypes.c_void_p(arg.ctypes.data)
    return (ctypes.c_int32 if parameter.type == "int32" else ctypes.c_int64)(arg)


@cache
def _folder() -> str:
    """The folder of this process's compiled libraries; removed when it ends."""
    folder = tempfile.mkdtemp(prefix="xprnn-host-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _library(source: str) -> ctypes.CDLL:
    """The source as a loaded library.

    :raises RuntimeError: g++ is missing, or does not accept the source.
    """
    if COMPILER is None:
        raise RuntimeError("there is no g++ to compile the kernels for the host")
    # A folder for each, so that threads compiling the same source do not conflict
    target = Path(tempfile.mkdtemp(dir=_folder())) / "kernel.so"
    command = (COMPILER, *FLAGS, "-x", "c++", "-", "-o", str(target), "-lm")
    outcome = subprocess.run(command, input=source, capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(f"g++ refuses the kernel:\n{outcome.stderr}")
    return ctypes.CDLL(str(target))


def with_fault(old: str, new: str) -> type[HostElementwiseKernel]:
    """An ElementwiseKernel with a fault injected into its source."""

    class Faulty(HostElementwiseKernel):
        def __init__(self, *args: Any, preamble: str, **kwargs: Any) -> None:
            if preamble.count(old) != 1:  # not an assertion: a test may expect one
                raise ValueError(f"the source does not contain this exactly once: {old!r}")
            super().__init__(*args, preamble=preamble.replace(old, new), **kwargs)

    return Faulty
