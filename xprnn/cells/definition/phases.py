"""The phases of a step: what is element-wise, between products and sums over rows.

A phase begins with the products and row sums whose arguments earlier phases computed, and goes on
with all element-wise operations that then can be: one kernel, for one element after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .graph import LEAVES, Node

BARRIERS = ("product", "transposed", "row_mean", "row_rstd", "row_sum")


class Phase(NamedTuple):
    """The operations of a phase, in order."""

    barriers: tuple[Node, ...]  # products and row sums
    elementwise: tuple[Node, ...]


def phases(nodes: Iterable[Node]) -> tuple[Phase, ...]:
    """The phases that compute these nodes, which are in order; other arguments are given."""
    order = [node for node in nodes if node.op not in LEAVES]
    number: dict[Node, int] = {}  # a node's phase: the first one that can compute it
    for node in order:
        before = max((number[arg] for arg in node.args if arg in number), default=-1)
        number[node] = before + 1 if node.op in BARRIERS else max(before, 0)
    _delay(order, number)
    cut: list[tuple[list[Node], list[Node]]] = []
    for node in order:
        while len(cut) <= number[node]:
            cut.append(([], []))
        cut[number[node]][0 if node.op in BARRIERS else 1].append(node)
    return tuple([Phase(tuple(barriers), tuple(rest)) for barriers, rest in cut])


def _delay(order: list[Node], number: dict[Node, int]) -> None:
    """Move element-wise nodes towards the phase that reads them, where no more values are kept.

    None is moved beyond a product, to whose result a kernel can add what is computed before.
    """
    products = sorted({number[node] for node in order if node.op in ("product", "transposed")})
    first: dict[Node, int] = {}  # the first and the last phase at whose end a node must be there
    last: dict[Node, int] = {}
    for node in reversed(order):
        is_barrier = node.op in BARRIERS
        before = [phase - 1 for phase in products if phase > number[node]]
        target = min([first.get(node, 0), *before])
        if not is_barrier and target > number[node]:
            kept = [
                arg
                for arg in {*node.args}
                if arg in number and arg.width != 1 and last.get(arg, -1) < target
            ]
            if len(kept) <= 1:
                number[node] = target
        phase = number[node] - is_barrier
        for arg in node.args:
            first[arg] = min(first.get(arg, phase), phase)
            last[arg] = max(last.get(arg, phase), phase)
