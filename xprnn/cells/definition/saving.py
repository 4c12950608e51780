"""What a forward step saves for the backward step: a minimum cut of the graph.

The backward step reads some values of the forward step. Each is read from memory or computed again
from others, down to what is in memory in any case: states, next states, operands of products,
per-step inputs and vectors. Sums, products, minima and `where` are computed again. Functions,
quotients, products with matrices and pre-activations are not: they are saved, if what depends on
them is not. A comparison that decides a branch is computed again only from values that are saved
or not rounded: two kernels may round a sum differently, and would then take different branches.

The values to save separate those that must not be computed again from those that are read, at the
least total width: a minimum vertex cut, by the theorem of Ford and Fulkerson a maximum flow. Of
several the one nearest to the backward step is taken, which computes the least again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from .graph import Node, reachable
from .operations import OPERATIONS, Again

_Vertex = tuple[int, bool]  # a node's index, and whether its end
_SOURCE: _Vertex = (-1, False)
_SINK: _Vertex = (-1, True)
_UNLIMITED = 1 << 60
_FREE = ("state", "input", "keep", "vector", "matrix", "constant")


def choose(
    next_states: Iterable[Node], operands: Iterable[Node], results: Iterable[Node]
) -> tuple[Node, ...]:
    """The nodes to save, in order.

    :param next_states: the results of the forward step.
    :param operands: of products with matrices, which their gradients need in any case.
    :param results: of the backward step.
    """
    forward = reachable(next_states)
    free = {node for node in forward if node.op in _FREE or not node.has_rows}
    free |= {*next_states, *operands}
    backward = reachable(results, forward)
    within = {*forward}
    read = [arg for node in backward for arg in node.args if arg in within]
    deciding = _deciding(arg for node in backward if node.is_condition for arg in node.args)
    deciding |= _deciding(node for node in forward if node.is_condition)
    flow = _Flow()
    for node in forward:
        if node in free:
            continue
        begin, end = (node.index, False), (node.index, True)
        flow.add(begin, end, node.width if isinstance(node.width, int) else 1)
        again = OPERATIONS[node.op].again if node.op in OPERATIONS else Again.NEVER
        if again is Again.EXACT or (again is Again.ROUNDED and node not in deciding):
            for arg in node.args:
                if arg not in free:
                    flow.add((arg.index, True), begin, _UNLIMITED)
        else:
            flow.add(_SOURCE, begin, _UNLIMITED)
    for node in read:
        if node not in free:
            flow.add((node.index, True), _SINK, _UNLIMITED)
    cut = flow.cut_nearest_to_sink()
    return tuple([node for node in forward if node.index in cut])


def _deciding(conditions: Iterable[Node]) -> set[Node]:
    """The values on whose bits a branch depends, through operations that round nothing."""
    reached: set[Node] = set()
    todo = [*conditions]
    while todo:
        node = todo.pop()
        if node not in reached:
            reached.add(node)
            if node.op in OPERATIONS and OPERATIONS[node.op].again is Again.EXACT:
                todo += node.args
    return reached


class _Flow:
    """A network, and the maximum flow by shortest augmenting paths (Edmonds and Karp, 1972)."""

    def __init__(self) -> None:
        self._left: dict[_Vertex, dict[_Vertex, int]] = {}  # capacity that is left

    def add(self, a: _Vertex, b: _Vertex, capacity: int) -> None:
        """An edge; the flow may be sent back along it."""
        self._left.setdefault(a, {})[b] = capacity
        self._left.setdefault(b, {}).setdefault(a, 0)

    def cut_nearest_to_sink(self) -> set[int]:
        """The nodes that separate source and sink in a minimum cut."""
        if _SOURCE not in self._left or _SINK not in self._left:
            return set()
        while path := self._path():
            share = min(self._left[a][b] for a, b in path)
            for a, b in path:
                self._left[a][b] -= share
                self._left[b][a] += share
        behind = self._reaching_sink()
        return {i for i, end in behind if end and i >= 0 and (i, False) not in behind}

    def _path(self) -> list[tuple[_Vertex, _Vertex]]:
        """The edges of a shortest path with capacity left; empty if there is none."""
        came: dict[_Vertex, _Vertex] = {_SOURCE: _SOURCE}
        todo = deque([_SOURCE])
        while todo and _SINK not in came:
            a = todo.popleft()
            for b, left in self._left[a].items():
                if left and b not in came:
                    came[b] = a
                    todo.append(b)
        path: list[tuple[_Vertex, _Vertex]] = []
        vertex = _SINK
        while vertex in came and vertex != _SOURCE:
            path.append((came[vertex], vertex))
            vertex = came[vertex]
        return path

    def _reaching_sink(self) -> set[_Vertex]:
        """The vertices from which the sink can be reached with capacity left."""
        reached = {_SINK}
        todo = [_SINK]
        while todo:
            b = todo.pop()
            for a in self._left[b]:
                if a not in reached and self._left[a][b]:
                    reached.add(a)
                    todo.append(a)
        return reached
