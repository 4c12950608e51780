"""The graph of one step of a cell: nodes of whole arrays, made by writing arithmetic on nodes."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import numpy as np

Width = int | str | None  # of a row: a number, a name such as "H"; None: a number without rows

LEAVES = ("gate", "state", "input", "vector", "matrix", "keep", "upstream", "constant")
CONDITIONS = ("gt", "ge", "lt", "le", "eq", "ne")
_OPERATORS: dict[Any, Any] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.divide: operator.truediv,
    np.greater: operator.gt,
    np.greater_equal: operator.ge,
    np.less: operator.lt,
    np.less_equal: operator.le,
    np.equal: operator.eq,
    np.not_equal: operator.ne,
}


class Node:
    """A value of a step: an array (N, width), a vector (width,), or a number.

    A node is read only by arithmetic, comparisons and the functions of a definition; everything
    that needs its numbers is refused, with the line that asks for them.
    """

    __slots__ = ("args", "detail", "graph", "has_rows", "index", "op", "width")

    def __init__(
        self, graph: Graph, op: str, args: tuple[Node, ...], detail: Any, width: Width
    ) -> None:
        self.graph: Graph = graph
        self.index: int = len(graph.nodes)  # larger than those of `args`
        self.op: str = op
        self.args: tuple[Node, ...] = args
        self.detail: Any = detail  # of a leaf its name or number, of a function its constants
        self.width: Width = width
        # whether it may differ from row to row
        self.has_rows: bool = any(a.has_rows for a in args) or (
            not args and op not in ("vector", "matrix", "constant")
        )
        graph.nodes.append(self)

    @property
    def is_condition(self) -> bool:
        """Whether it is a comparison, which only `where` reads."""
        return self.op in CONDITIONS

    @property
    def is_constant(self) -> bool:
        """Whether it is a number that is known when a definition is traced."""
        return self.op == "constant"

    def __add__(self, other: Any) -> Node:
        """The sum."""
        return self._with("add", other)

    def __radd__(self, other: Any) -> Node:
        """The sum."""
        return self._with("add", other, swap=True)

    def __sub__(self, other: Any) -> Node:
        """The difference."""
        return self._with("sub", other)

    def __rsub__(self, other: Any) -> Node:
        """The difference."""
        return self._with("sub", other, swap=True)

    def __mul__(self, other: Any) -> Node:
        """The product of elements."""
        return self._with("mul", other)

    def __rmul__(self, other: Any) -> Node:
        """The product of elements."""
        return self._with("mul", other, swap=True)

    def __truediv__(self, other: Any) -> Node:
        """The quotient."""
        return self._with("div", other)

    def __rtruediv__(self, other: Any) -> Node:
        """The quotient."""
        return self._with("div", other, swap=True)

    def __neg__(self) -> Node:
        """The negative value."""
        return self.graph.make("neg", self)

    def __pos__(self) -> Node:
        """The value itself."""
        return self

    def __abs__(self) -> Node:
        """The absolute value."""
        return self.graph.make("abs", self)

    def __gt__(self, other: Any) -> Node:
        """A comparison."""
        return self._with("gt", other)

    def __ge__(self, other: Any) -> Node:
        """A comparison."""
        return self._with("ge", other)

    def __lt__(self, other: Any) -> Node:
        """A comparison."""
        return self._with("lt", other)

    def __le__(self, other: Any) -> Node:
        """A comparison."""
        return self._with("le", other)

    def __eq__(self, other: object) -> Node:  # type: ignore[override]
        """A comparison; sets and dicts find nodes by identity."""
        return self._with("eq", other)

    def __ne__(self, other: object) -> Node:  # type: ignore[override]
        """A comparison."""
        return self._with("ne", other)

    def __hash__(self) -> int:
        """Of the identity."""
        return object.__hash__(self)

    def _with(self, op: str, other: Any, swap: bool = False) -> Node:
        lifted = self.graph.lift(other)
        return self.graph.make(op, *((lifted, self) if swap else (self, lifted)))

    # -- what a definition must not do

    def __bool__(self) -> bool:
        """Refused."""
        refuse("branches on a value, which differs by row and step; use f.where")

    def __float__(self) -> float:
        """Refused."""
        refuse("reads a value as a number, as functions of math do; use the functions of f")

    def __int__(self) -> int:
        """Refused."""
        return int(float(self))

    def __index__(self) -> int:
        """Refused."""
        return int(float(self))

    def __complex__(self) -> complex:
        """Refused."""
        return complex(float(self))

    def __iter__(self) -> NoReturn:
        """Refused."""
        refuse("iterates over a value; a definition computes with whole arrays")

    def __getitem__(self, key: Any) -> NoReturn:
        """Refused."""
        refuse("indexes a value; a definition computes with whole arrays")

    def __pow__(self, other: Any) -> NoReturn:
        """Refused."""
        refuse("raises a value to a power; multiply, or use f.exp and f.log")

    def __rpow__(self, other: Any) -> NoReturn:
        """Refused."""
        refuse("raises a number to the power of a value; use f.exp")

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        """Refused."""
        refuse("makes a NumPy array of a value; use the functions of f")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """NumPy's numbers are constants, whose operators are ufuncs; others are refused."""
        if ufunc not in _OPERATORS or method != "__call__" or options:
            refuse(f"calls numpy.{ufunc.__name__} on a value; use the functions of f")
        values = [each.item() if isinstance(each, np.generic) else each for each in inputs]
        return _OPERATORS[ufunc](*values)

    def __array_function__(self, function: Any, *arguments: Any) -> NoReturn:
        """Refused."""
        refuse(f"calls numpy.{function.__name__} on a value; use the functions of f")

    def __repr__(self) -> str:
        """The operation, with arguments by index."""
        arguments = [f"n{node.index}" for node in self.args]
        if self.detail is not None:
            arguments.append(repr(self.detail))
        return f"n{self.index} = {self.op}({', '.join(arguments)})"


class Graph:
    """The nodes of a graph, each after its arguments.

    A graph that is reduced has each value once, without the operations that change nothing.
    """

    def __init__(self, reduced: bool = False) -> None:
        self.nodes: list[Node] = []
        self._reduced = reduced
        self._known: dict[tuple[Any, ...], Node] = {}

    def leaf(self, op: str, detail: Any, width: Width) -> Node:
        """A node without arguments, made once for each name."""
        key = op, (), detail, width
        if key not in self._known:
            self._known[key] = Node(self, op, (), detail, width)
        return self._known[key]

    def constant(self, value: float) -> Node:
        """The node of a number."""
        # 0.0 and -0.0 are equal, and different constants
        return self.leaf("constant", _Number(value), None)

    def lift(self, value: Any) -> Node:
        """A node as it is, a number as a constant; others are refused."""
        if isinstance(value, Node):
            if value.graph is not self:
                refuse("uses a value of another definition, or of another call of this one")
            return value
        if isinstance(value, (bool, np.bool_)) or not isinstance(
            value, (int, float, np.integer, np.floating)
        ):
            refuse(f"computes with a {type(value).__name__}; constants are numbers")
        return self.constant(float(value))

    def make(self, op: str, *args: Node, detail: Any = None, width: Width = None) -> Node:
        """The node of an operation; without `width`, it is an element-wise one."""
        if width is None:
            width = common_width(op, args)
        if not self._reduced:
            return Node(self, op, args, detail, width)
        node = _reduced(self, op, args)
        if node is None:
            key = op, args, detail, width
            node = self._known.get(key)
            if node is None:
                node = self._known[key] = Node(self, op, args, detail, width)
        return node

    def where(self, condition: Node, a: Any, b: Any) -> Node:
        """`a` where the condition holds, else `b`: the other one is not computed with."""
        return self.make("where", condition, self.lift(a), self.lift(b))


class _Number(float):
    """A float that equals another one only if their bits are equal."""

    def __eq__(self, other: object) -> bool:
        """A comparison; nodes are found in sets and dicts by identity."""
        return isinstance(other, float) and self.hex() == other.hex()

    def __hash__(self) -> int:
        """Of the bits."""
        return hash(self.hex())


def common_width(op: str, args: Iterable[Node]) -> Width:
    """The width of an element-wise operation; numbers, and one column, are repeated."""
    args = tuple(args)
    if any(node.is_condition for node in args[1 if op == "where" else 0 :]):
        refuse("computes with a comparison, which only the first argument of f.where may be")
    if op == "where" and not args[0].is_condition:
        refuse("selects by a value; the first argument of f.where is a comparison")
    widths = {node.width: None for node in args if node.width is not None}
    wide = [width for width in widths if width != 1]
    if len(wide) > 1:
        refuse(f"combines values of width {' and '.join(map(str, wide))}")
    return wide[0] if wide else next(iter(widths), None)


def _reduced(graph: Graph, op: str, args: tuple[Node, ...]) -> Node | None:
    """A node that an operation equals, without computing it; None if it is to be computed."""
    if op in _FOLDED and all(node.is_constant for node in args):
        numbers = [float(node.detail) for node in args]
        if op != "div" or numbers[1]:
            return graph.constant(_FOLDED[op](*numbers))
    match op:
        case "where" if args[1] is args[2]:
            return args[1]
        case "neg" if args[0].op == "neg":
            return args[0].args[0]
        case "add" | "sub" | "mul" | "div":
            a, b = args
            neutral = 0.0 if op in ("add", "sub") else 1.0
            if b.is_constant and b.detail == neutral:
                return a
            if a.is_constant and a.detail == neutral and op in ("add", "mul"):
                return b
    return None


_FOLDED: Mapping[str, Any] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
}


def reachable(results: Iterable[Node], given: Iterable[Node] = ()) -> list[Node]:
    """The nodes that `results` depend on, in order, down to those that are `given`."""
    stop, found = set(given), set[Node]()
    todo = [node for node in results if node not in stop]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [arg for arg in node.args if arg not in stop]
    return sorted(found, key=operator.attrgetter("index"))


def refuse(what: str, error: type[Exception] = TypeError) -> NoReturn:
    """Raise an error that names the line of the user's code that is being traced."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__")):
        frame = cast("Any", frame.f_back)
    raise error(f"{frame.f_code.co_filename}:{frame.f_lineno}: {what}")


def _is_internal(module: Any) -> bool:
    package = __name__.rpartition(".")[0]
    return str(module).startswith((f"{package}.", "numpy"))
