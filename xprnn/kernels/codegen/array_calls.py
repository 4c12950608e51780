"""A program as calls of array functions that write to `out`, in few scratch arrays.

A loop over elements becomes one call, or a few, for each of its operations, on whole arrays. A
value is computed where it is stored if nothing reads what is there in the meantime, else in a
scratch array, which other values use before and after. The next states may be the same memory as
the states: they are stored when no state is read any more.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from ...cells.definition.defined_cell import DefinedCell
from ...cells.definition.graph import Node
from ...cells.definition.operations import OPERATIONS
from ...cells.definition.step_program import Loop, Place, ProductOp, Program, ReductionOp
from ...cells.definition.tracing import RECURRENT
from ...core.cell import ScratchSizes

# The operand that is the largest number whose exponential is finite, which depends on the dtype
LARGEST_EXPONENT = "largest exponent"


class Matrix(NamedTuple):
    """Rows of a parameter, as an operand."""

    name: str
    rows: tuple[int, int] | None  # the first, and that after the last one; None: all
    transposed: bool


Operand = Place | Matrix | float | str
Array = tuple[str, int | str]  # a buffer and an item of it


class ArrayCall(NamedTuple):
    """A call of an array function; `copyto` and `where`: only where a condition holds."""

    function: str
    operands: tuple[Operand, ...]
    out: Place
    where: Place | None = None

    @property
    def is_elementwise(self) -> bool:
        """Whether an operand may be the memory of `out`."""
        return self.function != "matmul"

    @property
    def reads(self) -> list[Place]:
        """The arrays that are read."""
        read = [each for each in self.operands if isinstance(each, Place)]
        return read if self.where is None else [*read, self.where, self.out]

    @property
    def arguments(self) -> tuple[Operand | None, ...]:
        """The operands, the result and the condition."""
        return (*self.operands, self.out, self.where)

    @property
    def touches(self) -> list[Place]:
        """The arrays that are read or written."""
        return [*self.reads, self.out]

    def replaced(self, replace: Callable[[Place], Place]) -> ArrayCall:
        """The call with other arrays."""
        operands = [replace(each) if isinstance(each, Place) else each for each in self.operands]
        where = None if self.where is None else replace(self.where)
        return ArrayCall(self.function, tuple(operands), replace(self.out), where)


class ArrayCode(NamedTuple):
    """The calls of a step, in order; conditions follow the other arrays in "scratch"."""

    calls: tuple[ArrayCall, ...]
    scratch: ScratchSizes


def array_code(cell: DefinedCell, program: Program) -> ArrayCode:
    """The calls that a program consists of."""
    lowering = _Lowering(cell, program)
    return min(
        [
            _with_scratch(_needed(_without_copies(calls, widths)), widths)
            for calls, widths in (
                (lowering.calls, lowering.widths),
                side_by_side(lowering.calls, lowering.widths),
            )
        ],
        key=lambda code: len(code.calls),
    )


# -- the calls of an operation; y is the result, into which nothing is written before it is read

Emit = Callable[..., Any]  # returns `out`

_UFUNCS = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "tanh": "tanh",
    "exp": "exp",
    "expm1": "expm1",
    "log": "log",
    "sqrt": "sqrt",
    "abs": "absolute",
    "minimum": "minimum",
    "maximum": "maximum",
    "gt": "greater",
    "ge": "greater_equal",
    "lt": "less",
    "le": "less_equal",
    "eq": "equal",
    "ne": "not_equal",
}
_FOLDED = ("add", "sub", "mul", "div", "neg")  # of numbers: computed when code is generated


def _neg(emit: Emit, y: Place, _: Any, a: Operand) -> None:
    # not `negative`: in place it is wrong for float32 columns 16 bytes apart (NumPy 2.4)
    emit("multiply", a, -1.0, out=y)


def _sigmoid(emit: Emit, y: Place, _: Any, a: Operand) -> None:
    emit("multiply", a, -1.0, out=y)
    emit("minimum", y, LARGEST_EXPONENT, out=y)
    emit("exp", y, out=y)
    emit("add", y, 1.0, out=y)
    emit("divide", 1.0, y, out=y)


def _softplus(emit: Emit, y: Place, _: Any, a: Operand) -> None:
    emit("logaddexp", a, 0.0, out=y)


def _softsign(emit: Emit, y: Place, _: Any, a: Operand) -> None:
    emit("absolute", a, out=y)
    emit("add", y, 1.0, out=y)
    emit("divide", a, y, out=y)


def _relu(emit: Emit, y: Place, _: Any, a: Operand) -> None:
    emit("maximum", a, 0.0, out=y)


def _leaky_relu(emit: Emit, y: Place, slope: float, a: Operand) -> None:
    emit("multiply", a, slope, out=y)
    emit("copyto", a, out=y, where=emit("greater", a, 0.0))


def _elu(emit: Emit, y: Place, alpha: float, a: Operand) -> None:
    emit("minimum", a, 0.0, out=y)
    emit("expm1", y, out=y)
    emit("multiply", y, alpha, out=y)
    emit("copyto", a, out=y, where=emit("greater", a, 0.0))


def _hard_sigmoid(emit: Emit, y: Place, detail: tuple[float, float], a: Operand) -> None:
    emit("multiply", a, detail[0], out=y)
    emit("add", y, detail[1], out=y)
    _clip(emit, y, None, y, 0.0, 1.0)


def _clip(emit: Emit, y: Place, _: Any, a: Operand, low: Operand, high: Operand) -> None:
    emit("maximum", a, low, out=y)
    emit("minimum", y, high, out=y)


def _where(emit: Emit, y: Place, _: Any, condition: Place, a: Operand, b: Operand) -> None:
    emit("copyto", b, out=y)
    emit("copyto", a, out=y, where=condition)


def _row_sum(emit: Emit, y: Place, _: Any, *values: Operand) -> None:
    emit("sum", values[0], out=y)
    for value in values[1:]:
        part = emit("sum", value)
        emit("add", y, part, out=y)


def _row_mean(emit: Emit, y: Place, _: Any, *values: Place) -> None:
    _row_sum(emit, y, None, *values)
    emit("divide", y, float(sum(value.width for value in values)), out=y)


def _row_rstd(emit: Emit, y: Place, eps: float, mean: Operand, *values: Place) -> None:
    squares: list[Place] = []
    for value in values:
        deviation = emit("subtract", value, mean)
        emit("multiply", deviation, deviation, out=deviation)
        squares.append(deviation)
    _row_mean(emit, y, None, *squares)
    emit("add", y, eps, out=y)
    emit("sqrt", y, out=y)
    emit("divide", 1.0, y, out=y)


_SEQUENCES: dict[str, Callable[..., None]] = {
    "neg": _neg,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "softsign": _softsign,
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "hard_sigmoid": _hard_sigmoid,
    "clip": _clip,
    "where": _where,
    "row_sum": _row_sum,
    "row_mean": _row_mean,
    "row_rstd": _row_rstd,
}
_COMPARISONS = ("greater", "greater_equal", "less", "less_equal", "equal", "not_equal")


class _Lowering:
    """The calls of a program, each value in a scratch array of its own."""

    def __init__(self, cell: DefinedCell, program: Program) -> None:
        self._cell = cell
        self._values: dict[Node, Operand] = dict(program.numbers)
        self._next_states: dict[int | str, Place] = {}  # until they are stored
        self._copies: dict[tuple[Place, int], Place] = {}  # of one column in several
        self.calls: list[ArrayCall] = []
        self.widths: dict[Array, int] = {}  # of scratch arrays
        for k, scratch in enumerate(program.scratch):
            self.widths["scratch", k] = scratch.width
        for operation in program.operations:
            if isinstance(operation, ProductOp):
                self._multiply(operation)
            elif isinstance(operation, ReductionOp):
                self._reduce(operation)
            else:
                self._loop(operation)
        for item, value in self._next_states.items():
            self._emit("copyto", value, out=Place("next_states", item, 0, value.width))

    def _emit(
        self, function: str, *operands: Operand, out: Place | None = None, where: Any = None
    ) -> Place:
        """Add a call; without `out` in a new array as wide as the operands, or of one column."""
        if out is None:
            widths = [each.width for each in operands if isinstance(each, Place)]
            width = 1 if function == "sum" else max(widths, default=1)
            out = self._new(width, function in _COMPARISONS)
        if function not in ("copyto", "matmul", "sum"):
            operands = tuple([self._repeated(each, out.width) for each in operands])
        if where is not None:
            where = self._repeated(where, out.width)
        self.calls.append(ArrayCall(function, operands, out, where))
        return out

    def _repeated(self, operand: Operand, width: int) -> Operand:
        """An operand of one column in as many: else NumPy would allocate a buffer at each call."""
        if not isinstance(operand, Place) or operand.width == width:
            return operand
        key = operand, width
        if key not in self._copies:
            copy = self._copies[key] = self._new(width, operand.buffer == "condition")
            self._emit("copyto", operand, out=copy)
        return self._copies[key]

    def _new(self, width: int, is_condition: bool = False) -> Place:
        name = "condition" if is_condition else "scratch"
        item = len(self.widths)
        self.widths[name, item] = width
        return Place(name, item, 0, width)

    def _memory(self, view: Place) -> Place:
        """Where a place is until the next states are stored."""
        if view.buffer == "next_states" and view.item in self._next_states:
            return self._next_states[view.item].part(view.start, view.width)
        return view

    def _multiply(self, product: ProductOp) -> None:
        operand, out = self._memory(product.operand), self._memory(product.out)
        if product.matrix != RECURRENT:
            matrix = Matrix(product.matrix, None, not product.transposed)
            self._emit("matmul", operand, matrix, out=out)
            return
        column, first = 0, True
        for start, stop in self._cell.derived.runs(product.blocks):
            matrix = Matrix(RECURRENT, (start, stop), not product.transposed)
            columns = column, stop - start
            column += stop - start
            if not product.transposed:
                self._emit("matmul", operand, matrix, out=out.part(*columns))
            elif first:
                self._emit("matmul", operand.part(*columns), matrix, out=out)
            else:
                more = self._new(out.width)
                self._emit("matmul", operand.part(*columns), matrix, out=more)
                self._emit("add", out, more, out=out)
            first = False

    def _reduce(self, reduction: ReductionOp) -> None:
        node, views = reduction.node, [self._memory(each) for each in reduction.operands]
        for k, arg in enumerate(node.args):
            value = self._values.get(arg)
            if isinstance(value, Place):  # else it is a part of a product
                views[k] = value
        first = 1 if node.op == "row_rstd" else 0  # after the mean
        operands = [*views[:first], *_joined(views[first:])]
        _SEQUENCES[node.op](self._emit, self._memory(reduction.out), node.detail, *operands)

    def _loop(self, loop: Loop) -> None:
        self._values |= {
            node: self._memory(view)
            for node, view in loop.loads.items()
            if node not in self._values
        }
        for node in _nearest(loop, self._values):
            self._values[node] = self._compute(node)
        for node, _ in loop.stores:  # all is read before anything is stored
            value = self._values[node]
            if any(isinstance(value, Place) and value.overlaps(out) for _, out in loop.stores):
                self._values[node] = self._emit("copyto", value)
        for node, view in loop.stores:
            if view.buffer == "next_states":
                self._next_states[view.item] = self._new(view.width)
            self._emit("copyto", self._values[node], out=self._memory(view))

    def _compute(self, node: Node) -> Operand:
        args = [self._argument(arg) for arg in node.args]
        if node.op == "columns":
            return self._repeated(args[0], node.detail)
        if node.op in _FOLDED and all(isinstance(arg, float) for arg in args):
            return float(OPERATIONS[node.op].compute(None, None, *args))
        y = self._new(node.width if isinstance(node.width, int) else 1, node.is_condition)
        if node.op in _UFUNCS:
            self._emit(_UFUNCS[node.op], *args, out=y)
        else:
            _SEQUENCES[node.op](self._emit, y, node.detail, *args)
        return y

    def _argument(self, node: Node) -> Operand:
        """The value of a node; a condition that is stored as a number, as bools."""
        value = self._values[node]
        if node.is_condition and isinstance(value, Place) and value.buffer != "condition":
            value = self._values[node] = self._emit("not_equal", value, 0.0)
        return value


def _nearest(loop: Loop, known: Container[Node]) -> list[Node]:
    """The nodes of a loop that are not known, each shortly before it is read."""
    own, order = {*loop.nodes}, dict[Node, None]()
    todo = [node for node, _ in reversed(loop.stores)]
    while todo:
        node = todo[-1]
        before = [arg for arg in node.args if arg in own and arg not in order and arg not in known]
        before.sort(key=attrgetter("is_condition"))  # last: nothing else needs its memory
        if node in own and node not in known and before:
            todo += reversed(before)
            continue
        todo.pop()
        if node in own and node not in known:
            order[node] = None
    return [*order]


def _joined(views: Sequence[Place]) -> list[Place]:
    """The same columns in fewer places, where they are side by side."""
    joined: list[Place] = []
    for view in views:
        if joined and view == joined[-1]._replace(start=joined[-1].end, width=view.width):
            joined[-1] = joined[-1]._replace(width=joined[-1].width + view.width)
        else:
            joined.append(view)
    return joined


# -- calls on columns side by side


def side_by_side(
    calls: Sequence[ArrayCall], widths: Mapping[Array, int]
) -> tuple[list[ArrayCall], dict[Array, int]]:
    """The calls with one in place of several on columns side by side, and the arrays' widths.

    Arrays that several calls write become one, if that makes the calls one.
    """
    calls, widths, before = [*calls], dict(widths), -1
    while before != len(calls):
        before, k = len(calls), 0
        while k < len(calls):
            function = calls[k].function
            same = [j for j in range(k + 1, len(calls)) if calls[j].function == function]
            joined = function not in ("matmul", "sum") and any(
                _join(calls, k, j, widths) or _join(calls, j, k, widths) for j in same
            )
            k += not joined  # the call that is wider now may be joined again
    return calls, widths


def _join(calls: list[ArrayCall], left: int, right: int, widths: dict[Array, int]) -> bool:
    """Make one call of two, if they are the same on columns side by side; whether they are."""
    a, b = calls[left], calls[right]
    pairs = _followed(a, b, widths)
    at = None if pairs is None else _meeting(calls, *sorted([left, right]))
    if pairs is None or at is None:
        return False
    total = a.out.width + b.out.width
    del calls[max(left, right)], calls[min(left, right)]
    calls.insert(at, a.replaced(lambda view: view._replace(width=total)))
    for one, other in pairs.items():
        both = Place(one.buffer, len(widths), 0, total)
        widths[_array(both)] = total
        calls[:] = _moved(calls, _array(one), both)
        calls[:] = _moved(calls, _array(other), both.part(one.width, other.width))
    return True


def _followed(a: ArrayCall, b: ArrayCall, widths: Mapping[Array, int]) -> dict[Place, Place] | None:
    """The scratch arrays of a, and those of b that are to follow in the same array.

    None: the other columns of b do not follow those of a, or the calls differ.
    """
    pairs, is_adjacent = dict[Place, Place](), False
    for one, other in zip(a.arguments, b.arguments, strict=True):
        if not isinstance(one, Place) or not isinstance(other, Place):
            if repr(one) != repr(other):  # 0.0 and -0.0 differ
                return None
            continue
        if (one.width, other.width) != (a.out.width, b.out.width):
            return None
        if other == one._replace(start=one.end, width=other.width):
            is_adjacent = True
            continue
        are_whole = _is_whole(one, widths) and _is_whole(other, widths)
        if not are_whole or one.buffer != other.buffer or pairs.setdefault(one, other) != other:
            return None
    once = len({*pairs, *pairs.values()}) == 2 * len(pairs)
    return pairs if is_adjacent and once else None


def _meeting(calls: Sequence[ArrayCall], first: int, last: int) -> int | None:
    """Where two calls can be made together: at the first, or the last; the index without both."""
    if not any(_conflict(calls[last], each) for each in calls[first:last]):
        return first
    if not any(_conflict(calls[first], each) for each in calls[first + 1 : last + 1]):
        return last - 1
    return None


def _is_whole(view: Place, widths: Mapping[Array, int]) -> bool:
    """Whether it is a scratch array, all columns."""
    return view.width == widths.get(_array(view))


def _conflict(a: ArrayCall, b: ArrayCall) -> bool:
    """Whether the order of two calls matters."""
    return any(_overlap(a.out, view) for view in b.touches) or any(
        _overlap(b.out, view) for view in a.reads
    )


# -- values computed where they are stored


def _without_copies(calls: Sequence[ArrayCall], widths: Mapping[Array, int]) -> list[ArrayCall]:
    """The calls without the copies of values that can be computed where they are stored."""
    calls, k = [*calls], 0
    while k < len(calls):
        call = calls[k]
        if _is_removable(calls, k, widths):
            (source,) = call.operands
            calls = _moved(calls[:k] + calls[k + 1 :], _array(source), call.out)
        else:
            k += 1
    return calls


def _array(view: Any) -> Array:
    return view.buffer, view.item


def _moved(calls: Iterable[ArrayCall], array: Array, to: Place) -> list[ArrayCall]:
    """The calls with another place for an array."""

    def replace(view: Place) -> Place:
        return to.part(view.start, view.width) if _array(view) == array else view

    return [call.replaced(replace) for call in calls]


def _is_removable(calls: Sequence[ArrayCall], k: int, widths: Mapping[Array, int]) -> bool:
    """Whether what a copy reads can be computed where it writes.

    Between the first and the last use of the value, the place must not be written, and what was
    there must not be read; except by the first call, element by element.
    """
    call = calls[k]
    source, out = call.operands[0], call.out
    if call.function != "copyto" or call.where is not None or not isinstance(source, Place):
        return False
    if source.buffer != "scratch" or not source.width == out.width == widths[_array(source)]:
        return False
    used = [j for j, each in enumerate(calls) if _array(source) in map(_array, each.touches)]
    first = used[0]
    for j in range(first, used[-1] + 1):
        each = calls[j]
        if j == k:
            continue
        if _overlap(each.out, out):
            return False
        for read in each.reads:
            is_first = j == first and each.is_elementwise and each.out.width == out.width
            same = (read.start, read.width) == (out.start, out.width)
            is_value = j > k and _array(read) == _array(out)
            if _overlap(read, out) and not (is_first and same) and not is_value:
                return False
    return True


def _overlap(a: Place, b: Place) -> bool:
    """Whether two places may share memory, as states and next states may."""
    return _shared(a).overlaps(_shared(b))


def _shared(view: Place) -> Place:
    return view._replace(buffer="states") if view.buffer == "next_states" else view


# -- scratch arrays


def _needed(calls: Sequence[ArrayCall]) -> list[ArrayCall]:
    """The calls whose results are read, or stored outside of scratch arrays."""
    read: set[Array] = set()
    kept = []
    for call in reversed(calls):
        if call.out.buffer not in ("scratch", "condition") or _array(call.out) in read:
            kept.append(call)
            read |= {_array(view) for view in call.reads}
    return kept[::-1]


def _with_scratch(calls: Sequence[ArrayCall], widths: dict[Array, int]) -> ArrayCode:
    """The calls with few scratch arrays: a value gets one whose value is not read any more."""
    first: dict[Array, int] = {}
    last: dict[Array, int] = {}
    for k, call in enumerate(calls):
        for view in call.touches:
            if _array(view) in widths:
                first.setdefault(_array(view), k)
                last[_array(view)] = k
    sizes: dict[str, list[int]] = {"scratch": [], "condition": []}
    free: dict[tuple[str, int], list[int]] = {}
    assigned: dict[Array, int] = {}
    for k, call in enumerate(calls):
        ending = {_array(view): view for view in call.reads if last.get(_array(view)) == k}
        out, width = _array(call.out), call.out.width
        early = [
            array
            for array, view in ending.items()
            if call.is_elementwise and view.width == width == widths[array]
        ]
        _release(early, assigned, widths, free)
        if first.get(out) == k:
            kind = out[0], widths[out]
            available = free.setdefault(kind, [])
            if not available:
                available.append(len(sizes[out[0]]))
                sizes[out[0]].append(widths[out])
            assigned[out] = available.pop()
        _release([each for each in ending if each not in early], assigned, widths, free)
    offset = len(sizes["scratch"])

    def final(view: Place) -> Place:
        if _array(view) not in assigned:
            return view
        item = assigned[_array(view)]
        item += offset if view.buffer == "condition" else 0
        return view._replace(buffer="scratch", item=item)

    placed = [call.replaced(final) for call in calls]
    changing = [c for c in placed if c.function != "copyto" or c.operands[0] != c.out]
    numbers, conditions = tuple(sizes["scratch"]), tuple(sizes["condition"])
    return ArrayCode(tuple(changing), ScratchSizes(numbers, conditions))


def _release(
    arrays: Iterable[Array],
    assigned: dict[Array, int],
    widths: dict[Array, int],
    free: dict[tuple[str, int], list[int]],
) -> None:
    for array in arrays:
        free.setdefault((array[0], widths[array]), []).append(assigned[array])
