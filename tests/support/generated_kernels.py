"""The generated kernels of definitions, compiled without a GPU."""

from __future__ import annotations

from functools import cache

from tests.support.definitions import DEFINITIONS, SIZES
from tests.support.nvrtc import Usage, compile_sources, cupy_source
from xprnn.cells.definition.defined_cell import DefinedCell
from xprnn.cells.shipped import builtin_cell
from xprnn.kernels.codegen.cuda import KernelCall, Source
from xprnn.kernels.cuda import loading
from xprnn.kernels.cuda.generated import GeneratedCell, build

H = 64
HEADERS = ("common.h", "elementary.h", "rows.h")


def defined_cell(name: str) -> DefinedCell:
    """A definition of the tests, or one of a built-in cell: "built-in gru"."""
    first, _, builtin = name.partition(" ")
    if builtin:
        return builtin_cell(builtin, H)
    return DEFINITIONS[first].cell(H, SIZES.get(first, {}), {}, True)


@cache
def kernels_of(name: str, dtype: str) -> tuple[Source, ...]:
    """The kernels of a recorded step forward and backward, and of a step that is not recorded."""
    low = dtype in ("float16", "bfloat16")
    recorded, other = (GeneratedCell(defined_cell(name), each, low) for each in (True, False))
    steps = (*recorded._forward.steps, *recorded._backward.steps, *other._forward.steps)
    kernels = dict.fromkeys(step.source for step in steps if isinstance(step, KernelCall))
    return tuple([_numbered(source, k) for k, source in enumerate(kernels)])


def _numbered(source: Source, k: int) -> Source:
    """A kernel with another name, for a program with several."""
    name = f"{source.name}_{k}"
    return source._replace(name=name, text=source.text.replace(f"{source.name}(", f"{name}("))


def compile_generated(name: str, dtype: str, architecture: str, large: bool) -> dict[str, Usage]:
    """Compile all kernels of a definition at once."""
    import cupy

    sources = [loading.text(*HEADERS)]
    for source in kernels_of(name, dtype):
        text = cupy_source(build(cupy.ElementwiseKernel, source), dtype, large)
        for header in HEADERS:
            text = text.replace(loading.text(header), "")
        sources.append(text)
    return compile_sources(sources, architecture)
