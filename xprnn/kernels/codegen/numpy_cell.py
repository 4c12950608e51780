"""Cells of definitions on NumPy: calls with `out=`, without temporaries, which can be captured."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from ...backend import Array
from ...cells import Cell, Weights
from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.step_program import Place, backward_program, forward_program
from ...cells.numerics import LARGEST_EXPONENTS
from ...core.cell import Buffers, ScratchSizes
from .array_calls import ArrayCode, Matrix, array_code


class NumpyCell(DefinedCell):
    """A cell of a definition by array calls that write to its buffers and to scratch arrays.

    As in the built-in cells the next states may be the memory of the states.

    :param cell: the same cell, evaluated in plain `xp`.
    :param record: whether a backward step follows, and masks are drawn.
    """

    is_captured: bool = True

    def __init__(self, cell: DefinedCell, record: bool) -> None:
        super().__init__(cell.name, cell.derived)
        self.records = record
        self._key = (*self._key, record)
        self._hash = hash(self._key)
        self._masked = record and bool(cell.masks)
        program = forward_program(self, record=record, masked=self._masked)
        self._forward = array_code(self, program)
        if record:
            self.backward_reads, self.backward_writes = self._accessed()

    @cached_property
    def _backward(self) -> ArrayCode:
        return array_code(self, backward_program(self, masked=self._masked))

    def scratch_sizes(self, H: int, backward: bool) -> ScratchSizes:
        """The widths of a step's scratch arrays."""
        return (self._backward if backward else self._forward).scratch

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute one step; see `Cell` for the buffers."""
        _run(xp, self._forward, weights, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute the gradient of one step; see `Cell` for the buffers."""
        _run(xp, self._backward, weights, step)

    def _accessed(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The buffers that `backward` reads, and writes; one written in part is read too."""
        calls, H = self._backward.calls, self.derived.widths["H"]
        read = {(view.buffer, view.item) for call in calls for view in call.reads}
        reads, writes = [], []
        for name, size in (("gates", self.gates * H), ("saved", self.saved_size(H))):
            columns = {c for p in _written(calls, name) for c in range(p.start, p.end)}
            if columns:
                writes.append(name)
            if (name, 0) in read or 0 < len(columns) < size:
                reads.append(name)
        for k, state in enumerate(self.state_names):
            reads += [state] * (("states", k) in read)
            reads += [f"{state}'"] * (("next_states", k) in read)
        return tuple(reads), tuple(writes)


def _written(calls: Any, buffer: str) -> list[Place]:
    return [call.out for call in calls if call.out.buffer == buffer]


def on_numpy(cell: Cell, record: bool) -> Cell:
    """The cell that NumPy runs: that of a definition by array calls, another one as it is."""
    return _numpy_cell(cell, record) if type(cell) is DefinedCell else cell


@lru_cache(64)
def _numpy_cell(cell: DefinedCell, record: bool) -> NumpyCell:
    return NumpyCell(cell, record)


def _run(xp: Any, code: ArrayCode, weights: Weights, step: Buffers) -> None:
    """Make the calls; `xp`: NumPy, or what captures the calls instead."""
    parameters = weights._asdict()

    def value(operand: Any) -> Any:
        if isinstance(operand, Place):
            return _columns(_buffer(operand, parameters, step), operand)
        if isinstance(operand, Matrix):
            matrix = parameters[operand.name]
            if operand.rows is not None:
                matrix = matrix[slice(*operand.rows)]
            return matrix.T if operand.transposed else matrix
        return LARGEST_EXPONENTS[step.gates.dtype.itemsize] if isinstance(operand, str) else operand

    for call in code.calls:
        operands, out = [value(each) for each in call.operands], value(call.out)
        if call.function == "copyto":
            where = {} if call.where is None else {"where": value(call.where)}
            xp.copyto(out, *operands, **where)
        elif call.function == "sum":
            xp.sum(*operands, axis=1, out=out, keepdims=True)
        else:
            getattr(xp, call.function)(*operands, out=out)


def _buffer(view: Place, parameters: dict[str, Any], step: Buffers) -> Any:
    if view.buffer == "vector":
        return parameters[str(view.item)]
    if view.buffer == "bias_hh":
        return parameters["bias_hh"]
    buffer: Any = getattr(step, view.buffer)
    return buffer[int(view.item)] if isinstance(buffer, tuple) else buffer


def _columns(array: Array, view: Place) -> Array:
    """Some columns of an array, or elements of a vector."""
    if (view.start, view.width) == (0, array.shape[-1]):
        return array
    return array[..., view.start : view.end]
