"""Compiled loops of cells, whose steps are source code that is made from a definition.

Sources are executed from memory, never read from a disk. What Numba compiles is in its cache on
disk, under a name with a hash of the source, so that another process compiles nothing.
"""

from __future__ import annotations

import hashlib
import linecache
import sys
from functools import cache, cached_property, lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba import types

from ...backend import Array
from ...cells import Cell, Weights
from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.step_program import ProductOp, backward_program, forward_program
from ..codegen.numba import emit
from ..interface import Pass
from .jit import compile_for, number_of, written
from .loops import backward_loop, forward_loop
from .product import panels_of, width_of
from .table import SEQUENCE

ANY_SIZE = 8  # a hidden size for which the loops of a built-in cell are made; others have the same


class Loop(NamedTuple):
    """The loop of a pass over a direction."""

    function: Any  # compiled
    columns: Array  # in: of the places in a step
    scratch: tuple[int, ...]  # widths of the arrays that a step needs
    products: tuple[ProductOp, ...]  # of a step, whose matrices are its `weights`
    multiply_adds: int  # of the products of a step, for each row


class Loops:
    """The loops of a cell in one dtype, made when they are needed."""

    def __init__(self, cell: DefinedCell, dtype: np.dtype[Any]) -> None:
        self.cell: DefinedCell = cell.adding_up()
        self._dtype = dtype
        self._loops: dict[tuple[Pass, bool], Loop] = {}

    @cached_property
    def vectors(self) -> tuple[str, ...]:
        """The parameters that a step reads as vectors, in order."""
        names = [node.detail for node in self.cell.derived.forward_nodes if node.op == "vector"]
        merged = ["bias_hh" if name.startswith("b_hh.") else name for name in names]
        return tuple(dict.fromkeys(merged))

    @cached_property
    def step_scratch(self) -> int:
        """The numbers of each row in the scratch arrays of a step, in units of H."""
        programs = (
            forward_program(self.cell, record=True, masked=False),
            backward_program(self.cell, masked=False),
        )
        most = max(sum(each.width for each in program.scratch) for program in programs)
        most += 2 * self.cell.sums_size
        return -(-most // self.cell.derived.widths["H"])

    def matrix(self, weights: Weights, product: ProductOp) -> Array:
        """The matrix of a product of a step: a parameter, or some of its rows."""
        matrix = weights._asdict()[product.matrix]
        return self.cell.derived.rows_of(np, matrix, product.matrix, product.blocks)

    def vector(self, weights: Weights, name: str) -> Array:
        """A parameter as an array that loops read; zeros for a bias that there is not."""
        values = weights._asdict()[name]
        if values is None:
            return np.zeros(
                len(self.cell.biased_gates) * self.cell.derived.widths["H"], self._dtype
            )
        return np.array(values)

    def of(self, kind: Pass, masked: bool) -> Loop:
        """The loop of a pass; `masked`: whether the arrays of masks are given."""
        key = kind, masked
        if key not in self._loops:
            source = self.source(kind, masked)
            function = _compiled(source.name, source.text, kind, self._dtype, source.counts)
            work = sum(each.operand.width * each.out.width for each in source.products)
            columns = np.array(source.columns, np.intp)
            self._loops[key] = Loop(function, columns, source.scratch, source.products, work)
        return self._loops[key]

    def source(self, kind: Pass, masked: bool) -> Source:
        """The source of a step of a pass."""
        cell, dtype = self.cell, self._dtype
        if kind is Pass.BACKWARD:
            program = backward_program(cell, masked=masked)
        else:
            program = forward_program(cell, record=kind is Pass.TRAINING, masked=masked)
        step = emit(program, self.vectors)
        counts = Counts(
            len(step.products),
            len(self.vectors),
            len(program.scratch),
            len(cell.state_names),
            len(cell.extra_inputs) + (len(cell.masks) if masked else 0),
        )
        outs = {operation.out.item for operation in step.products}
        scratch = [
            panels_of(each.width, dtype) * width_of(dtype) if k in outs else each.width
            for k, each in enumerate(program.scratch)
        ]
        name = cell.name.partition(" ")[0]
        return Source(name, step.text, step.columns, step.products, tuple(scratch), counts)


class Source(NamedTuple):
    """The source of a step, and the arrays that it takes."""

    name: str
    text: str  # of a module
    columns: tuple[int, ...]  # of the places in a step
    products: tuple[ProductOp, ...]  # of a step, whose matrices are its `weights`
    scratch: tuple[int, ...]  # widths of the arrays that a step needs
    counts: Counts


class Counts(NamedTuple):
    """The numbers of arrays in the tuples that a loop takes."""

    products: int
    vectors: int
    scratch: int
    states: int
    extra: int


def size_of(cell: Cell) -> int:
    """A hidden size of a cell: its own, or any for a built-in one."""
    return cell.derived.widths["H"] if isinstance(cell, DefinedCell) else ANY_SIZE


def is_generated(cell: Cell) -> bool:
    """Whether there are loops for a cell."""
    return isinstance(cell, DefinedCell) or cell.name in SEQUENCE


@lru_cache(64)
def loops_of(cell: Cell, hidden_size: int, dtype: np.dtype[Any]) -> Loops:
    """The loops of a cell."""
    if isinstance(cell, DefinedCell):
        return Loops(cell, dtype)
    from ...cells.shipped import builtin_cell  # traced where it is used

    return Loops(builtin_cell(cell.name, hidden_size), dtype)


@cache
def _compiled(name: str, text: str, kind: Pass, dtype: np.dtype[Any], counts: Counts) -> Any:
    """The compiled loop of a step."""
    module, number = module_of(name, text), number_of(dtype)
    matrix, panels = written(number, 2), written(number, 3)
    shared = (
        types.UniTuple(panels, counts.products),
        types.UniTuple(written(number, 1), counts.vectors),
        types.Array(types.intp, 1, "C"),
        types.UniTuple(matrix, counts.scratch),
    )
    states = types.UniTuple(matrix, counts.states)
    extra = types.UniTuple(matrix, counts.extra)
    if kind is Pass.BACKWARD:
        function = backward_loop(module.__name__.rpartition(".")[2], module.step)
        doutput = types.Array(number, 2, "A", readonly=True)
        arrays = (*shared, matrix, matrix, states, extra, doutput, states, written(number, 3))
        return compile_for(function, (*arrays, *_SLICE))
    function = forward_loop(module.__name__.rpartition(".")[2], module.step)
    saved = matrix if kind is Pass.TRAINING else types.none
    inputs = panels, matrix, matrix, matrix, *shared, matrix, matrix, saved
    return compile_for(function, (*inputs, states, extra, states, *_SLICE))


# the last arguments of the loops: counts, reverse, and the first and last row of a slice
_SLICE = types.Array(types.intp, 1, "C"), types.boolean, types.intp, types.intp


def module_of(name: str, text: str) -> ModuleType:
    """The module of a source, which Numba's cache refers to by its name."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    full = f"{__name__}.{name}_{digest}"
    if full not in sys.modules:
        module = ModuleType(full)
        file = f"<{full}>"
        linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # tracebacks
        exec(compile(text, file, "exec"), module.__dict__)
        sys.modules[full] = module
    return sys.modules[full]
