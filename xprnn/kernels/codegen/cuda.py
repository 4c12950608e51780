"""CUDA source of the kernels of a step: arguments of CuPy's ElementwiseKernel, and a function.

A kernel of one loop runs once for each element, like those of `kernels/cuda/pointwise.py`. In a
kernel of several operations a block of threads computes a row: `kernels/cuda/rows.h`. All values
are computed in the accumulation dtype A. Widths are no part of the text, but numbers that a launch
passes, so that one kernel is for layers of all sizes; only means divide by a width in the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.graph import Node
from ...cells.definition.step_program import Loop, Place, ReductionOp
from ...core.cell import ScratchSizes
from .launches import Kernel

Array = tuple[str, int | str]  # a buffer and an item of it, as in `Place`

# An expression of a value, from its arguments and the numbers of its detail
EXPRESSIONS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "sigmoid": "sigmoid({0})",
    "tanh": "tanh_of({0})",
    "exp": "exp_of({0})",
    "expm1": "expm1_of({0})",
    "log": "log_of({0})",
    "sqrt": "sqrt_of({0})",
    "softplus": "softplus({0})",
    "softsign": "softsign({0})",
    "elu": "elu({0}, {1})",
    "relu": "relu({0})",
    "leaky_relu": "leaky_relu({0}, {1})",
    "hard_sigmoid": "hard_sigmoid({0}, {1}, {2})",
    "abs": "abs_of({0})",
    "minimum": "minimum({0}, {1})",
    "maximum": "maximum({0}, {1})",
    "clip": "clip({0}, {1}, {2})",
    "where": "{0} ? {1} : {2}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "columns": "{0}",
}


INFINITE = {"inf": "(A(1) / A(0))", "-inf": "(A(-1) / A(0))", "nan": "(A(0) / A(0))"}


class Source(NamedTuple):
    """A kernel, for all dtypes and sizes."""

    name: str
    numbers: int  # of arguments n0, n1, ..., which come first
    inputs: tuple[tuple[str, str], ...]  # type, C or A, and name of the arrays that it only reads
    outputs: tuple[tuple[str, str], ...]  # of those that it writes
    by_rows: bool  # whether a block of threads computes a row
    text: str  # of a function with the kernel's name


class KernelCall(NamedTuple):
    """A kernel and its arguments in a step."""

    source: Source
    numbers: tuple[int, ...]
    arrays: tuple[Array, ...]  # those that it only reads, then those that it writes
    width: int  # the elements of a row, for each of which it runs once; 0: it computes rows


class StepArrays(NamedTuple):
    """The arrays of a step of a cell, but those of the width of each place in them."""

    columns: Mapping[Array, int]
    low: frozenset[Array]  # those in the compute dtype


def step_arrays(cell: DefinedCell, scratch: ScratchSizes) -> StepArrays:
    """The arrays of the steps of a cell."""
    H = cell.derived.widths["H"]
    columns: dict[Array, int] = {("gates", 0): cell.gates * H, ("saved", 0): cell.saved_size(H)}
    widths = (*scratch.numbers, *scratch.operands)
    columns |= {("scratch", k): width for k, width in enumerate(widths)}
    low: list[Array] = [("gates", 0), ("saved", 0), ("states", 0), ("next_states", 0)]
    low += [("scratch", k) for k in range(len(scratch.numbers), len(widths))]
    return StepArrays(columns, frozenset(low))


def emit(
    name: str, operations: Kernel, known: StepArrays, constants: Mapping[Node, float]
) -> KernelCall:
    """The kernel of some operations; `constants`: the `numbers` of the program."""
    return _Emitter(name, operations, known, constants).emit()


class _Emitter:
    def __init__(
        self, name: str, operations: Kernel, known: StepArrays, constants: Mapping[Node, float]
    ) -> None:
        self._name = name
        self._operations = operations
        self._known = known
        self._constants = constants
        self._numbers: dict[int, str] = {}  # by value: the names of arguments
        self._offsets: dict[int, str] = {}  # by number of columns: the names of offsets of a row
        self._uses_j = False  # the column of an element
        reads = [_array(view) for op in operations for view in op.reads]
        self._outputs = [*dict.fromkeys(_array(view) for op in operations for view in op.writes)]
        self._inputs = [each for each in dict.fromkeys(reads) if each not in self._outputs]
        self._names: dict[Array, str] = {}
        for array in (*self._inputs, *self._outputs):
            buffer, item = array
            if buffer == "vector":  # whose names are those of a definition
                item = sum(name.startswith(buffer) for name in self._names.values())
            is_only = buffer in ("gates", "saved", "bias_hh")
            self._names[array] = buffer if is_only else f"{buffer}_{item}"

    def emit(self) -> KernelCall:
        loop, *rest = self._operations
        if isinstance(loop, Loop) and not rest:
            body, width = self._element(loop), loop.width
        else:
            body, width = self._row(), 0
        inputs, outputs = (
            tuple([(self._type(each), self._names[each]) for each in arrays])
            for arrays in (self._inputs, self._outputs)
        )
        types = sorted({kind for kind, _ in (*inputs, *outputs)})
        if "A" not in types:
            body = ["typedef typename Accumulation<C>::Type A;", *body]
        arguments = ["Index i", *[f"Index {name}" for name in self._numbers.values()]]
        arguments += [f"const {kind}* {name}" for kind, name in inputs]
        arguments += [f"{kind}* {name}" for kind, name in outputs]
        lines = [
            f"template <{', '.join(f'class {each}' for each in types)}>",
            f"XP_FN void {self._name}({', '.join(arguments)}) {{",
            *_indented(body),
            "}",
        ]
        count = len(self._numbers)
        source = Source(self._name, count, inputs, outputs, not width, "\n".join(lines))
        return KernelCall(source, tuple(self._numbers), (*self._inputs, *self._outputs), width)

    # -- the two kinds of kernels

    def _element(self, loop: Loop) -> list[str]:
        """The body of a function that runs for each element: i = row * width + j."""
        body = self._loop(loop, is_alone=True)
        offsets, width = self._offset_lines(), self._number(loop.width)
        head = []
        if offsets or self._uses_j:
            head.append(f"const Index row = row_of(i, {width});")
        if self._uses_j:
            head.append(f"const Index j = i - row * {width};")
        return [*head, *offsets, *body]

    def _row(self) -> list[str]:
        """The body of a function that runs for each thread of a row's block."""
        body: list[str] = []
        for op in self._operations:
            if body:
                body.append("sync_row();")
            if isinstance(op, ReductionOp):
                body += ["{", *_indented(self._reduction(op)), "}"]
            else:
                body += [f"{self._own_columns(op.width)} {{", *_indented(self._loop(op)), "}"]
        head = ["const Index row = i / THREADS;", "const int first = first_column(i);"]
        return [*head, *self._offset_lines(), *body]

    # -- operations

    def _loop(self, loop: Loop, is_alone: bool = False) -> list[str]:
        """What is computed for an element, in column j: all is read before anything is stored."""
        lines = []
        for node, view in loop.loads.items():
            value = f"static_cast<A>({self._at(view, loop.width * is_alone)})"
            if node.is_condition:
                lines.append(f"const bool v{node.index} = {value} != 0;")
            else:
                lines.append(f"const A v{node.index} = {value};")
        for node in loop.nodes:
            values = [*map(self._value, node.args), *map(_literal, _details(node))]
            kind = "bool" if node.is_condition else "A"
            expression = EXPRESSIONS[node.op].format(*values)
            lines.append(f"const {kind} v{node.index} = {expression};")
        for node, view in loop.stores:
            lines.append(self._store(view, self._value(node), loop.width * is_alone))
        return lines

    def _reduction(self, op: ReductionOp) -> list[str]:
        """The sum of a row, or its mean or standard deviation."""
        views, term, lines = [*op.operands], "{0}", []
        if op.node.op == "row_rstd":
            mean, *views = views
            lines.append(f"const A mean = static_cast<A>({self._at(mean)});")
            term = "({0} - mean) * ({0} - mean)"
        lines.append("A share = 0;")
        for view in views:
            value = term.format(f"static_cast<A>({self._at(view)})")
            lines.append(f"{self._own_columns(view.width)} share += {value};")
        result, count = "sum_over_row(share)", self._number(sum(view.width for view in views))
        if op.node.op != "row_sum":
            result += f" / A({count})"
        if op.node.op == "row_rstd":
            result = f"1 / sqrt_of({result} + {_literal(op.node.detail)})"
        lines.append(f"const A value = {result};")
        return [*lines, f"if (first == 0) {self._store(op.out, 'value')}"]

    def _value(self, node: Node) -> str:
        number = self._constants.get(node)
        return f"v{node.index}" if number is None else _literal(number)

    # -- memory

    def _number(self, value: int) -> str:
        """The argument with a value."""
        return self._numbers.setdefault(value, f"n{len(self._numbers)}")

    def _offset_lines(self) -> list[str]:
        return [
            f"const Index {name} = row * {self._number(columns)};"
            for columns, name in self._offsets.items()
        ]

    def _own_columns(self, width: int) -> str:
        """The head of a statement for each column of a thread."""
        if width == 1:
            return "if (first == 0)"
        return f"for (int j = first; j < {self._number(width)}; j += STEP)"

    def _type(self, array: Array) -> str:
        return "C" if array in self._known.low else "A"

    def _at(self, view: Place, width: int = 0) -> str:
        """The element of a place in column j; `width`: that of the rows of which i counts."""
        array, terms = _array(view), []
        if view.buffer not in ("vector", "bias_hh"):
            columns = self._known.columns.get(array, view.width)
            if (view.start, view.width, columns) == (0, width, width):
                return f"{self._names[array]}[i]"
            terms.append(self._offsets.setdefault(columns, f"r{len(self._offsets)}"))
        if view.width > 1:
            self._uses_j = True
            terms.append("j")
        if view.start:
            terms.append(self._number(view.start))
        return f"{self._names[array]}[{' + '.join(terms) or '0'}]"

    def _store(self, view: Place, value: str, width: int = 0) -> str:
        return f"{self._at(view, width)} = static_cast<{self._type(_array(view))}>({value});"


def _array(view: Place) -> Array:
    return view.buffer, view.item


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _details(node: Node) -> tuple[float, ...]:
    """The constants of an operation."""
    match node.op:
        case "hard_sigmoid":
            return tuple(node.detail)
        case "elu" | "leaky_relu":
            return (node.detail,)
    return ()


def _literal(number: float) -> str:
    """A number in the accumulation dtype."""
    text = repr(float(number))
    return INFINITE.get(text, f"A({text})")
