"""The operations that definitions are made of: how each is computed, and its gradient.

A gradient rule gets the gradient d of the result y, then y and the arguments, all of them nodes,
and returns the share of each argument, None where it has none. At a kink the derivative is: of
`relu`, `abs` and `hard_sigmoid` 0, of `clip` 1, of `minimum` and `maximum` 1/2 each at a tie, of
`leaky_relu` and `elu` the slope at the left. A share is selected by `where`, never multiplied by
0 or 1: what is not selected may be infinite.

Rules read y rather than the arguments where they can, so that fewer values are saved.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

from .graph import Node

_LARGEST_EXPONENT = {32: 88.0, 64: 709.0}  # by the bits of a number, as in cells/numerics.py
Shares = tuple[Node | None, ...]


class Again(Enum):
    """Whether the backward pass may compute a value again."""

    EXACT = "yes, and code cannot differ in the result, which is not rounded"
    ROUNDED = "yes"
    NEVER = "no: it is saved, or was not needed"


class Operation(NamedTuple):
    """How an operation is computed in plain `xp`, and its gradient."""

    compute: Callable[..., Any]  # from an array module, the node's detail and its arguments
    gradient: Callable[..., Shares] | None = None  # from d, y and the arguments, nodes
    again: Again = Again.ROUNDED


def _sigmoid(xp: Any, _: Any, a: Any) -> Any:
    """σ(a) = 1 / (1 + exp(-a)): as accurate near 0 as near 1, without overflow."""
    limit = _LARGEST_EXPONENT[xp.finfo(a.dtype).bits]
    return 1.0 / (xp.exp(xp.minimum(-a, limit)) + 1.0)


def _where_positive(y: Node, positive: Node, other: Node | float) -> Node:
    return y.graph.where(y > 0.0, positive, other)


def _abs(d: Node, y: Node, a: Node) -> Shares:
    return (_where_positive(a, d, a.graph.where(a < 0.0, -d, 0.0)),)


def _clip(d: Node, y: Node, a: Node, low: Node, high: Node) -> Shares:
    inside = a.graph.where(a <= high, d, 0.0)
    return a.graph.where(a >= low, inside, 0.0), None, None


def _hard_sigmoid(d: Node, y: Node, a: Node) -> Shares:
    return (_where_positive(y, y.graph.where(y < 1.0, d * y.detail[0], 0.0), 0.0),)


def _selected(d: Node, chosen: Node, a: Node, b: Node) -> Shares:
    """The shares of a minimum or a maximum; `chosen`: whether it is a."""
    where, half = d.graph.where, d * 0.5
    tie = where(a == b, half, 0.0)
    return where(chosen, d, tie), where(a == b, half, where(chosen, 0.0, d))


def _rstd(d: Node, y: Node, mean: Node, *values: Node) -> Shares:
    """The share of the mean is exactly 0, because deviations from it have the sum 0."""
    factor = d * y * y * y * (-1.0 / sum(_columns(value) for value in values))
    return (None, *[factor * (value - mean) for value in values])


def _columns(node: Node) -> int:
    assert isinstance(node.width, int)
    return node.width


def _row_mean(xp: Any, _: Any, *values: Any) -> Any:
    total = sum(xp.sum(value, axis=1, keepdims=True) for value in values)
    return total / float(sum(value.shape[1] for value in values))


def _row_rstd(xp: Any, eps: float, mean: Any, *values: Any) -> Any:
    deviations = [value - mean for value in values]
    return 1.0 / xp.sqrt(_row_mean(xp, None, *[each * each for each in deviations]) + eps)


def _clipped(xp: Any, _: Any, a: Any, low: Any, high: Any) -> Any:
    return xp.minimum(xp.maximum(a, low), high)


def _elu(xp: Any, alpha: float, a: Any) -> Any:
    return xp.where(a > 0.0, a, alpha * xp.expm1(xp.minimum(a, 0.0)))


OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda xp, _, a, b: a + b, lambda d, y, a, b: (d, d)),
    "sub": Operation(lambda xp, _, a, b: a - b, lambda d, y, a, b: (d, -d)),
    "mul": Operation(lambda xp, _, a, b: a * b, lambda d, y, a, b: (d * b, d * a)),
    "div": Operation(
        lambda xp, _, a, b: a / b, lambda d, y, a, b: (d / b, -(d / b) * y), again=Again.NEVER
    ),
    "neg": Operation(lambda xp, _, a: -a, lambda d, y, a: (-d,), again=Again.EXACT),
    # functions of one value
    "sigmoid": Operation(_sigmoid, lambda d, y, a: (d * y * (1.0 - y),), again=Again.NEVER),
    "tanh": Operation(
        lambda xp, _, a: xp.tanh(a), lambda d, y, a: (d * (1.0 - y * y),), again=Again.NEVER
    ),
    "exp": Operation(lambda xp, _, a: xp.exp(a), lambda d, y, a: (d * y,), again=Again.NEVER),
    "expm1": Operation(lambda xp, _, a: xp.expm1(a), again=Again.NEVER),  # of gradients only
    "log": Operation(lambda xp, _, a: xp.log(a), lambda d, y, a: (d / a,), again=Again.NEVER),
    "sqrt": Operation(
        lambda xp, _, a: xp.sqrt(a), lambda d, y, a: (0.5 * d / y,), again=Again.NEVER
    ),
    "softplus": Operation(  # log(1 + exp(a)); its derivative is σ(a) = 1 - exp(-y)
        lambda xp, _, a: xp.logaddexp(a, 0.0),
        lambda d, y, a: (-(d * y.graph.make("expm1", -y)),),
        again=Again.NEVER,
    ),
    "softsign": Operation(  # a / (1 + |a|)
        lambda xp, _, a: a / (xp.abs(a) + 1.0),
        lambda d, y, a: (d * (1.0 - abs(y)) * (1.0 - abs(y)),),
        again=Again.NEVER,
    ),
    "elu": Operation(  # alpha (exp(a) - 1) below 0
        _elu, lambda d, y, a: (_where_positive(y, d, d * (y + y.detail)),), again=Again.NEVER
    ),
    "relu": Operation(
        lambda xp, _, a: xp.maximum(a, 0.0),
        lambda d, y, a: (_where_positive(y, d, y),),  # 0, or NaN
        again=Again.EXACT,
    ),
    "leaky_relu": Operation(
        lambda xp, slope, a: xp.where(a > 0.0, a, slope * a),
        lambda d, y, a: (_where_positive(y, d, d * y.detail),),
    ),
    "hard_sigmoid": Operation(  # alpha a + beta within 0 and 1
        lambda xp, k, a: _clipped(xp, None, k[0] * a + k[1], 0.0, 1.0), _hard_sigmoid
    ),
    "abs": Operation(lambda xp, _, a: xp.abs(a), _abs, again=Again.EXACT),
    # selections
    "minimum": Operation(
        lambda xp, _, a, b: xp.minimum(a, b),
        lambda d, y, a, b: _selected(d, a < b, a, b),
        again=Again.EXACT,
    ),
    "maximum": Operation(
        lambda xp, _, a, b: xp.maximum(a, b),
        lambda d, y, a, b: _selected(d, a > b, a, b),
        again=Again.EXACT,
    ),
    "clip": Operation(_clipped, _clip, again=Again.EXACT),
    "where": Operation(
        lambda xp, _, c, a, b: xp.where(c, a, b),
        lambda d, y, c, a, b: (None, d.graph.where(c, d, 0.0), d.graph.where(c, 0.0, d)),
        again=Again.EXACT,
    ),
    "gt": Operation(lambda xp, _, a, b: a > b, again=Again.EXACT),
    "ge": Operation(lambda xp, _, a, b: a >= b, again=Again.EXACT),
    "lt": Operation(lambda xp, _, a, b: a < b, again=Again.EXACT),
    "le": Operation(lambda xp, _, a, b: a <= b, again=Again.EXACT),
    "eq": Operation(lambda xp, _, a, b: a == b, again=Again.EXACT),
    "ne": Operation(lambda xp, _, a, b: a != b, again=Again.EXACT),
    # of products, which `gradient.py` differentiates
    "part": Operation(lambda xp, ends, a: a[:, ends[0] : ends[1]], again=Again.EXACT),
    # of whole rows: (N, ...) to (N, 1), and back
    "row_mean": Operation(
        _row_mean,
        lambda d, y, *values: (d * (1.0 / sum(map(_columns, values))),) * len(values),
        again=Again.NEVER,
    ),
    "row_rstd": Operation(_row_rstd, _rstd, again=Again.NEVER),  # 1 / sqrt(variance + eps)
    "row_sum": Operation(lambda xp, _, a: xp.sum(a, axis=1, keepdims=True), again=Again.NEVER),
    "columns": Operation(
        lambda xp, width, a: xp.broadcast_to(a, (*a.shape[:-1], width)), again=Again.EXACT
    ),
}
