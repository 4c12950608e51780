"""A `Cell` whose step is derived from a definition, and evaluated in plain `xp`."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ...backend import Array
from ...core.cell import Buffers, Cell, GradientTerm, Mask, Weights
from .derived_step import DerivedStep, Gradients, Kept, Leaves
from .graph import CONDITIONS, Node, reachable
from .tracing import RECURRENT

_ABRUPT = ("relu", "leaky_relu", "abs", "elu", "hard_sigmoid", "clip", "minimum", "maximum")
Columns = tuple[str, int, int]  # the buffer, "gates", "saved" or "sums", and where in it


Operand = tuple[str, int, int]  # such columns; or "before" or "after" a step, and state k, 0


class DefinedCell(Cell):
    """One step of a definition, for given sizes and values of options.

    The buffers are those of `Cell`. `saved` begins with the operands of products that are no
    states, which the gradients of the matrices need; backward leaves them there. The values that
    the step saves are in the rest of `gates` and `saved`. They are overwritten by dgx, which is
    in `gates`, and by the gradients of products and vectors that are not dgx.

    :param name: that of the definition and its digest: no cell with kernels has it.
    :param derived: the step.
    :param adds_up: whether a backward step adds the gradients of vectors to `sums`, (N, sums_size),
        instead of storing them in `saved`; only generated loops do.
    """

    forward_scratch: tuple[int, ...] = ()
    backward_scratch: tuple[int, ...] = ()
    backward_reads: tuple[str, ...] = ("gates", "saved")
    backward_writes: tuple[str, ...] = ("gates", "saved")
    pointwise_ops: tuple[str, ...] = ()
    is_captured: bool = False

    def __init__(self, name: str, derived: DerivedStep, adds_up: bool = False) -> None:
        signature, matrices = derived.trace.signature, derived.trace.matrices
        self.name: str = name
        self.derived: DerivedStep = derived
        sizes = tuple(derived.widths.items())
        self._key: tuple[Any, ...] = name, derived.trace.digest, sizes, derived.bias, adds_up
        self._adds_up = adds_up
        self._hash: int = hash(self._key)
        self.gate_names: tuple[str, ...] = signature.gates
        self.state_names: tuple[str, ...] = tuple(signature.states)
        self.initial_values: tuple[float, ...] = tuple(map(float, signature.states.values()))
        self.has_kinks: bool = any(
            node.op in (*CONDITIONS, *_ABRUPT) for node in derived.forward_nodes
        )
        self.extra_inputs: tuple[str, ...] = signature.inputs
        self.masks: tuple[Mask, ...] = tuple(
            [Mask(node.detail[1], node.detail[2] == "sequence") for node in derived.masks]
        )
        self._own = {name: self._matrix_shape(name) for name in matrices if name != RECURRENT}
        self._own |= dict.fromkeys(signature.vectors, (derived.widths["H"],))
        make: Any = namedtuple  # whose names are not known to a type checker
        self.weights_type: type[Any] = make("Weights", (*Weights._fields, *self._own))
        self._lay_out()
        self.notes: tuple[str, ...] = self._notes()

    def _matrix_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix, or of the bias of one."""
        widths, matrix = self.derived.widths, self.derived.trace.matrices[name]
        sizes = [
            widths[size] if isinstance(size, str) else size
            for size in (matrix.rows, matrix.columns)
            if size is not None
        ]
        return (sizes[0] * max(len(matrix.blocks), 1), *sizes[1:])

    def _notes(self) -> tuple[str, str]:
        """What is saved, and what a step consists of."""
        derived = self.derived
        saved = ", ".join(node.op for node in derived.saved) or "nothing"
        forward, backward = (
            f"{sum(len(b) + len(e) for b, e in each)} operations, phases: {len(each)}"
            for each in (derived.forward_phases, derived.backward_phases)
        )
        return f"saved of each step: {saved}", f"a step: {forward}; backward {backward}"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same definition, for the same sizes and options."""
        return isinstance(other, DefinedCell) and self._key == other._key

    def __hash__(self) -> int:
        """Of what it is compared by."""
        return self._hash

    # -- sizes and parameters

    @property
    def recurrent_blocks(self) -> tuple[str, ...]:
        """The gates with a block in W_hh, in order."""
        matrices = self.derived.trace.matrices
        return matrices[RECURRENT].blocks if RECURRENT in matrices else ()

    def state_sizes(self, H: int) -> tuple[int, ...]:
        """The widths of the states."""
        return tuple([_width(node) for node in self.derived.step.states])

    def saved_size(self, H: int) -> int:
        """The width of `saved`."""
        return self._saved_size

    def weight_shapes(self, I: int, H: int, bias: bool) -> Mapping[str, tuple[int, ...]]:  # noqa: E741
        """torch's parameters as far as there are any, then vectors and matrices by name."""
        matrices, rows = self.derived.trace.matrices, self.gates * H
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, I)}
        if RECURRENT in matrices:
            shapes[RECURRENT] = self._matrix_shape(RECURRENT)
        if bias:
            shapes["bias_ih"] = (rows,)
        if bias and self.biased_gates:
            shapes["bias_hh"] = (len(self.biased_gates) * H,)
        return shapes | self._own

    @property
    def biased_gates(self) -> tuple[str, ...]:
        """The gates with a b_hh."""
        matrices = self.derived.trace.matrices
        return matrices[RECURRENT].biased if RECURRENT in matrices else ()

    def input_bias(self, weights: Weights, dtype: Any) -> Array | None:
        """b_ih, plus b_hh for the gates in which the two only occur as a sum."""
        if weights.bias_ih is None:
            return None
        bias, H = weights.bias_ih.copy(), self.derived.widths["H"]
        for gate in self.derived.bias_folded:
            k, j = self.gate_names.index(gate), self.biased_gates.index(gate)
            bias[k * H : (k + 1) * H] += weights.bias_hh[j * H : (j + 1) * H]
        return bias.astype(dtype, copy=False)

    # -- the places of values in the buffers

    def _lay_out(self) -> None:
        """Choose the columns of what forward saves and of what backward leaves."""
        derived, H = self.derived, self.derived.widths["H"]
        step, adjoints = derived.step, derived.adjoints
        free = {*step.states, *step.next_states}
        end = 0
        self.operand_columns: dict[Node, Columns] = {}
        for product in step.products:
            if product.operand not in free and product.operand not in self.operand_columns:
                start, end = end, end + _width(product.operand)
                self.operand_columns[product.operand] = "saved", start, end
        blocks: dict[Node, Columns] = {
            node: ("gates", k * H, (k + 1) * H) for k, node in enumerate(step.gates.values())
        }
        self.saved_columns: dict[Node, Columns] = self._in_blocks(blocks)
        written = end
        for node in self._saved_in_order():
            start, written = written, written + _width(node)
            self.saved_columns[node] = "saved", start, written
        # a gradient that several have is stored once, in `gates` where it is dgx
        self.sums_size: int = 0
        self.result_columns: dict[Node, Columns] = {}
        for k, node in enumerate(adjoints.gates.values()):
            if not node.is_constant:
                self.result_columns.setdefault(node, ("gates", k * H, (k + 1) * H))
        self._saved_size = written
        for node in [part for parts in adjoints.parts for part in parts]:
            if not node.is_constant and node not in self.result_columns:
                start, end = end, end + _width(node)
                self.result_columns[node] = "saved", start, end
        for node in self._vectors():
            if node.is_constant or node in self.result_columns:
                continue
            if self._adds_up:
                start, self.sums_size = self.sums_size, self.sums_size + _width(node)
                self.result_columns[node] = "sums", start, self.sums_size
            else:
                start, end = end, end + _width(node)
                self.result_columns[node] = "saved", start, end
        self._saved_size = max(written, end)

    def adding_up(self) -> DefinedCell:
        """The same cell, whose backward steps add up the gradients of vectors in `sums`."""
        return DefinedCell(self.name, self.derived, adds_up=True)

    def _in_blocks(self, blocks: Mapping[Node, Columns]) -> dict[Node, Columns]:
        """The saved values that are in blocks of `gates`: each in that of a gate it depends on.

        These are the places where the built-in cells save the values of their gates.
        """
        saved = self.derived.saved
        spans = {node: blocks[node] for node in saved if node in blocks}
        unused = {gate: columns for gate, columns in blocks.items() if gate not in spans}
        wide = [n for n in saved if n not in spans and n.width == self.derived.widths["H"]]
        own = {node: {*reachable([node])} for node in wide}
        for only_own in (True, False):
            for node in wide:
                gates = [gate for gate in unused if gate in own[node] or not only_own]
                if gates and node not in spans:
                    spans[node] = unused.pop(gates[-1] if only_own else gates[0])
        return spans

    def _saved_in_order(self) -> list[Node]:
        """The other saved values, in the order of the parts of products that they are nearest to.

        In this order their gradients are written over them, mostly without a copy elsewhere.
        """
        rest = [node for node in self.derived.saved if node not in self.saved_columns]
        ordered = []
        for part in [part for product in self.derived.step.products for part in product.parts]:
            near = [
                node
                for node in rest
                if node.width == part.width and any(arg is part for arg in (node, *node.args))
            ]
            if near:
                ordered.append(near[0])
                rest = [node for node in rest if node is not near[0]]
        return ordered + rest

    def _vectors(self) -> list[Node]:
        return [*self.derived.adjoints.vectors.values()]

    # -- the step

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute one step; see `Cell` for the buffers."""
        H, dtype = self.derived.widths["H"], _accumulated(step.gates)
        gates = {
            name: _as(step.gates[:, k * H : (k + 1) * H], dtype)
            for k, name in enumerate(self.gate_names)
        }
        leaves = self._leaves(step, weights, dtype)._replace(gates=gates)
        kept = self.derived.forward(xp, leaves, _matmul(xp, dtype))
        for state, value in zip(step.next_states, kept.next_states, strict=True):
            state[...] = value
        for product, value in zip(self.derived.step.products, kept.operands, strict=True):
            if product.operand in self.operand_columns:
                _at(step, self.operand_columns[product.operand])[...] = value
        for node, value in zip(self.derived.saved, kept.saved, strict=True):
            if node.op != "gate":  # which is there
                _at(step, self.saved_columns[node])[...] = value

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute the gradient of one step; see `Cell` for the buffers."""
        derived, dtype = self.derived, _accumulated(step.gates)
        following = tuple([_as(state, dtype) for state in step.next_states])
        leaves = self._leaves(step, weights, dtype)
        states = dict(zip(derived.step.states, leaves.states, strict=True))
        states |= dict(zip(derived.step.next_states, following, strict=True))
        operands = []
        for product in derived.step.products:
            columns = self.operand_columns.get(product.operand)
            stored = states[product.operand] if columns is None else _as(_at(step, columns), dtype)
            operands.append(stored)
        saved = []
        for node in derived.saved:
            value = _as(_at(step, self.saved_columns[node]), dtype)
            saved.append(value != 0.0 if node.is_condition else value)
        kept = Kept(following, tuple(operands), tuple(saved))
        gradients = derived.backward(xp, leaves, kept, step.dstates, _matmul(xp, dtype))
        self._write(step, gradients)

    def _write(self, step: Buffers, gradients: Gradients) -> None:
        """Write what a backward step computed to its buffers."""
        adjoints, H = self.derived.adjoints, self.derived.widths["H"]
        for k, d in enumerate(gradients.gates.values()):
            step.gates[:, k * H : (k + 1) * H] = d
        values = [part for parts in gradients.parts for part in parts]
        nodes = [part for parts in adjoints.parts for part in parts]
        values += gradients.vectors.values()
        for node, value in zip([*nodes, *self._vectors()], values, strict=True):
            columns = self.result_columns.get(node)
            if columns is not None and columns[0] == "saved":
                _at(step, columns)[...] = value
        # a gradient may be that of another next state: none is overwritten before it is read
        dstates = [
            value.copy() if node.op in ("upstream", "columns") else value
            for node, value in zip(adjoints.states, gradients.states, strict=True)
        ]
        for dstate, value in zip(step.dstates, dstates, strict=True):
            dstate[...] = value

    def _leaves(self, step: Buffers, weights: Weights, dtype: Any) -> Leaves:
        """What a step reads, in the accumulation dtype; matrices in that of their products."""
        count = len(self.extra_inputs)
        masks: tuple[Any, ...] = step.extra[count:]
        if not masks:  # in eval mode
            masks = tuple([1.0 - mask.rate for mask in self.masks])
        return Leaves(
            tuple([_as(state, dtype) for state in step.states]),
            weights._asdict(),
            {},
            dict(zip(self.extra_inputs, step.extra, strict=False)),
            masks,
        )

    # -- gradients of the parameters

    def gradient_terms(
        self,
        states: tuple[Callable[[int], Array], Callable[[int], Array]],
        dgh: Array,
        saved: Array,
        dweights: Weights,
    ) -> list[GradientTerm]:
        """Terms for blocks of products, vectors and b_hh; see `Cell`."""
        return _make_terms(self._terms, {"gates": dgh, "saved": saved}, dweights, states)

    def terms_of_sums(self, sums: Array, dweights: Weights) -> list[GradientTerm]:
        """Those of the vectors whose gradients all backward steps have added to `sums`."""
        return _make_terms(self._terms_of_sums, {"sums": sums}, dweights)

    @cached_property
    def _terms(self) -> list[_Term]:
        """What `gradient_terms` returns, as columns and rows."""
        return [term for term in self._all_terms() if not term.is_sum]

    @cached_property
    def _terms_of_sums(self) -> list[_Term]:
        return [term for term in self._all_terms() if term.is_sum]

    def _all_terms(self) -> list[_Term]:
        derived, fields = self.derived, self.weights_type._fields
        biases = self._bias_terms()
        terms = []
        for product, parts in zip(derived.step.products, derived.adjoints.parts, strict=True):
            field, shape = fields.index(product.matrix), self._matrix_shape(product.matrix)
            rows = [(0, shape[0])]
            if product.matrix == RECURRENT:
                rows = [derived.runs((block,))[0] for block in product.blocks]
            spans = [self.result_columns.get(node) for node in parts]
            operand = self._operand(product.operand)
            for columns, span in _joined(spans, rows):
                # the sum over rows is computed with the product
                own = next((each for each in biases if each[0] == columns), None)
                biases = [each for each in biases if each is not own]
                terms.append(_Term(columns, operand, (field, *span), own and own[1]))
        for name, node in derived.adjoints.vectors.items():
            if not name.startswith("b_hh."):
                target = fields.index(name), 0, _width(node)
                terms.append(_Term(self.result_columns.get(node), None, None, target))
        return terms + [_Term(columns, None, None, target) for columns, target in biases]

    def _bias_terms(self) -> list[tuple[Columns | None, tuple[int, int, int]]]:
        """The gradient of b_hh of each gate that has one."""
        adjoints, derived = self.derived.adjoints, self.derived
        nodes = [
            adjoints.gates[gate]
            if gate in derived.bias_folded
            else adjoints.vectors[f"b_hh.{gate}"]
            for gate in self.biased_gates
            if derived.bias
        ]
        spans, H = [self.result_columns.get(node) for node in nodes], derived.widths["H"]
        rows = [(k * H, (k + 1) * H) for k in range(len(spans))]
        field = self.weights_type._fields.index("bias_hh")
        return [(columns, (field, *span)) for columns, span in _joined(spans, rows)]

    def _operand(self, node: Node) -> Operand:
        """What a product multiplied."""
        if node in self.operand_columns:
            return self.operand_columns[node]
        step = self.derived.step
        for name, nodes in (("before", step.states), ("after", step.next_states)):
            for k, state in enumerate(nodes):
                if state is node:
                    return name, k, 0
        raise AssertionError(f"{node} is neither saved nor a state")


class _Term(NamedTuple):
    """A `GradientTerm`: where its arrays are."""

    columns: Columns | None  # of d
    operand: Operand | None  # of the product
    matrix: tuple[int, int, int] | None  # the field of `Weights`, and the first and last + 1 row
    bias: tuple[int, int, int] | None

    @property
    def is_sum(self) -> bool:
        """Whether steps have added it up."""
        return self.columns is not None and self.columns[0] == "sums"


def _make_terms(
    terms: Sequence[_Term],
    buffers: Mapping[str, Array],
    dweights: Weights,
    states: tuple[Callable[[int], Array], ...] = (),
) -> list[GradientTerm]:
    """Terms with their arrays, views, but those of which no gradient is computed."""
    operands: dict[Operand, Array] = {}
    made = []
    for columns, operand, *targets in terms:
        arrays: list[Array | None] = [None, None]
        for k, target in enumerate(targets):
            array = None if target is None else dweights[target[0]]
            if target is not None and array is not None:
                _, start, stop = target
                arrays[k] = array if len(array) == stop - start else array[start:stop]
        dweight, dbias = arrays
        if dweight is None and dbias is None:
            continue
        d, inputs = None, None
        if columns is not None:
            buffer, start, stop = columns
            d = buffers[buffer]
            d = d if d.shape[1] == stop - start else d[:, start:stop]
        if operand is not None and dweight is not None:
            inputs = operands.get(operand)
            if inputs is None:
                where, first, last = operand
                inputs = buffers[where][:, first:last] if last else states[where == "after"](first)
                operands[operand] = inputs
        made.append(GradientTerm(d, inputs, dweight, dbias))
    return made


def _joined(
    spans: Sequence[Columns | None], rows: Sequence[tuple[int, int]]
) -> list[tuple[Columns | None, tuple[int, int]]]:
    """Columns and the rows that they belong to; those that are adjacent in both are joined."""
    joined: list[tuple[Columns | None, tuple[int, int]]] = []
    for columns, (start, stop) in zip(spans, rows, strict=True):
        if joined and columns is not None:
            before, (first, end) = joined[-1]
            if before is not None and (before[0], before[2], end) == (
                columns[0],
                columns[1],
                start,
            ):
                joined[-1] = (columns[0], before[1], columns[2]), (first, stop)
                continue
        joined.append((columns, (start, stop)))
    return joined


def _width(node: Node) -> int:
    assert isinstance(node.width, int)
    return node.width


def _at(step: Buffers, columns: Columns) -> Array:
    """Some columns of a buffer, a view."""
    buffer = step.gates if columns[0] == "gates" else step.saved
    return buffer[:, columns[1] : columns[2]]


def _accumulated(gates: Array) -> Any:
    """The accumulation dtype of arrays in a compute dtype."""
    return gates.dtype if gates.dtype.itemsize > 2 else np.dtype("float32")


def _as(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else array.astype(dtype)


def _matmul(xp: Any, dtype: Any) -> Callable[[Array, Array], Array]:
    """The product of a matrix in the accumulation dtype and a parameter in the compute dtype."""

    def matmul(a: Array, b: Array) -> Array:
        out = xp.empty((a.shape[0], b.shape[1]), dtype)
        xp.matmul(_as(a, b.dtype), b, out=out)
        return out

    return matmul
