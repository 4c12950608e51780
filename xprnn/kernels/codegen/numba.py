"""Python source that Numba compiles: the step of a program, on a block of rows.

Widths are no part of the text: a place is given by the numbers `columns`, two for each, so that
one compiled step is for layers of all sizes whose programs have the same form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ...cells.definition.graph import Node
from ...cells.definition.step_program import Loop, Place, ProductOp, Program, ReductionOp

HEADER = """\
from xprnn.kernels.numba.elementary import (
    absolute, clip, elu, exp, expm1, log, maximum, minimum, of_type, relu, sigmoid, softplus, sqrt,
    tanh,
)
from xprnn.kernels.numba.jit import inlined, row, summed
from xprnn.kernels.numba.product import product
"""
ARGUMENTS = (
    "weights, vectors, columns, scratch, gates, saved, states, next_states, dstates, extra, sums"
)

# An expression of a value, from its arguments and the numbers of its detail
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "sigmoid": "sigmoid({0})",
    "tanh": "tanh({0})",
    "exp": "exp({0})",
    "expm1": "expm1({0})",
    "log": "log({0})",
    "sqrt": "sqrt({0})",
    "softplus": "softplus({0})",
    "softsign": "{0} / (absolute({0}) + {1})",
    "elu": "elu({0}, {1})",
    "relu": "relu({0})",
    "leaky_relu": "{0} if {0} > of_type({0}, 0.0) else {1} * {0}",
    "hard_sigmoid": "clip({1} * {0} + {2}, of_type({0}, 0.0), of_type({0}, 1.0))",
    "abs": "absolute({0})",
    "minimum": "minimum({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "clip": "clip({0}, {1}, {2})",
    "where": "{1} if {0} else {2}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "columns": "{0}",
}


class Step(NamedTuple):
    """The source of a step, and what its arguments hold."""

    text: str  # of a module with a function `step`, whose arguments are `ARGUMENTS`
    columns: tuple[int, ...]  # first and last + 1 of each place
    products: tuple[ProductOp, ...]  # whose matrices are `weights`, in this order


def emit(program: Program, vectors: Sequence[str]) -> Step:
    """The source of a program; `vectors` are the parameters that are an array of one dimension."""
    return _Emitter(program, vectors).emit()


class _Emitter:
    def __init__(self, program: Program, vectors: Sequence[str]) -> None:
        self._program = program
        self._vectors = [*vectors]
        self._columns: dict[Place, int] = {}
        self._products: list[ProductOp] = []
        self._functions: list[str] = []

    def emit(self) -> Step:
        body: list[str] = []
        in_rows = False
        for k, operation in enumerate(self._program.operations):
            if isinstance(operation, ProductOp):
                body.append(f"    {self._product(operation)}")
                in_rows = False
                continue
            if not in_rows:
                body.append("    for s in range(gates.shape[0]):")
                in_rows = True
            if isinstance(operation, Loop):
                body.append(f"        {self._loop(f'loop_{k}', operation)}")
            else:
                body.append(f"        {self._reduction(f'sum_{k}', operation)}")
        # not within a loop over rows, whose stores might change the array
        ends = [
            f"    first_{k}, end_{k} = columns[{2 * k}], columns[{2 * k + 1}]"
            for k in self._columns.values()
        ]
        step = "\n".join([f"@inlined\ndef step({ARGUMENTS}):", *ends, *(body or ["    pass"])])
        text = "\n\n".join([HEADER, *self._functions, step]) + "\n"
        columns = [end for view in self._columns for end in (view.start, view.end)]
        return Step(text, tuple(columns), tuple(self._products))

    # -- arguments

    def _slice(self, view: Place) -> str:
        """The columns of a place, as a slice."""
        k = self._columns.setdefault(view, len(self._columns))
        return f"first_{k}:end_{k}"

    def _array(self, view: Place) -> str:
        """The array of a place."""
        if view.buffer in ("vector", "bias_hh"):
            name = "bias_hh" if view.buffer == "bias_hh" else str(view.item)
            return f"vectors[{self._vectors.index(name)}]"
        alone = view.buffer in ("gates", "saved", "sums")
        return view.buffer if alone else f"{view.buffer}[{view.item}]"

    def _row(self, view: Place) -> str:
        """The columns of a place, of row s."""
        array = self._array(view)
        if view.buffer in ("vector", "bias_hh"):
            return f"{array}[{self._slice(view)}]"
        if view.buffer in ("states", "next_states", "dstates", "extra"):
            return f"{array}[s]"
        return f"{array}[s][{self._slice(view)}]"

    def _number(self, view: Place) -> str:
        """The only column of a place, of row s."""
        return f"{self._row(view)}[0]"

    # -- operations

    def _product(self, operation: ProductOp) -> str:
        view = operation.operand
        operand = self._array(view)
        if view.buffer not in ("states", "next_states", "dstates"):
            operand += f"[:, {self._slice(view)}]"
        if view.buffer == "scratch":
            operand = f"{self._array(view)}[: gates.shape[0], {self._slice(view)}]"
        self._products.append(operation)
        return (
            f"product({operand}, weights[{len(self._products) - 1}], None, "
            f"{self._array(operation.out)})"
        )

    def _loop(self, name: str, loop: Loop) -> str:
        """Add the function of a loop; its call."""
        names: dict[Place, str] = {}
        calls: list[str] = []
        for view in [*loop.loads.values(), *[view for _, view in loop.stores]]:
            if view not in names:
                names[view] = f"a{len(names)}"
                scalar = view.width == 1 < loop.width
                calls.append(self._number(view) if scalar else self._row(view))
        first = names[loop.stores[0][1]]
        constants: dict[str, str] = {}

        def number(value: float) -> str:
            text = repr(float(value))
            return constants.setdefault(text, f"c{len(constants)}")

        def value_of(node: Node) -> str:
            known = self._program.numbers.get(node)
            return f"n{node.index}" if known is None else number(known)

        lines = []
        for node, view in loop.loads.items():
            scalar = view.width == 1 < loop.width
            read = names[view] + ("" if scalar else "[j]")
            if node.is_condition:
                read += f" != {number(0.0)}"
            lines.append(f"n{node.index} = {read}")
        for node in loop.nodes:
            values = [value_of(arg) for arg in node.args]
            values += [number(each) for each in _numbers(node)]
            lines.append(f"n{node.index} = {EXPRESSIONS[node.op].format(*values)}")
        for node, view in loop.stores:
            value = value_of(node)
            if node.is_condition:
                value = f"{number(1.0)} if {value} else {number(0.0)}"
            sign = "+=" if view.buffer == "sums" else "="
            lines.append(f"{names[view]}[j] {sign} {value}")
        head = [f"@row\ndef {name}({', '.join(names.values())}):"]
        head += [
            f"    {c} = of_type({first}[0], {_literal(text)})" for text, c in constants.items()
        ]
        head.append(f"    for j in range({first}.size):")
        self._functions.append("\n".join(head + [f"        {line}" for line in lines]))
        return f"{name}({', '.join(calls)})"

    def _reduction(self, name: str, operation: ReductionOp) -> str:
        """Add the function of a sum over a row; the statement that stores it."""
        views, node = operation.operands, operation.node
        arguments = [self._row(view) for view in views]
        names = [f"a{k}" for k in range(len(views))]
        lines = []
        term = "{0}[j]"
        if node.op == "row_rstd":
            arguments[0] = self._number(views[0])
            mean, *names = names
            lines += [f"    total = of_type({mean}, 0.0)"]
            term = f"({{0}}[j] - {mean}) * ({{0}}[j] - {mean})"
        else:
            lines += [f"    total = of_type({names[0]}[0], 0.0)"]
        together: dict[int, list[str]] = {}  # a loop for the arrays of each width
        for each, view in zip(names, views[-len(names) :], strict=True):
            together.setdefault(view.width, []).append(each)
        for group in together.values():
            terms = " + ".join(term.format(each) for each in group)
            lines += [f"    for j in range({group[0]}.size):", f"        total += {terms}"]
        count = " + ".join(f"{each}.size" for each in names)
        if node.op == "row_mean":
            lines.append(f"    return total / of_type(total, {count})")
        elif node.op == "row_rstd":
            lines.append(f"    variance = total / of_type(total, {count})")
            lines.append("    one = of_type(total, 1.0)")
            lines.append(f"    return one / sqrt(variance + of_type(total, {node.detail!r}))")
        else:
            lines.append("    return total")
        all_names = ", ".join(f"a{k}" for k in range(len(views)))
        self._functions.append("\n".join([f"@summed\ndef {name}({all_names}):", *lines]))
        return f"{self._number(operation.out)} = {name}({', '.join(arguments)})"


def _numbers(node: Node) -> Iterable[float]:
    """The constants of an operation."""
    match node.op:
        case "softsign":
            return (1.0,)
        case "hard_sigmoid":
            return tuple(node.detail)
        case "elu" | "leaky_relu":
            return (node.detail,)
    return ()


def _literal(text: str) -> str:
    """A float's repr as an expression."""
    return {"inf": "1e400", "-inf": "-1e400", "nan": "1e400 - 1e400"}.get(text, text)
