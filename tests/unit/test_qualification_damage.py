"""Damaged qualifications: refused, or read and used exactly as their rows say."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from tests.support.qualifications import make, preferring, row
from xprnn.kernels.qualification import (
    FAULTS,
    IMPLEMENTATIONS,
    MARGIN,
    Qualification,
    QualificationError,
    Row,
    Shape,
    as_json,
    parse,
)

PARTS, EACH = 20, 1000
GRID = {"N": (1, 8), "H": (16,), "T": (1, 9)}
SMALL = {"N": (1,), "H": (16,), "T": (9,)}
VALID = make(
    [
        *preferring("sequence", GRID),
        *preferring("reference", SMALL, cell="lstm", dtype="bfloat16"),
        row(cell="rnn_tanh", outcome="timed out", T=3, detail="after 10 s"),
    ],
)
TEXT = as_json(VALID)
SHAPES = [Shape(*sizes) for sizes in ((1, 16, 1), (8, 16, 9), (5, 16, 4), (1, 16, 99), (9, 16, 9))]
CALLS = [
    *product(("gru",), ("float32",), ("forward", "training", "step"), SHAPES, IMPLEMENTATIONS),
    *product(("lstm",), ("bfloat16",), ("forward",), SHAPES, IMPLEMENTATIONS),
]


# -- mutations

MARK = "\ue000"  # replaced by text that no encoder writes
RAW = [
    *("null", "true", "[]", "{}", '""', '"\\ud800"', '"\\u0000"', '"right"', '"wrong"'),
    *("0", "-1", "1", "2.5", "1e-320", "1e308", "1e999", "-0.0", "01", "NaN", "-Infinity"),
    *("9" * 400, "9" * 5000, "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000),
]
Mutation = Callable[[random.Random], bytes]


def of_bytes(draw: random.Random) -> bytes:
    """Changed, removed, repeated or exchanged bytes."""
    data = bytearray(TEXT.encode())
    for _ in range(draw.choice((1, 1, 2, 8))):
        a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        kind = draw.randrange(6)
        if kind == 0:
            data[a % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[a % len(data)] = draw.choice(b'0123456789-.eE"[]{},: \x00\xff')
        elif kind == 2:
            del data[a or 1 :]
        elif kind == 3:
            data[a:a] = data[b : b + draw.randrange(1, 200)]
        elif kind == 4:
            data[a:b] = data[a:b][::-1]
        else:
            del data[max(a, b - 9, 1) : b]
    return bytes(data)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a nest, with each of its keys."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    nests = [value[key] for key in keys if isinstance(value[key], (dict, list))]
    return found + [each for nest in nests for each in places(nest)]


def of_a_value(draw: random.Random) -> bytes:
    """Another value anywhere, of any type, or a field twice."""
    content = json.loads(TEXT)
    among = places(content)  # those of the rows come last
    nest, key = draw.choice(among if draw.random() < 0.7 else among[:30])
    if isinstance(nest, dict) and draw.random() < 0.2:
        raw = draw.choice(RAW)
        return json.dumps(content).replace(f'"{key}":', f'"{key}": {raw}, "{key}":', 1).encode()
    nest[key] = MARK
    return json.dumps(content).replace(json.dumps(MARK), draw.choice(RAW)).encode()


def of_rows(draw: random.Random) -> bytes:
    """Rows exchanged in part, removed or repeated, with other outcomes, times and sizes."""
    content = json.loads(TEXT)
    rows = content["rows"]
    for _ in range(draw.choice((1, 2, 10, 40))):
        (one, other), column = draw.sample(range(len(rows)), 2), draw.randrange(13)
        kind = draw.randrange(6)
        if kind == 0:
            rows[one][column], rows[other][column] = rows[other][column], rows[one][column]
        elif kind == 1:
            rows[one][8] = draw.choice((*FAULTS, "unsupported", "right"))
        elif kind == 2:
            rows[one][10] = draw.choice((None, 1.0, 9.6, 19.0, 10.5, 1e-320, 1e299))
        elif kind == 3:
            rows[one][4 + draw.choice((0, 2, 3))] = draw.choice((1, 5, 8, 9, 16, 1 << 39))
        elif kind == 4 and len(rows) > 20:
            del rows[one]
        elif draw.random() < 0.1:
            rows.append(list(rows[one]))
    return json.dumps(content).encode()


# -- what a file says, computed in another way


def expected(
    rows: tuple[Row, ...], call: tuple[str, str, str], shape: Shape, default: str
) -> set[str]:
    """The implementations of which one must be selected; empty: the default stays."""
    rows = tuple(r for r in rows if (r.cell, r.dtype, r.kind) == call)
    if not rows:
        return set()
    sides = []
    for name, size in zip("NHT", shape, strict=True):
        values = {getattr(r, name) for r in rows}
        size = min(size, max(values)) if name == "T" else size
        if not min(values) <= size <= max(values):
            return set()
        sides.append({max(v for v in values if v <= size), min(v for v in values if v >= size)})
    times: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    faulty = False
    for corner in product(*sides):
        there = [r for r in rows if corner == (r.N, r.H, r.T)]
        if not there:
            return set()
        for r in there:
            if r.outcome == "right" and r.microseconds is not None:
                times[r.implementation].append(r.microseconds)
            faulty |= r.implementation == default and r.outcome in FAULTS
    count = math.prod(map(len, sides))
    right = {name: each for name, each in times.items() if len(each) == count}
    candidates = right
    if not faulty:
        if default not in right:
            return set()
        candidates = {
            name: each
            for name, each in right.items()
            if min(d / t for d, t in zip(right[default], each, strict=True)) >= MARGIN
            and all(lasts(rows, N, H, shape.T, name, default) for N, H in product(*sides[:2]))
        }
    products = {name: sum(math.log(t) for t in each) for name, each in candidates.items()}
    return {name for name, each in products.items() if each <= min(products.values()) + 1e-9}


def lasts(rows: tuple[Row, ...], N: int, H: int, T: int, name: str, default: str) -> bool:
    """Whether the times, extended in a straight line to many steps, have the margin."""
    *fewer, most = sorted({r.T for r in rows})
    if most >= T:
        return True
    times = {
        (r.implementation, r.T): r.microseconds
        for r in rows
        if (r.N, r.H) == (N, H) and r.outcome == "right" and r.microseconds is not None
    }
    points = [(n, steps) for n in (default, name) for steps in (most, *fewer[-1:])]
    if not fewer or not times.keys() >= {*points}:
        return False
    there, before, own, own_before = (times[point] for point in points)
    return own > own_before and there - before >= (own - own_before) * MARGIN


def check(qualified: Qualification, calls: list[Any]) -> int:
    """The number of calls for which an implementation is selected."""
    selected = 0
    for *call, shape, default in calls:
        choice = qualified.choice(*call, shape, default)
        names = expected(qualified.rows, tuple(call), shape, default)
        assert (choice.implementation in names) if choice else not names, (call, shape, default)
        if choice:
            assert choice.reason.isprintable() and qualified.digest in choice.reason
            selected += 1
    return selected


def test_the_undamaged_file() -> None:
    assert parse(TEXT.encode()) == VALID
    assert check(VALID, CALLS) == 18


@pytest.mark.parametrize(
    "part", [0, 1, *(pytest.param(part, marks=pytest.mark.exhaustive) for part in range(2, PARTS))]
)
def test_damaged_files(part: int) -> None:
    """20,000 in all; a tenth is read, and selects."""
    draw, read, selected = random.Random(part), 0, 0
    for _ in range(EACH):
        data = draw.choice((of_bytes, of_a_value, of_rows))(draw)
        try:
            qualified = parse(data)
        except QualificationError:
            continue
        read += 1
        again = parse(as_json(qualified).encode())
        assert again == qualified and again.digest == qualified.digest
        selected += check(qualified, draw.sample(CALLS, 12)) > 0
    assert read > EACH / 10 and selected > EACH / 10
