"""A step as a list of operations on memory, from which kernels are generated.

The operations of a program work on the buffers of `Cell` and on scratch arrays, in order: products
with matrices, sums over rows, and loops over elements. A loop computes one column after another:
for each element it reads what it loads, computes, and only then writes what it stores, so that a
value may replace one that the loop reads in the same column. Nothing is written over a value that
a later operation reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from .graph import Node
from .phases import Phase, phases

if TYPE_CHECKING:
    from .defined_cell import DefinedCell


class Place(NamedTuple):
    """Columns of an array (N, columns), or elements of a vector."""

    buffer: str  # a field of `Buffers`, or "vector", "bias_hh" or "scratch"
    item: int | str  # the number in a tuple of arrays, the name of a vector; else 0
    start: int
    width: int

    def part(self, start: int, width: int) -> Place:
        """Some of the columns."""
        return self._replace(start=self.start + start, width=width)

    def overlaps(self, other: Place) -> bool:
        """Whether some columns are in both."""
        same = (self.buffer, self.item) == (other.buffer, other.item)
        return same and self.start < other.start + other.width and other.start < self.end

    @property
    def end(self) -> int:
        """The first column after it."""
        return self.start + self.width


class Scratch(NamedTuple):
    """An array (N, width) that a step needs; its contents are lost between steps."""

    width: int
    is_operand: bool = False  # of a product: it has the compute dtype, others the accumulation one


class ProductOp(NamedTuple):
    """out = operand M', or operand M if it is `transposed`; M: a matrix or blocks of it."""

    matrix: str  # the parameter's name
    blocks: tuple[str, ...]  # whose rows are M, one below the other; ("",): all rows
    transposed: bool
    operand: Place
    out: Place

    @property
    def reads(self) -> list[Place]:
        """What it reads, besides the matrix."""
        return [self.operand]

    @property
    def writes(self) -> list[Place]:
        """What it writes."""
        return [self.out]


class ReductionOp(NamedTuple):
    """out (N, 1) = a mean, 1 / sqrt(variance + eps), or sum of all values of a row together."""

    node: Node  # row_mean, row_rstd with its eps, or row_sum
    operands: tuple[Place, ...]  # of row_rstd the first one is the mean, (N, 1)
    out: Place

    @property
    def reads(self) -> list[Place]:
        """What it reads."""
        return [*self.operands]

    @property
    def writes(self) -> list[Place]:
        """What it writes."""
        return [self.out]


@dataclass(eq=False)
class Loop:
    """Element-wise operations on columns of one width; of values of width 1 all read the same."""

    width: int
    nodes: list[Node] = field(default_factory=list)  # to compute, in order
    loads: dict[Node, Place] = field(default_factory=dict)  # all that it reads
    # a value, which the loop computes or loads, or a number; a comparison is stored as 1 or 0
    stores: list[tuple[Node, Place]] = field(default_factory=list)

    @property
    def reads(self) -> list[Place]:
        """What it reads."""
        return [*self.loads.values()]

    @property
    def writes(self) -> list[Place]:
        """What it writes."""
        return [place for _, place in self.stores]


Operation = ProductOp | ReductionOp | Loop


class Program(NamedTuple):
    """The operations of a forward or backward step, in order."""

    operations: tuple[Operation, ...]
    scratch: tuple[Scratch, ...]
    numbers: Mapping[Node, float]  # the values of constants, and of masks in eval mode


def forward_program(
    cell: DefinedCell, *, record: bool, masked: bool, low_precision: bool = False
) -> Program:
    """The forward step of a cell.

    :param record: whether the buffers are written that backward reads.
    :param masked: whether `extra` has the masks; else they are the numbers 1 - rate.
    :param low_precision: whether operands of products, `gates` and `saved` have a lower precision
        than scratch arrays.
    """
    step = cell.derived.step
    results = [
        (node, _state("next_states", step.next_states, k))
        for k, node in enumerate(step.next_states)
    ]
    if record:
        results += [(node, Place(*_columns(at))) for node, at in cell.operand_columns.items()]
        results += [
            (node, Place(*_columns(at)))
            for node, at in cell.saved_columns.items()
            if node.op != "gate"  # which is there
        ]
    builder = _Builder(cell, masked, low_precision)
    return builder.build(cell.derived.forward_nodes, {}, results)


def backward_program(cell: DefinedCell, *, masked: bool, low_precision: bool = False) -> Program:
    """The backward step of a cell; the options are those of `forward_program`."""
    derived, H = cell.derived, cell.derived.widths["H"]
    step, adjoints = derived.step, derived.adjoints
    known = {node: Place(*_columns(at)) for node, at in cell.saved_columns.items()}
    known |= {node: Place(*_columns(at)) for node, at in cell.operand_columns.items()}
    for k, node in enumerate(step.next_states):
        known.setdefault(node, _state("next_states", step.next_states, k))
    for k, node in enumerate(adjoints.upstream):
        known[node] = _state("dstates", adjoints.upstream, k)
    results = [
        (node, Place("gates", 0, k * H, H)) for k, node in enumerate(adjoints.gates.values())
    ]
    results += [
        (node, Place(*_columns(at))) for node, at in cell.result_columns.items() if at[0] != "gates"
    ]
    results += [(node, _state("dstates", step.states, k)) for k, node in enumerate(adjoints.states)]
    builder = _Builder(cell, masked, low_precision)
    return builder.build(derived.backward_nodes, known, results)


def _columns(columns: tuple[str, int, int]) -> tuple[str, int, int, int]:
    buffer, start, end = columns
    return buffer, 0, start, end - start


def _state(buffer: str, states: tuple[Node, ...], k: int) -> Place:
    return Place(buffer, k, 0, width_of(states[k]))


def width_of(node: Node) -> int:
    """The width of a value with rows."""
    assert isinstance(node.width, int), node
    return node.width


CHEAP = ("add", "sub", "mul", "neg")
MOST_AGAIN = 3  # operations that are computed again rather than to keep their result
UNCHANGED = ("states", "extra", "vector", "bias_hh", "scratch")  # buffers without results


class _Builder:
    """Makes a program: finds where each value is read, and when each result can be stored."""

    def __init__(self, cell: DefinedCell, masked: bool, low_precision: bool) -> None:
        self._cell = cell
        self._masked = masked
        self._low_precision = low_precision
        self._scratch: list[Scratch] = []
        self._order: list[Node | Loop] = []  # a product or a reduction, or a loop
        self._numbers: dict[Node, float] = {}
        self._homes: dict[Node, Place] = {}  # where a value is read
        self._computed: dict[Node, Loop] = {}  # the loop that computes a value
        self._finals: dict[Place, Loop] = {}  # the loop that stores a result
        self._deciding: set[Node] = set()  # values that are compared: each has the same bits

    def build(
        self,
        nodes: Sequence[Node],
        known: Mapping[Node, Place],
        results: Iterable[tuple[Node, Place]],
    ) -> Program:
        """The program that computes `nodes`, which are in order, and stores `results`."""
        results = [*results]
        self._homes.update(known)
        self._deciding = {arg for node in nodes if node.is_condition for arg in node.args}
        read = [arg for node in nodes for arg in node.args]
        for node in (*nodes, *read, *[node for node, _ in results]):
            self._find_leaf(node)
        for phase in phases([node for node in nodes if node not in known]):
            self._add_phase(phase)
        for loop in [each for each in self._order if isinstance(each, Loop)]:
            self._compute_again(loop)
        before = dict(self._homes)  # of what is in memory until something is stored
        results = [(node, view) for node, view in results if before.get(node) != view]
        while any(self._schedule(node, view, before) for node, view in results):
            pass  # a value that is stored later is read later
        operands = {
            node: self._operand(node)
            for node in [*self._order]
            if isinstance(node, Node) and node.op in ("product", "transposed")
        }
        for operation in self._order:
            for node in () if operation in operands else self._reads(operation):
                self._keep(node)
        made = [self._finish(each, operands) for each in self._order]
        return Program(
            tuple([each for each in made if not isinstance(each, Loop) or each.stores]),
            tuple(self._scratch),
            self._numbers,
        )

    def _find_leaf(self, node: Node) -> None:
        """Find the place, or the number, of what a step does not compute."""
        if node in self._homes:
            return
        cell, H = self._cell, self._cell.derived.widths["H"]
        match node.op:
            case "constant":
                self._numbers[node] = float(node.detail)
            case "gate":
                self._homes[node] = Place("gates", 0, cell.gate_names.index(node.detail) * H, H)
            case "state":
                k = cell.state_names.index(node.detail)
                self._homes[node] = Place("states", k, 0, width_of(node))
            case "input":
                self._homes[node] = Place("extra", cell.extra_inputs.index(node.detail), 0, 1)
            case "keep" if self._masked:
                k = cell.derived.mask_numbers.index(node.detail[0])
                self._homes[node] = Place("extra", len(cell.extra_inputs) + k, 0, width_of(node))
            case "keep":
                self._numbers[node] = 1.0 - node.detail[1]
            case "vector" if node.detail.startswith("b_hh."):
                k = cell.biased_gates.index(node.detail.partition(".")[2])
                self._homes[node] = Place("bias_hh", 0, k * H, H)
            case "vector":
                self._homes[node] = Place("vector", node.detail, 0, width_of(node))

    def _add_phase(self, phase: Phase) -> None:
        """Add the operations of a phase; a loop for each width, first that of one column."""
        self._order += phase.barriers
        for node in phase.barriers:
            self._homes[node] = self._new_scratch(width_of(node))
        looped = []
        for node in phase.elementwise:
            if node.op == "part":
                start, stop = node.detail
                self._homes[node] = self._homes[node.args[0]].part(start, stop - start)
            elif node.has_rows:
                looped.append(node)
        widths = {width_of(node) for node in looped}
        for width in sorted(widths, key=lambda width: (width != 1, width)):
            loop = Loop(width, [node for node in looped if node.width == width])
            self._order.append(loop)
            self._computed |= dict.fromkeys(loop.nodes, loop)

    def _new_scratch(self, width: int, is_operand: bool = False) -> Place:
        self._scratch.append(Scratch(width, is_operand))
        return Place("scratch", len(self._scratch) - 1, 0, width)

    # -- what operations read

    def _reads(self, operation: Node | Loop) -> list[Node]:
        """The values that an operation reads, and does not compute."""
        if isinstance(operation, Node):
            return [a for a in operation.args if a.op != "matrix" and a not in self._numbers]
        own = {*operation.nodes}
        read = [arg for node in operation.nodes for arg in node.args]
        read += [node for node, _ in operation.stores]
        nodes: dict[Node, None] = {}
        while read:
            node = read.pop()
            if self._is_inlined(node):
                read += node.args
            elif node not in own and node not in self._numbers:
                nodes[node] = None
        return [*nodes]

    def _is_inlined(self, node: Node) -> bool:
        """Whether each loop computes a value itself: one that all rows share."""
        return bool(node.args) and not node.has_rows and node not in self._homes

    # -- values that are cheaper to compute again than to keep

    def _compute_again(self, loop: Loop) -> None:
        """Add the sums and products to a loop that it can compute from what it reads in any case.

        One more array may be read, if nothing is stored over it.
        """
        for node in sorted(self._reads(loop), key=attrgetter("index")):
            if node not in self._homes and node not in self._deciding:
                nodes: dict[Node, None] = {}
                loads = self._inputs_of(node, {*loop.nodes, *self._reads(loop)}, nodes)
                wide = [each for each in nodes if each.width != 1]
                if loads <= 1 and len(wide) <= MOST_AGAIN:
                    loop.nodes = sorted({*loop.nodes, *nodes}, key=attrgetter("index"))

    def _inputs_of(self, node: Node, known: set[Node], nodes: dict[Node, None]) -> int:
        """Add the operations that compute a value to `nodes`; how many more arrays they read.

        :param known: what a loop computes or reads in any case, with the value itself.
        """
        if node.op not in CHEAP:
            return MOST_AGAIN
        nodes[node] = None
        loads = 0
        for arg in node.args:
            if arg in self._numbers or arg in nodes or (arg in known and arg in self._homes):
                continue
            if arg in self._homes:
                is_kept = self._homes[arg].buffer in UNCHANGED
                loads += 0 if arg.width == 1 else 1 if is_kept else MOST_AGAIN
            elif not self._is_inlined(arg) and arg not in known - {node}:
                loads += self._inputs_of(arg, known, nodes)
        return loads

    # -- when results are stored

    def _schedule(self, node: Node, view: Place, before: Mapping[Node, Place]) -> bool:
        """Store a result in the first loop that can; whether that is another one than before.

        :param before: where values are until something is stored there.
        """
        last = self._finals.get(view)
        if last is not None:
            last.stores = [each for each in last.stores if each[1] != view]
        first = self._ready(node)
        for k, operation in enumerate(self._order):
            for read in self._reads(operation):
                if read in before and before[read].overlaps(view):
                    # a loop reads an element before it writes to the same one
                    same = isinstance(operation, Loop) and operation.width == view.width
                    first = max(first, k if same and before[read] == view else k + 1)
        loop = self._finals[view] = self._loop_between(view.width, first, len(self._order))
        loop.stores.append((node, view))
        return loop is not last

    def _ready(self, node: Node) -> int:
        """The index of the first loop that can store a value."""
        if node in self._computed:
            return self._index(self._computed[node])
        source = node.args[0] if node.op == "part" else node
        return next((k + 1 for k, each in enumerate(self._order) if each is source), 0)

    def _index(self, operation: Node | Loop) -> int:
        return next(k for k, each in enumerate(self._order) if each is operation)

    def _loop_between(self, width: int, first: int, end: int) -> Loop:
        """The first loop of this width from `first` on and before `end`, or a new one there."""
        for operation in self._order[first:end]:
            if isinstance(operation, Loop) and operation.width == width:
                return operation
        self._order.insert(end, loop := Loop(width))
        return loop

    # -- values that later operations read

    def _operand(self, product: Node) -> Place:
        """The place of what a product multiplies; of several parts side by side."""
        if product.op == "product":
            nodes = [product.args[0]]
        else:
            nodes = [node for node in product.args[1:] if node not in self._numbers]
        views = [self._final(node) or self._homes.get(node) for node in nodes]
        joined = views[0]
        for view in views[1:]:
            if joined and view and view == joined._replace(start=joined.end, width=view.width):
                joined = joined._replace(width=joined.width + view.width)
            else:
                joined = None
        if joined and not (self._low_precision and self._is_accurate(joined)):
            return joined
        operand = self._new_scratch(sum(map(width_of, nodes)), is_operand=True)
        start = 0
        for node in nodes:
            width = width_of(node)
            loop = self._computed.get(node)
            if loop is None:
                loop = self._loop_between(width, self._ready(node), self._index(product))
            loop.stores.append((node, operand.part(start, width)))
            start += width
        return operand

    def _final(self, node: Node) -> Place | None:
        """The place of a result, if the loop that computes it stores it."""
        loop = self._computed.get(node)
        views = [view for stored, view in loop.stores if stored is node] if loop else []
        finals = [view for view in views if view in self._finals]
        return next((view for view in finals if view.buffer != "sums"), None)

    def _keep(self, node: Node) -> None:
        """Give a value that a later operation reads a place."""
        if node in self._homes:
            return
        loop = self._computed[node]
        view = self._final(node)
        if view is None or (self._low_precision and not self._is_accurate(view)):
            view = self._new_scratch(width_of(node))
            loop.stores.append((node, view))
        self._homes[node] = view

    # -- the result

    def _finish(self, operation: Node | Loop, operands: Mapping[Node, Place]) -> Operation:
        """An operation with the places of all that it reads."""
        if isinstance(operation, Loop):
            operation.nodes = self._needed(operation)
            operation.loads = {node: self._homes[node] for node in self._reads(operation)}
            return operation
        out = self._homes[operation]
        if operation not in operands:
            return ReductionOp(operation, tuple([self._homes[a] for a in operation.args]), out)
        transposed = operation.op == "transposed"
        matrix, *parts = operation.args if transposed else operation.args[::-1]
        name, blocks = matrix.detail
        if transposed:
            pairs = zip(blocks, parts, strict=True)
            blocks = tuple([block for block, part in pairs if part not in self._numbers])
        return ProductOp(name, blocks, transposed, operands[operation], out)

    def _needed(self, loop: Loop) -> list[Node]:
        """The nodes of a loop that its stores need, with those that all rows share, in order."""
        own = {*loop.nodes}
        nodes: set[Node] = set()
        todo = [node for node, _ in loop.stores]
        while todo:
            node = todo.pop()
            if node not in nodes and (node in own or self._is_inlined(node)):
                nodes.add(node)
                todo += node.args
        return sorted(nodes, key=attrgetter("index"))

    def _is_accurate(self, view: Place) -> bool:
        """Whether a buffer has the accumulation dtype where others have a lower precision."""
        match view.buffer:
            case "gates" | "saved":
                return False
            case "states" | "next_states":
                return view.item != 0
            case "scratch":
                return not self._scratch[int(view.item)].is_operand
        return True
