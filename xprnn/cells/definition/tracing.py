"""`xprnn.cell`: a function is traced, once for each set of options, into the graph of a step."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from .graph import Graph, Node, Width, reachable, refuse

DIGEST_VERSION = 1  # of what `TracedCell.digest` hashes; files name it
RECURRENT = "weight_hh"
RESERVED = ("weight_ih", RECURRENT, "bias_ih", "bias_hh")
StepFunction = Callable[[Any, Any, Any], Any]


class Signature(NamedTuple):
    """What a definition says besides its equations."""

    gates: tuple[str, ...]
    states: Mapping[str, float]  # initial values
    sizes: Mapping[str, int | str]  # widths of states other than H; a name is an argument
    vectors: tuple[str, ...]
    inputs: tuple[str, ...]
    options: Mapping[str, Any]  # defaults


class Matrix(NamedTuple):
    """A matrix of `f.linear`, or the blocks of W_hh that are read."""

    rows: Width  # of each block
    columns: Width
    blocks: tuple[str, ...] = ()  # the gates of W_hh
    biased: tuple[str, ...] = ()  # those of them that add a bias


class TracedCell(NamedTuple):
    """The graph of a step as it is written: nothing is reduced."""

    signature: Signature
    graph: Graph
    next_states: tuple[Node, ...]
    matrices: Mapping[str, Matrix]  # in torch's order: W_hh first

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of sizes that are arguments of a layer."""
        named = [node.width for node in self.graph.nodes] + [
            size for matrix in self.matrices.values() for size in (matrix.rows, matrix.columns)
        ]
        return tuple(dict.fromkeys(size for size in named if isinstance(size, str) and size != "H"))

    @property
    def digest(self) -> str:
        """A hash of the graph, which depends on no name, order or value that it does not need."""
        order = _in_order(self.next_states)
        names = {node: k for k, node in enumerate(order)}
        nodes = [
            [node.op, [names[arg] for arg in node.args], _plain(node.detail), node.width]
            for node in order
        ]
        s = self.signature
        states = [[name, float(value).hex()] for name, value in s.states.items()]
        results = [names[node] for node in self.next_states]
        content = [DIGEST_VERSION, s.gates, states, dict(s.sizes), s.vectors, s.inputs]
        text = json.dumps([*content, self.matrices, nodes, results], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _in_order(results: Sequence[Node]) -> list[Node]:
    """The nodes on which `results` depend, as a search in depth leaves them."""
    ordered: dict[Node, None] = {}
    todo = [(node, False) for node in reversed(results)]
    while todo:
        node, is_left = todo.pop()
        if is_left:
            ordered[node] = None
        elif node not in ordered:
            todo.append((node, True))
            todo += [(arg, False) for arg in reversed(node.args)]
    return [*ordered]


def _plain(detail: Any) -> Any:
    """A node's detail as JSON; floats by their bits."""
    if isinstance(detail, tuple):
        return [_plain(item) for item in detail]
    return float(detail).hex() if isinstance(detail, float) else detail


class Functions:
    """`f`, the first argument of a definition: its functions, products, vectors and options."""

    def __init__(self, signature: Signature, options: Mapping[str, Any]) -> None:
        self._graph = Graph()
        self._signature = signature
        self._options = options
        self._matrices: dict[str, Matrix] = {}
        self._blocks: dict[str, tuple[Width, bool]] = {}  # of W_hh: columns, and whether biased
        self._masks = 0

    def __getattr__(self, name: str) -> Any:
        """A vector, or an option."""
        known = [*self._signature.vectors, *self._signature.options]
        if name not in known:
            refuse(f"f.{name}: there is no such function, vector or option{_among(known)}", _NAME)
        if name in self._signature.vectors:
            return self._graph.leaf("vector", name, "H")
        return self._options[name]

    # -- products

    def recurrent(self, value: Node, *gates: str, bias: bool = True) -> Named:
        """The blocks of W_hh of these gates, default all, times `value`; with b_hh or without."""
        known = self._signature.gates
        value = self._graph.lift(value)
        _check_row(value, "f.recurrent")
        results = {}
        for gate in gates or known:
            if gate not in known:
                refuse(f"f.recurrent: there is no gate {gate!r}{_among(known)}", _VALUE)
            if gate in self._blocks:
                refuse(f"reads the block {gate!r} of {RECURRENT} twice", _VALUE)
            self._blocks[gate] = value.width, bool(bias)
            detail = RECURRENT, gate, bool(bias)
            results[gate] = self._graph.make("product", value, detail=detail, width="H")
        widths = {width for width, _ in self._blocks.values()}
        if len(widths) > 1:
            refuse(f"multiplies blocks of {RECURRENT} with values of different widths", _VALUE)
        return Named("gh", results)

    def linear(self, name: str, value: Node, size: int | str, bias: bool = False) -> Node:
        """A learned matrix (size, width of value), by name, times `value`."""
        value = self._graph.lift(value)
        _check_row(value, "f.linear")
        if isinstance(size, bool) or not isinstance(size, (int, str)) or not _is_size(size):
            refuse(f"f.linear: expected a size 'H', a number or a name, got {size!r}", _VALUE)
        for each in (name, f"{name}_bias") if bias else (name,):
            if each in self._matrices:
                refuse(f"reads the matrix {name!r} twice", _VALUE)
            if not _is_name(each) or each in (*RESERVED, *self._signature.vectors):
                refuse(f"f.linear: {each!r} cannot be the name of a matrix", _VALUE)
        self._matrices[name] = Matrix(size, value.width)
        product = self._graph.make("product", value, detail=(name, "", False), width=size)
        if bias:
            self._matrices[f"{name}_bias"] = Matrix(size, None)
            product = product + self._graph.leaf("vector", f"{name}_bias", size)
        return product

    # -- functions of rows, and masks

    def norm(
        self,
        values: Sequence[Node],
        gains: Sequence[Any],
        biases: Sequence[Any] | None = None,
        eps: float = 1e-5,
    ) -> list[Node]:
        """Each row of all values together with mean 0 and variance 1, times gains, plus biases."""
        for name, others in (("gains", gains), ("biases", biases)):
            if others is not None and len(others) != len(values):
                refuse(f"f.norm: {len(values)} values and {len(others)} {name}", _VALUE)
        rows = tuple([self._graph.lift(value) for value in values])
        for value in rows:
            _check_row(value, "f.norm")
        results = []
        for k, value in enumerate(rows):
            detail = k, float(eps)
            result = self._graph.make("norm", *rows, detail=detail, width=value.width) * gains[k]
            results.append(result if biases is None else result + biases[k])
        return results

    def keep(self, rate: float, per: str = "step") -> Node:
        """In train mode 0 with probability `rate`, else 1; in eval mode 1 - rate."""
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            refuse(f"f.keep: expected a rate from 0 to below 1, got {rate!r}", _VALUE)
        if per not in ("step", "sequence"):
            refuse(f"f.keep: per is 'step' or 'sequence', not {per!r}", _VALUE)
        self._masks += 1
        return self._graph.leaf("keep", (self._masks - 1, float(rate), per), "H")

    # -- element-wise functions

    def _apply(self, op: str, *values: Any, detail: Any = None) -> Node:
        return self._graph.make(op, *[self._graph.lift(v) for v in values], detail=detail)

    def sigmoid(self, value: Any) -> Node:
        """1 / (1 + exp(-value))."""
        return self._apply("sigmoid", value)

    def tanh(self, value: Any) -> Node:
        """The hyperbolic tangent."""
        return self._apply("tanh", value)

    def relu(self, value: Any) -> Node:
        """The value above 0, else 0; derivative 0 at 0."""
        return self._apply("relu", value)

    def leaky_relu(self, value: Any, slope: float = 0.01) -> Node:
        """The value above 0, else slope * value; derivative `slope` at 0."""
        return self._apply("leaky_relu", value, detail=_not_negative("leaky_relu", slope))

    def elu(self, value: Any, alpha: float = 1.0) -> Node:
        """The value above 0, else alpha (exp(value) - 1); derivative `alpha` at 0."""
        return self._apply("elu", value, detail=_not_negative("elu", alpha))

    def hard_sigmoid(self, value: Any, alpha: float = 0.2, beta: float = 0.5) -> Node:
        """Alpha * value + beta within 0 and 1; derivative 0 where it is 0 or 1."""
        return self._apply("hard_sigmoid", value, detail=(float(alpha), float(beta)))

    def softsign(self, value: Any) -> Node:
        """Value / (1 + |value|)."""
        return self._apply("softsign", value)

    def softplus(self, value: Any) -> Node:
        """log(1 + exp(value))."""
        return self._apply("softplus", value)

    def exp(self, value: Any) -> Node:
        """The exponential function."""
        return self._apply("exp", value)

    def log(self, value: Any) -> Node:
        """The natural logarithm."""
        return self._apply("log", value)

    def sqrt(self, value: Any) -> Node:
        """The square root."""
        return self._apply("sqrt", value)

    def abs(self, value: Any) -> Node:
        """The absolute value; derivative 0 at 0."""
        return self._apply("abs", value)

    def minimum(self, a: Any, b: Any) -> Node:
        """The smaller one; at a tie each has half of the gradient."""
        return self._apply("minimum", a, b)

    def maximum(self, a: Any, b: Any) -> Node:
        """The larger one; at a tie each has half of the gradient."""
        return self._apply("maximum", a, b)

    def clip(self, value: Any, low: float, high: float) -> Node:
        """The value within low and high; derivative 1 at the bounds."""
        for bound in (low, high):
            if isinstance(bound, Node):
                refuse("f.clip: its bounds are numbers; use f.minimum and f.maximum", _VALUE)
        return self._apply("clip", value, low, high)

    def where(self, condition: Node, a: Any, b: Any) -> Node:
        """`a` where a comparison of values holds, else `b`."""
        return self._apply("where", condition, a, b)


_NAME, _VALUE = AttributeError, ValueError


class Named:
    """Values by name: `x.z`, `s.h`, `gh.z`; also iterable, in order."""

    def __init__(self, what: str, values: Mapping[str, Node]) -> None:
        self._what = what
        self._values = values

    def __getattr__(self, name: str) -> Node:
        """The value of this name."""
        if name not in self._values:
            refuse(f"{self._what}.{name}: there is none{_among(self._values)}", _NAME)
        return self._values[name]

    def __iter__(self) -> Iterator[Node]:
        """The values in order."""
        return iter(self._values.values())


def trace(step: StepFunction, signature: Signature, options: Mapping[str, Any]) -> TracedCell:
    """Call a definition with nodes; it is refused where it is not one."""
    f = Functions(signature, options)
    graph = f._graph
    x = {name: graph.leaf("gate", name, "H") for name in signature.gates}
    x |= {name: graph.leaf("input", name, 1) for name in signature.inputs}
    states = {
        name: graph.leaf("state", name, signature.sizes.get(name, "H")) for name in signature.states
    }
    results = step(f, Named("x", x), Named("s", states))
    results = results if isinstance(results, tuple) else (results,)
    where = Location(step)
    if len(results) != len(states):
        where.refuse(f"returns {len(results)} states, expected {', '.join(states)}")
    for (name, state), result in zip(states.items(), results, strict=True):
        if not isinstance(result, Node):
            where.refuse(f"returns a {type(result).__name__} as {name}, expected a value")
        if result.is_condition:
            where.refuse(f"returns a comparison as {name}, expected a value")
        if result.width != state.width or not result.has_rows:
            width = f"width {result.width}" if result.has_rows else "a value without rows"
            where.refuse(f"returns {width} as {name}, expected width {state.width}")
    _check_read(f, x, results, where)
    blocks = tuple([gate for gate in signature.gates if gate in f._blocks])
    matrices = {}
    if blocks:
        biased = tuple([gate for gate in blocks if f._blocks[gate][1]])
        matrices[RECURRENT] = Matrix("H", f._blocks[blocks[0]][0], blocks, biased)
    return TracedCell(signature, graph, results, matrices | f._matrices)


def _check_read(
    f: Functions, x: Mapping[str, Node], results: tuple[Node, ...], where: Location
) -> None:
    """Refuse what no next state depends on."""
    read = reachable(results)
    leaves = {node.detail for node in read if node.op in ("gate", "input", "vector")}
    products = {node.detail[:2] for node in read if node.op == "product"}
    unread = [("gate" if x[name].op == "gate" else "input", name) for name in x]
    unread += [("vector", name) for name in f._signature.vectors]
    missing = [(kind, name) for kind, name in unread if name not in leaves]
    missing += [(f"block of {RECURRENT}", g) for g in f._blocks if (RECURRENT, g) not in products]
    missing += [
        ("matrix", name)
        for name, matrix in f._matrices.items()
        if matrix.columns is not None and (name, "") not in products
    ]
    if missing:
        where.refuse("; ".join(f"the {kind} {name!r} is never read" for kind, name in missing))


class Location:
    """Where a definition begins, for what has no line of its own."""

    def __init__(self, step: StepFunction) -> None:
        self.step: StepFunction = step
        code = inspect.unwrap(step).__code__
        self._text = f"{code.co_filename}:{code.co_firstlineno}: {step.__name__}"

    def refuse(self, what: str) -> NoReturn:
        """Raise a ValueError that names the definition."""
        raise ValueError(f"{self._text} {what}")


def _check_row(value: Node, function: str) -> None:
    if not value.has_rows or value.is_condition:
        refuse(f"{function}: expected a value that rows have, got {value.op}", _VALUE)


def _not_negative(name: str, number: float) -> float:
    if not number >= 0:
        refuse(f"f.{name}: expected a number from 0, got {number!r}", _VALUE)
    return float(number)


def _among(names: Any) -> str:
    names = [*names]
    return f"; there are {', '.join(names)}" if names else ""


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not name.startswith("_")


def _is_size(size: int | str) -> bool:
    return _is_name(size) if isinstance(size, str) else size >= 1
