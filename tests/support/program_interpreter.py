"""Runs a program of a step one element after another, in the order that its rules describe."""

from __future__ import annotations

from typing import Any

import numpy as np

from xprnn.cells import Buffers
from xprnn.cells.definition.defined_cell import DefinedCell
from xprnn.cells.definition.graph import Node
from xprnn.cells.definition.operations import OPERATIONS
from xprnn.cells.definition.step_program import Loop, Place, ProductOp, Program, ReductionOp


class Interpreter:
    """The memory of a step, and its operations in float64."""

    def __init__(
        self, cell: DefinedCell, program: Program, step: Buffers, weights: Any, sums: Any = None
    ) -> None:
        self.cell = cell
        self.program = program
        self.step = step
        self.parameters: dict[str, Any] = weights._asdict()
        self.sums = sums
        rows = step.gates.shape[0]
        self.scratch = [np.full((rows, each.width), np.nan) for each in program.scratch]

    def run(self) -> None:
        """Run all operations."""
        for operation in self.program.operations:
            if isinstance(operation, ProductOp):
                self._multiply(operation)
            elif isinstance(operation, ReductionOp):
                values = [self.view(place) for place in operation.operands]
                node = operation.node
                self.view(operation.out)[...] = OPERATIONS[node.op].compute(
                    np, node.detail, *values
                )
            else:
                for column in range(operation.width):
                    self._run_column(operation, column)

    def view(self, place: Place) -> Any:
        """The columns of an array."""
        if place.buffer == "scratch":
            array = self.scratch[int(place.item)]
        elif place.buffer == "vector":
            array = self.parameters[str(place.item)]
        elif place.buffer == "bias_hh":
            array = self.parameters["bias_hh"]
        elif place.buffer == "sums":
            array = self.sums
        else:
            array = getattr(self.step, place.buffer)
            array = array[place.item] if isinstance(array, tuple) else array
        return array[..., place.start : place.end]

    def _multiply(self, product: ProductOp) -> None:
        matrix = self.parameters[product.matrix]
        if product.matrix == "weight_hh":
            runs = self.cell.derived.runs(product.blocks)
            matrix = np.concatenate([matrix[start:stop] for start, stop in runs])
        factor = matrix if product.transposed else matrix.T
        self.view(product.out)[...] = self.view(product.operand) @ factor

    def _run_column(self, loop: Loop, column: int) -> None:
        values: dict[Node, Any] = {}
        for node, place in loop.loads.items():
            array = self.view(place)
            values[node] = array[..., column if place.width > 1 else 0].copy()
            if node.is_condition:
                values[node] = values[node] != 0.0

        def value_of(node: Node) -> Any:
            number = self.program.numbers.get(node)
            return values[node] if number is None else np.float64(number)

        for node in loop.nodes:
            args = [value_of(arg) for arg in node.args]
            if node.op == "columns":
                (values[node],) = args
            else:
                values[node] = OPERATIONS[node.op].compute(np, node.detail, *args)
        for node, place in loop.stores:
            target = self.view(place)
            before = target[:, column] if place.buffer == "sums" else 0.0
            target[:, column] = before + value_of(node)
