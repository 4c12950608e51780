"""A definition for given sizes: its step forward and backward, and both in plain `xp`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from ...backend import Array
from .gradient import Adjoints, StepGraph, bias_folded_gates, differentiate, expand
from .graph import LEAVES, Node, reachable
from .operations import OPERATIONS
from .phases import Phase, phases
from .saving import choose
from .tracing import RECURRENT, TracedCell

Values = dict[Node, Any]
MatMul = Callable[[Any, Any], Any]


class Leaves(NamedTuple):
    """The arrays that a step reads; (N, width) each, but the parameters."""

    states: tuple[Array, ...]
    parameters: Mapping[str, Array]  # weight_hh, bias_hh, and vectors and matrices by name
    gates: Mapping[str, Array] = {}  # gx by gate, of a forward step
    inputs: Mapping[str, Array] = {}
    masks: tuple[Any, ...] = ()  # by place in the definition: 0 or 1, or a number


class Kept(NamedTuple):
    """What a backward step reads of the forward step, besides the leaves."""

    next_states: tuple[Array, ...]
    operands: tuple[Array, ...]  # of each product
    saved: tuple[Array, ...]


class Gradients(NamedTuple):
    """The results of a backward step; (N, width) each, or the number 0."""

    gates: Mapping[str, Any]  # dgx
    states: tuple[Any, ...]
    parts: tuple[tuple[Any, ...], ...]  # of the result of each product
    vectors: Mapping[str, Any]  # to be summed over rows; of b_hh by "b_hh.gate"


class DerivedStep:
    """The forward and the backward step of a definition.

    :param trace: the definition.
    :param widths: of "H" and of the named sizes.
    :param bias: whether there are b_ih and b_hh.
    """

    def __init__(self, trace: TracedCell, widths: Mapping[str, int], bias: bool) -> None:
        self.trace: TracedCell = trace
        self.widths: Mapping[str, int] = widths
        self.bias: bool = bias
        self.bias_folded: tuple[str, ...] = bias_folded_gates(trace, widths) if bias else ()
        biased = trace.matrices[RECURRENT].biased if bias and RECURRENT in trace.matrices else ()
        rest = [gate for gate in biased if gate not in self.bias_folded]
        self.step: StepGraph = expand(trace, widths, rest)
        self.adjoints: Adjoints = differentiate(self.step)
        step, operands = self.step, [product.operand for product in self.step.products]
        self.saved: tuple[Node, ...] = choose(step.next_states, operands, self._results())
        self.masks: tuple[Node, ...] = tuple(
            sorted(
                [node for node in reachable(step.next_states) if node.op == "keep"],
                key=lambda node: node.detail[0],
            )
        )

    def _results(self) -> list[Node]:
        adjoints = self.adjoints
        parts = [part for product in adjoints.parts for part in product]
        return [*adjoints.gates.values(), *adjoints.states, *parts, *adjoints.vectors.values()]

    @cached_property
    def forward_nodes(self) -> list[Node]:
        """The nodes that a forward step computes, in order."""
        return reachable(self.step.next_states)

    @cached_property
    def backward_nodes(self) -> list[Node]:
        """The nodes that a backward step computes, in order."""
        return reachable(self._results(), self._given())

    @cached_property
    def forward_phases(self) -> tuple[Phase, ...]:
        """The phases of a forward step."""
        return phases(self.forward_nodes)

    @cached_property
    def backward_phases(self) -> tuple[Phase, ...]:
        """The phases of a backward step."""
        return phases(self.backward_nodes)

    def _given(self) -> list[Node]:
        """What `Kept` holds."""
        step = self.step
        return [*step.next_states, *[product.operand for product in step.products], *self.saved]

    # -- plain evaluation

    def forward(self, xp: Any, leaves: Leaves, matmul: MatMul | None = None) -> Kept:
        """Compute a step, with new arrays.

        :param matmul: the product of two matrices; None: `xp.matmul`.
        """
        values: Values = {}
        self._read(values, self.forward_nodes, leaves, xp)
        evaluate(xp, self.forward_nodes, values, leaves.states[0].dtype, matmul)
        step = self.step
        return Kept(
            tuple([values[node] for node in step.next_states]),
            tuple([values[product.operand] for product in step.products]),
            tuple([values[node] for node in self.saved]),
        )

    def backward(
        self,
        xp: Any,
        leaves: Leaves,
        kept: Kept,
        upstream: tuple[Array, ...],
        matmul: MatMul | None = None,
    ) -> Gradients:
        """Compute the gradient of a step, with new arrays, from those of the next states."""
        values: Values = dict(zip(self.adjoints.upstream, upstream, strict=True))
        self._read(values, self.backward_nodes, leaves, xp)
        kept_values = [*kept.next_states, *kept.operands, *kept.saved]
        for node, value in zip(self._given(), kept_values, strict=True):
            values[node] = value
        evaluate(xp, self.backward_nodes, values, leaves.states[0].dtype, matmul)
        adjoints = self.adjoints

        def value_of(node: Node) -> Any:
            return float(node.detail) if node.is_constant else values[node]

        return Gradients(
            {name: value_of(node) for name, node in adjoints.gates.items()},
            tuple([value_of(node) for node in adjoints.states]),
            tuple([tuple([value_of(n) for n in parts]) for parts in adjoints.parts]),
            {name: value_of(node) for name, node in adjoints.vectors.items()},
        )

    def _read(self, values: Values, nodes: Iterable[Node], leaves: Leaves, xp: Any) -> None:
        """Add the values of leaves."""
        H = self.widths["H"]
        names = [*self.trace.signature.states]
        for node in nodes:
            if node in values or node.op not in LEAVES:
                continue
            if node.op == "state":
                values[node] = leaves.states[names.index(node.detail)]
            elif node.op == "vector" and node.detail.startswith("b_hh."):
                k = self.trace.matrices[RECURRENT].biased.index(node.detail.partition(".")[2])
                values[node] = leaves.parameters["bias_hh"][k * H : (k + 1) * H]
            elif node.op == "vector":
                values[node] = leaves.parameters[node.detail]
            elif node.op == "matrix":
                name, blocks = node.detail
                values[node] = self.rows_of(xp, leaves.parameters[name], name, blocks)
            elif node.op == "keep":
                values[node] = leaves.masks[self.mask_numbers.index(node.detail[0])]
            elif node.op in ("gate", "input"):
                values[node] = (leaves.gates if node.op == "gate" else leaves.inputs)[node.detail]

    @cached_property
    def mask_numbers(self) -> tuple[int, ...]:
        """The places in the definition of the masks, in order."""
        return tuple([node.detail[0] for node in self.masks])

    def rows_of(self, xp: Any, matrix: Array, name: str, blocks: tuple[str, ...]) -> Any:
        """The rows of a matrix that a product reads: a view if they are adjacent."""
        if name != RECURRENT:
            return matrix
        runs = self.runs(blocks)
        parts = [matrix[start:stop, :] for start, stop in runs]
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)

    def runs(self, blocks: tuple[str, ...]) -> list[tuple[int, int]]:
        """The rows [start, stop) of W_hh of these blocks; adjacent ones are joined."""
        H, order = self.widths["H"], self.trace.matrices[RECURRENT].blocks
        runs: list[tuple[int, int]] = []
        for block in blocks:
            start = order.index(block) * H
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, (order.index(block) + 1) * H))
        return runs


def evaluate(
    xp: Any, nodes: Iterable[Node], values: Values, dtype: Any, matmul: MatMul | None = None
) -> None:
    """Add the values of nodes, which are in order, to those of what they depend on."""
    matmul = matmul or xp.matmul
    for node in nodes:
        if node in values:
            continue
        if node.is_constant:
            values[node] = float(node.detail)
            continue
        args = [values[arg] for arg in node.args]
        if node.op == "product":
            values[node] = matmul(args[0], args[1].T)
        elif node.op == "transposed":
            matrix, *parts = args
            values[node] = matmul(_joined(xp, node, parts), matrix)
        else:
            if node.op == "where" and isinstance(args[1], float) and isinstance(args[2], float):
                args[1] = xp.asarray(args[1], dtype=dtype)  # numbers alone have no dtype
            values[node] = OPERATIONS[node.op].compute(xp, node.detail, *args)


def _joined(xp: Any, node: Node, parts: list[Any]) -> Any:
    """The parts of a product's gradient side by side; those without gradient are 0."""
    if len(parts) == 1:
        return parts[0]
    like = next(part for part in parts if not isinstance(part, float))
    return xp.concat(
        [xp.zeros_like(like) if isinstance(part, float) else part for part in parts], axis=1
    )
