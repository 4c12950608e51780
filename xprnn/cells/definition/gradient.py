"""The gradient of a step: its graph in primitive operations, and in reverse mode the adjoints.

Dimensions are numbers here. Products with the same value are one product, whose result has parts;
b_hh is a vector that is added, unless it is folded into b_ih.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .graph import Graph, Node, Width, reachable
from .operations import OPERATIONS
from .tracing import RECURRENT, TracedCell


class Product(NamedTuple):
    """A product of a step: its matrix, the value that it multiplies, and its parts."""

    node: Node
    matrix: str  # its name
    blocks: tuple[str, ...]  # the gates of W_hh, each a part; else ("",)
    parts: tuple[Node, ...]

    @property
    def operand(self) -> Node:
        """The value that the matrix multiplies."""
        return self.node.args[0]


class StepGraph(NamedTuple):
    """A step in primitive operations; nodes that are equal are the same node."""

    graph: Graph
    gates: Mapping[str, Node]
    states: tuple[Node, ...]
    next_states: tuple[Node, ...]
    products: tuple[Product, ...]


class Adjoints(NamedTuple):
    """The gradients of a step, as nodes of its graph; constant 0 where there is none."""

    upstream: tuple[Node, ...]  # in: of the next states
    gates: Mapping[str, Node]
    states: tuple[Node, ...]
    parts: tuple[tuple[Node, ...], ...]  # of each product
    vectors: Mapping[str, Node]  # (N, width): the sum over rows is the gradient


def expand(trace: TracedCell, widths: Mapping[str, int], biased: Collection[str]) -> StepGraph:
    """The primitive operations of a definition.

    :param widths: of "H" and the named sizes.
    :param biased: the gates to whose products b_hh is added.
    """
    graph = Graph(reduced=True)
    read = reachable(trace.next_states)
    at: dict[int, Node] = {}  # by index in the trace
    products: dict[int, list[Node]] = {}  # those of W_hh by the value that they multiply
    for node in read:
        if node.op == "product" and node.detail[0] == RECURRENT:
            products.setdefault(node.args[0].index, []).append(node)
    made: dict[tuple[str, tuple[str, ...]], Product] = {}
    order = trace.matrices[RECURRENT].blocks if products else ()

    def width_of(width: Width) -> Width:
        return widths[width] if isinstance(width, str) else width

    def product(node: Node) -> Node:
        name, gate, _ = node.detail
        blocks: tuple[str, ...] = (gate,)
        if name == RECURRENT:
            together = {each.detail[1] for each in products[node.args[0].index]}
            blocks = tuple([block for block in order if block in together])
        if (name, blocks) not in made:
            operand, width = at[node.args[0].index], width_of(node.width)
            made[name, blocks] = _product(graph, operand, name, blocks, width)
        part = made[name, blocks].parts[blocks.index(gate)]
        if name == RECURRENT and gate in biased:
            return part + graph.leaf("vector", f"b_hh.{gate}", part.width)
        return part

    for node in read:
        args = [at[arg.index] for arg in node.args]
        if node.op == "product":
            at[node.index] = product(node)
        elif node.op == "norm":
            at[node.index] = _normalised(graph, args, *node.detail)
        elif not args:
            at[node.index] = graph.leaf(node.op, node.detail, width_of(node.width))
        else:
            at[node.index] = graph.make(node.op, *args, detail=node.detail)
    signature = trace.signature
    states = [
        graph.leaf("state", name, width_of(signature.sizes.get(name, "H")))
        for name in signature.states
    ]
    return StepGraph(
        graph,
        {name: graph.leaf("gate", name, widths["H"]) for name in signature.gates},
        tuple(states),
        tuple([at[node.index] for node in trace.next_states]),
        tuple(made.values()),
    )


def _product(
    graph: Graph, operand: Node, name: str, blocks: tuple[str, ...], width: Width
) -> Product:
    """The product with a matrix of blocks of this width."""
    assert isinstance(width, int)
    total = width * len(blocks)
    matrix = graph.leaf("matrix", (name, blocks), total)
    result = graph.make("product", operand, matrix, width=total)
    parts = [
        graph.make("part", result, detail=(k * width, (k + 1) * width), width=width)
        for k in range(len(blocks))
    ]
    return Product(result, name, blocks, tuple(parts))


def _normalised(graph: Graph, values: list[Node], k: int, eps: float) -> Node:
    """Value k of a layer norm over all values."""
    mean = graph.make("row_mean", *values, width=1)
    rstd = graph.make("row_rstd", mean, *values, detail=eps, width=1)
    return (values[k] - mean) * rstd


def differentiate(step: StepGraph) -> Adjoints:
    """The adjoints of a step in reverse mode; their nodes are added to its graph."""
    graph, forward = step.graph, reachable(step.next_states)
    varying = _varying(forward)
    adjoints: dict[Node, Node] = {}
    wide: dict[Node, dict[Width, Node]] = {}  # shares of values of width 1, by their widths
    zero = graph.constant(0.0)

    def add(node: Node, share: Node | None) -> None:
        if share is None or node not in varying or _is_zero(share):
            return
        if node.width == 1 != share.width:
            terms = wide.setdefault(node, {})  # summed over the row in one sum
            width = share.width
            terms[width] = terms[width] + share if width in terms else share
            return
        if share.width != node.width:
            share = graph.make("columns", share, detail=node.width, width=node.width)
        adjoints[node] = adjoints[node] + share if node in adjoints else share

    upstream = tuple(
        [graph.leaf("upstream", k, node.width) for k, node in enumerate(step.next_states)]
    )
    for node, gradient in zip(step.next_states, upstream, strict=True):
        add(node, gradient)
    products = {product.node: product for product in step.products}
    for node in reversed(forward):
        for terms in wide.pop(node, {}).values():
            add(node, graph.make("row_sum", terms, width=1))
        if node in products:
            parts = [adjoints.get(part, zero) for part in products[node].parts]
            if not all(map(_is_zero, parts)):
                operand, matrix = node.args
                back = graph.make("transposed", matrix, *parts, width=operand.width)
                add(operand, back)
        elif node in adjoints and node.op in OPERATIONS and node.op != "part":
            rule = OPERATIONS[node.op].gradient
            assert rule is not None, f"{node.op} occurs in gradients only"
            shares = rule(adjoints[node], node, *node.args)
            for arg, share in zip(node.args, shares, strict=True):
                add(arg, share)
    vectors = {node.detail: adjoints.get(node, zero) for node in forward if node.op == "vector"}
    return Adjoints(
        upstream,
        {name: adjoints.get(node, zero) for name, node in step.gates.items()},
        tuple([adjoints.get(node, zero) for node in step.states]),
        tuple(
            [
                tuple([adjoints.get(part, zero) for part in product.parts])
                for product in step.products
            ]
        ),
        vectors,
    )


def bias_folded_gates(trace: TracedCell, widths: Mapping[str, int]) -> tuple[str, ...]:
    """The gates whose b_hh only occurs in a sum with b_ih: dgx is dgh."""
    if RECURRENT not in trace.matrices:
        return ()
    biased = trace.matrices[RECURRENT].biased
    adjoints = differentiate(expand(trace, widths, biased))
    return tuple(
        [gate for gate in biased if adjoints.vectors[f"b_hh.{gate}"] is adjoints.gates[gate]]
    )


def _is_zero(node: Node) -> bool:
    return node.is_constant and float(node.detail) == 0.0


def _varying(forward: list[Node]) -> set[Node]:
    """The nodes that depend on what has a gradient: gates, states, vectors and matrices."""
    varying: set[Node] = set()
    for node in forward:
        if node.op in ("gate", "state", "vector", "matrix") or any(a in varying for a in node.args):
            varying.add(node)
    return varying
