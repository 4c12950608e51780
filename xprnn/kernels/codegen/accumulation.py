"""Products that are added to the gradient of a state, instead of a loop that does that.

If the gradient is a product, or the sum of a product and a value, and the product is read nowhere
else, it is stored in the gradient, or added to the value, which is stored there before.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...cells.definition.graph import Node
from ...cells.definition.step_program import Loop, Operation, Place, ProductOp


def accumulated(operations: Iterable[Operation]) -> tuple[list[Operation], set[Place]]:
    """The operations with fewer loops, and the places to which products are added."""
    sums = _Sums(operations)
    for loop in [op for op in sums.operations if isinstance(op, Loop)]:
        for node, out in [*loop.stores]:
            if out.buffer == "dstates":
                sums.replace(loop, node, out)
    return [op for op in sums.operations if not isinstance(op, Loop) or op.stores], sums.added_to


class _Sums:
    def __init__(self, operations: Iterable[Operation]) -> None:
        self.operations: list[Operation] = [
            Loop(op.width, [*op.nodes], {**op.loads}, [*op.stores]) if isinstance(op, Loop) else op
            for op in operations
        ]
        self.added_to: set[Place] = set()

    def replace(self, loop: Loop, node: Node, out: Place) -> None:
        """Let a product write what a loop stores in `out`, if it can."""
        terms = [*node.args] if node.op == "add" and node not in loop.loads else [node]
        once = all(_uses(loop, each) == 1 for each in (node, *terms))
        if not once or any(each not in loop.loads for each in terms):
            return
        views = [loop.loads[each] for each in terms]
        if self._write(loop, *views, out=out) or self._write(loop, *views[::-1], out=out):
            loop.stores = [store for store in loop.stores if store[1] != out]
            loop.nodes = [each for each in loop.nodes if each is not node]
            for each in terms:
                del loop.loads[each]

    def _write(self, loop: Loop, product: Place, value: Place | None = None, *, out: Place) -> bool:
        """Let a product be stored in `out`, or added to a value there; whether it can."""
        k, j = self._writer(product), None
        own = None if k is None else self.operations[k]
        if k is None or not isinstance(own, ProductOp):
            return False
        if value is not None and value != out:
            j = self._writer(value)
            if j is None or j > k or not _can_store(self.operations[j], out):
                return False
        begin, end = (k if j is None else j + 1), self._index(loop)
        reads = [view for op in self.operations[begin:end] for view in op.reads]
        reads += [view for view in loop.reads if view != value]
        if any(view.overlaps(out) for view in reads):
            return False
        if j is not None:
            earlier = self.operations[j]
            assert isinstance(earlier, Loop)
            earlier.stores = [(n, out if p == value else p) for n, p in earlier.stores]
        self.operations[k] = own._replace(out=out)
        if value is not None:
            self.added_to.add(out)
        return True

    def _writer(self, view: Place) -> int | None:
        """The operation that writes a scratch array which one other operation reads."""
        reads = [each for op in self.operations for each in op.reads if each.overlaps(view)]
        if view.buffer != "scratch" or len(reads) != 1:
            return None
        return next(k for k, op in enumerate(self.operations) if view in op.writes)

    def _index(self, loop: Loop) -> int:
        return next(k for k, op in enumerate(self.operations) if op is loop)


def _can_store(op: Operation, out: Place) -> bool:
    """Whether an operation is a loop that can store a value in `out`, of which it reads no other
    element before."""
    is_loop = isinstance(op, Loop) and op.width == out.width
    return is_loop and all(view == out or not view.overlaps(out) for view in op.reads)


def _uses(loop: Loop, node: Node) -> int:
    """How often a loop computes something from a value, or stores it."""
    read = [arg for each in loop.nodes for arg in each.args]
    return sum(each is node for each in [*read, *[stored for stored, _ in loop.stores]])
