"""What a step launches on a device: the order of operations, and products that are added."""

from __future__ import annotations

import pytest

from xprnn.cells.definition.graph import Graph, Node
from xprnn.cells.definition.step_program import Loop, Operation, Place, ProductOp
from xprnn.kernels.codegen import launches
from xprnn.kernels.codegen.accumulation import accumulated

H = 4
GATES, SAVED, DH = Place("gates", 0, 0, H), Place("saved", 0, 0, H), Place("dstates", 0, 0, H)


def scratch(k: int) -> Place:
    return Place("scratch", k, 0, H)


def product(operand: Place, out: Place) -> ProductOp:
    return ProductOp("w", ("",), True, operand, out)


@pytest.fixture
def values() -> list[Node]:
    graph = Graph()
    return [graph.leaf("state", str(k), H) for k in range(4)]


def copying(node: Node, source: Place, out: Place) -> Loop:
    return Loop(H, [], {node: source}, [(node, out)])


def adding(a: Node, b: Node, places: tuple[Place, Place], out: Place) -> Loop:
    node = a + b
    return Loop(H, [node], {a: places[0], b: places[1]}, [(node, out)])


def test_launches_are_ordered_in_few_kernels(values: list[Node]) -> None:
    first = copying(values[0], GATES, scratch(0))
    second = product(scratch(0), scratch(1))
    third = copying(values[1], scratch(1), DH)
    free = copying(values[2], GATES, SAVED)
    assert launches._in_order([first, second, third, free]) == [first, free, second, third]
    reading = adding(values[1], values[3], (scratch(1), SAVED), DH)
    order = [first, second, reading, free]  # which replaces what the one before reads
    assert launches._in_order(order) == order
    twice = copying(values[3], scratch(1), SAVED)
    order = [first, second, twice, free]  # which replaces what the one before stores
    assert launches._in_order(order) == order


def test_a_product_is_stored_in_a_gradient(values: list[Node]) -> None:
    operations: list[Operation] = [product(GATES, scratch(0)), copying(values[0], scratch(0), DH)]
    assert accumulated(operations) == ([product(GATES, DH)], set())


def test_a_product_is_added_to_a_gradient(values: list[Node]) -> None:
    a, b = values[:2]
    for pair in ((a, b), (b, a)):
        places = (scratch(0), scratch(1)) if pair[0] is a else (scratch(1), scratch(0))
        operations = [
            copying(values[2], SAVED, scratch(1)),
            product(GATES, scratch(0)),
            adding(*pair, places, DH),
        ]
        (loop, last), added = accumulated(operations)
        assert isinstance(loop, Loop)
        assert loop.writes == [DH]
        assert (last, added) == (product(GATES, DH), {DH})
    upstream = [product(GATES, scratch(0)), adding(a, b, (scratch(0), DH), DH)]
    assert accumulated(upstream) == ([product(GATES, DH)], {DH})


def test_a_loop_remains_where_a_product_or_a_gradient_is_read(values: list[Node]) -> None:
    a, b, c, _ = values
    value, own = copying(c, SAVED, scratch(1)), product(GATES, scratch(0))
    last = adding(a, b, (scratch(0), scratch(1)), DH)
    for more, position in (
        (copying(c, scratch(0), SAVED), 3),  # reads the product
        (copying(c, scratch(1), GATES), 1),  # reads the value
        (copying(c, DH, SAVED), 1),  # reads the gradient that the value would replace
        (product(DH, scratch(2)), 2),
    ):
        operations: list[Operation] = [value, own, last]
        operations.insert(position, more)
        result, added = accumulated(operations)
        assert len(result) == 4
        assert not added
    narrow = Place("scratch", 1, 0, 1)
    first = Loop(1, [], {c: SAVED.part(0, 1)}, [(c, narrow)])
    result, added = accumulated([first, own, adding(a, b, (scratch(0), narrow), DH)])
    assert len(result) == 3
    assert not added
    shifted = Loop(H, [], {c: Place("dstates", 0, 1, 1)}, [(c, scratch(1))])
    result, added = accumulated([shifted, own, last])  # reads another element of the gradient
    assert len(result) == 3
    assert not added
