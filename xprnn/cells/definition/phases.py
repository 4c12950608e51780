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
    number: dict[Node, int] = {}  # a node's phase
    cut: list[tuple[list[Node], list[Node]]] = []
    for node in nodes:
        if node.op in LEAVES:
            continue
        before = max((number[arg] for arg in node.args if arg in number), default=-1)
        is_barrier = node.op in BARRIERS
        number[node] = before + 1 if is_barrier else max(before, 0)
        while len(cut) <= number[node]:
            cut.append(([], []))
        cut[number[node]][0 if is_barrier else 1].append(node)
    return tuple([Phase(tuple(barriers), tuple(rest)) for barriers, rest in cut])
