"""A program as launches on a device: products, and one kernel for all that is between two of them.

Blocks of a matrix that are not adjacent are multiplied by themselves, without a copy of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.step_program import Loop, Operation, Place, ProductOp, Program, ReductionOp
from ...cells.definition.tracing import RECURRENT
from ...core.cell import ScratchSizes
from .accumulation import accumulated


class Product(NamedTuple):
    """out = operand M' or, if it is `transposed`, operand M; or that is added to `out`."""

    matrix: str  # the parameter's name
    rows: tuple[int, int] | None  # of M in it, the first and that after the last one; None: all
    transposed: bool
    operand: Place
    out: Place
    adds: bool


Kernel = tuple[Loop | ReductionOp, ...]  # its operations, in order
Moved = Callable[[Place], Place]


class Launches(NamedTuple):
    """What a step launches, in order, and the scratch arrays of its places."""

    steps: tuple[Product | Kernel, ...]
    scratch: ScratchSizes


def launches(cell: DefinedCell, program: Program) -> Launches:
    """The launches of a program."""
    operations, added_to = accumulated(program.operations)
    scratch, moved = _scratch(operations, program)
    steps: list[Product | Kernel] = []
    for is_product, group in groupby(_in_order(operations), lambda op: isinstance(op, ProductOp)):
        if is_product:
            for op in group:
                assert isinstance(op, ProductOp)
                steps += _products(cell, op, op.out in added_to, moved)
        else:
            steps.append(tuple([_moved(op, moved) for op in group]))
    return Launches(tuple(steps), scratch)


def _in_order(operations: Sequence[Operation]) -> list[Operation]:
    """The operations, with as few changes as possible between products and others."""
    remaining, result = [*operations], []
    while remaining:
        for is_product in (True, False):
            waiting: list[Operation] = []
            for op in remaining:
                if isinstance(op, ProductOp) is is_product and not _depends(op, waiting):
                    result.append(op)
                else:
                    waiting.append(op)
            remaining = waiting
    return result


def _depends(op: Operation, earlier: Sequence[Operation]) -> bool:
    """Whether an operation reads or writes what one of these writes, or writes what one reads."""
    return any(
        a.overlaps(b)
        for other in earlier
        for mine, theirs in ((op.reads, other.writes), (op.writes, [*other.reads, *other.writes]))
        for a in mine
        for b in theirs
    )


def _products(cell: DefinedCell, op: ProductOp, adds: bool, moved: Moved) -> list[Product]:
    """A product for each run of adjacent rows of a matrix."""
    operand, out = moved(op.operand), moved(op.out)
    if op.matrix != RECURRENT:
        return [Product(op.matrix, None, op.transposed, operand, out, adds)]
    runs, products, start = cell.derived.runs(op.blocks), [], 0
    all_rows = 0, len(cell.recurrent_blocks) * cell.derived.widths["H"]
    for first, end in runs:
        rows, width = None if (first, end) == all_rows else (first, end), end - first
        if op.transposed:
            part, adds_part = operand.part(start, width), adds or start > 0
            products.append(Product(op.matrix, rows, True, part, out, adds_part))
        else:
            products.append(Product(op.matrix, rows, False, operand, out.part(start, width), adds))
        start += width
    return products


def _moved(op: Operation, moved: Moved) -> Loop | ReductionOp:
    """An operation with places in other arrays."""
    if isinstance(op, Loop):
        loads = {node: moved(view) for node, view in op.loads.items()}
        return Loop(op.width, op.nodes, loads, [(node, moved(p)) for node, p in op.stores])
    assert isinstance(op, ReductionOp)
    return op._replace(operands=tuple(map(moved, op.operands)), out=moved(op.out))


def _scratch(operations: Sequence[Operation], program: Program) -> tuple[ScratchSizes, Moved]:
    """The scratch arrays of a step: one of each product, and one of all other values together."""
    views = [view for op in operations for view in (*op.reads, *op.writes)]
    used = sorted({int(view.item) for view in views if view.buffer == "scratch"})
    operands = [k for k in used if program.scratch[k].is_operand]
    results = [op.out for op in operations if isinstance(op, ProductOp)]
    outs = [int(view.item) for view in results if view.buffer == "scratch"]
    rest = [k for k in used if k not in operands and k not in outs]
    widths = [program.scratch[k].width for k in rest]
    starts = {k: (len(outs), sum(widths[:n])) for n, k in enumerate(rest)}
    starts |= {k: (n, 0) for n, k in enumerate(outs)}
    starts |= {k: (len(outs) + bool(rest) + n, 0) for n, k in enumerate(operands)}

    def moved(view: Place) -> Place:
        if view.buffer != "scratch":
            return view
        item, start = starts[int(view.item)]
        return Place("scratch", item, start + view.start, view.width)

    numbers = [program.scratch[k].width for k in outs] + [sum(widths)] * bool(rest)
    low = [program.scratch[k].width for k in operands]
    return ScratchSizes(tuple(numbers), (), tuple(low)), moved
