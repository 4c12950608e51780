"""Cells of definitions by generated kernels: one for all that is between two products of a step."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ...backend import Array
from ...cells import Buffers, Weights
from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.step_program import Place, Program, backward_program, forward_program
from ...core.cell import ScratchSizes
from ..codegen.cuda import KernelCall, Source, emit, step_arrays
from ..codegen.launches import Product, launches
from . import loading

THREADS = 128  # of the block that computes a row: as in rows.h


class GeneratedCell(DefinedCell):
    """A cell of a definition whose steps are products and generated kernels.

    :param cell: the same cell, evaluated in plain `xp`.
    :param record: whether a backward step follows, and masks are drawn.
    :param low_precision: whether the compute dtype is float16 or bfloat16.
    """

    def __init__(self, cell: DefinedCell, record: bool, low_precision: bool) -> None:
        super().__init__(cell.name, cell.derived)
        self._key = (*self._key, record, low_precision)
        self._hash = hash(self._key)
        options = {"masked": record and bool(cell.masks), "low_precision": low_precision}
        self._forward = _code(self, "forward", forward_program(self, record=record, **options))
        self._backward = _code(self, "backward", backward_program(self, **options))
        self.kernel_launches: tuple[int, int] | None = (
            len(self._forward.steps),
            len(self._backward.steps),
        )

    def scratch_sizes(self, H: int, backward: bool) -> ScratchSizes:
        """The widths of a step's scratch arrays."""
        return (self._backward if backward else self._forward).scratch

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute one step; see `Cell` for the buffers."""
        _run(xp, self._forward, weights, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute the gradient of one step; see `Cell` for the buffers."""
        _run(xp, self._backward, weights, step)


@lru_cache(64)
def generated_cell(cell: DefinedCell, record: bool, low_precision: bool) -> GeneratedCell:
    """The cell of a definition by generated kernels."""
    return GeneratedCell(cell, record, low_precision)


class Code(NamedTuple):
    """What a step launches."""

    steps: tuple[Product | KernelCall, ...]
    scratch: ScratchSizes


def _code(cell: DefinedCell, name: str, program: Program) -> Code:
    steps, scratch = launches(cell, program)
    arrays = step_arrays(cell, scratch)
    start = re.sub(r"\W", "_", cell.name.partition(" ")[0], flags=re.ASCII)
    made = [
        each
        if isinstance(each, Product)
        else emit(f"{start}_{name}_{k}", each, arrays, program.numbers)
        for k, each in enumerate(steps)
    ]
    return Code(tuple(made), scratch)


def _run(xp: Any, code: Code, weights: Weights, step: Buffers) -> None:
    """Launch the products and kernels of a step."""
    rows = step.gates.shape[0]
    for each in code.steps:
        if isinstance(each, Product):
            _multiply(xp, each, weights, step)
            continue
        source, numbers, names, width = each
        arrays = [_argument(weights, step, buffer, item) for buffer, item in names]
        kernel = build(xp.ElementwiseKernel, source)
        if source.by_rows:
            kernel(*numbers, *arrays, size=rows * THREADS, block_size=THREADS)
        else:
            kernel(*numbers, *arrays, size=rows * width)


def _multiply(xp: Any, product: Product, weights: Weights, step: Buffers) -> None:
    matrix = getattr(weights, product.matrix)
    if product.rows is not None:
        matrix = matrix[slice(*product.rows)]
    operand, out = (_columns(step, view) for view in (product.operand, product.out))
    function = xp.add_matmul if product.adds else xp.matmul
    function(operand, matrix if product.transposed else matrix.T, out=out)


def _columns(step: Buffers, view: Place) -> Array:
    """Some columns of an array."""
    array = _array(step, view.buffer, view.item)
    if view.width == array.shape[1]:
        return array
    return array[:, view.start : view.end]


def _array(step: Buffers, buffer: str, item: int | str) -> Array:
    array: Any = getattr(step, buffer)
    return array[int(item)] if isinstance(array, tuple) else array


def _argument(weights: Weights, step: Buffers, buffer: str, item: int | str) -> Array:
    if buffer not in ("vector", "bias_hh"):
        return _array(step, buffer, item)
    parameter: Array = getattr(weights, str(item) if buffer == "vector" else buffer)
    return parameter


@cache
def build(elementwise_kernel: Any, source: Source) -> Any:
    """A kernel, made with an array module's `ElementwiseKernel`.

    CuPy compiles it at the first call with given dtypes, on each device.
    """
    numbers = [f"n{k}" for k in range(source.numbers)]
    inputs, outputs = (
        [f"raw {kind} {name}" for kind, name in arrays]
        for arrays in (source.inputs, source.outputs)
    )
    arrays = [*source.inputs, *source.outputs]
    types = ", ".join(sorted({kind for kind, _ in arrays}))
    arguments = ", ".join(["i", *numbers, *[f"&{name}[0]" for _, name in arrays]])
    return elementwise_kernel(
        ", ".join([*[f"int32 {name}" for name in numbers], *inputs]),
        ", ".join(outputs),
        f"xprnn::{source.name}<{types}>({arguments})",
        f"xprnn_{source.name}",
        preamble=text(source),
        no_return=True,
    )


def text(source: Source) -> str:
    """The source of a kernel, preceded by the headers that it needs."""
    headers = ["common.h", "elementary.h", *["rows.h"] * source.by_rows]
    return "\n".join([loading.text(*headers), "namespace xprnn {", source.text, "}"])
