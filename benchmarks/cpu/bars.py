"""What the figures have to show, and whether they do."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from .problems import BOTH, FORWARD, SHAPES, STEP

Row = dict[str, Any]


class Bar(NamedTuple):
    """One of them; a time's ratio is the other's time over xprnn's."""

    where: str
    what: str
    found: str
    met: bool


def ratio(row: Row, side: str, peer: str) -> float | None:
    """The median, round by round, of a peer's time over a side's."""
    ours, theirs = row["us"].get(side), row["us"].get(peer)
    if not ours or not theirs:
        return None
    return statistics.median([b / a for a, b in zip(ours, theirs, strict=True)])


def place(row: Row) -> str:
    """Which call a row is of."""
    sizes = ", ".join([str(row[name]) for name in "TNIH"])
    return f"{row['cell']} {sizes} {row['work']}, threads {row['threads']}"


def bars(rows: Sequence[Row], first: dict[str, Row]) -> list[Bar]:
    """All whose libraries were measured; means where every shape was."""
    found: list[Bar] = []
    for row in rows:
        found += {FORWARD: _forward, BOTH: _both, STEP: _step}[row["work"]](row)
    return [*found, *_means(rows), *_first(first)]


def _forward(row: Row) -> Iterator[Bar]:
    ratios = [r for peer in ("torch", "onnxruntime") if (r := ratio(row, "numba", peer))]
    if ratios:
        wanted = _wanted(row["N"], row["H"])
        beside = ratio(row, "products", "numba") if wanted == 1.0 else None
        text = "Numba by the faster of torch and ONNX Runtime"
        yield _either(row, text, min(ratios), wanted, beside, 1.05)
    alone = ratio(row, "numpy", "torch")
    if alone:
        yield _either(row, "NumPy by torch", alone, 0.9)


def _wanted(N: int, H: int) -> float:
    if N == 1 and H <= 64:
        return 2.0
    if (N, H) == (8, 64):
        return 1.4
    return 1.2 if (N, H) == (1, 128) else 1.0


def _both(row: Row) -> Iterator[Bar]:
    by_torch, by_jax = ratio(row, "numba", "torch"), ratio(row, "numba", "jax")
    if by_torch:
        beside = ratio(row, "products", "numba")
        yield _either(row, "Numba by torch", by_torch, 1.2, beside, 1.10)
    if by_jax:
        yield _either(row, "Numba by JAX", by_jax, 1.0)


def _step(row: Row) -> Iterator[Bar]:
    for side, name, peer, wanted in (
        ("numba", "Numba by torch's cell", "torch", 3.0),
        ("numba", "Numba by ONNX Runtime's session", "onnxruntime", 1.0),
        ("numpy", "NumPy by torch's cell", "torch", 1.0),
    ):
        found = ratio(row, side, peer)
        if found:
            yield _either(row, name, found, wanted)


def _either(
    row: Row, what: str, found: float, wanted: float, beside: float | None = None, most: float = 0
) -> Bar:
    """At least `wanted`, or the products' time within `most`."""
    text, said, met = f"{what} >= {wanted}", f"{found:.2f}", found >= wanted
    if beside:
        text += f", or within {most} of the products"
        said += f", {beside:.2f} of the products"
        met = met or beside <= most
    return Bar(place(row), text, said, met)


def _means(rows: Sequence[Row]) -> Iterator[Bar]:
    """Geometric means over all shapes, by cell and threads."""
    kinds = dict.fromkeys([(r["cell"], r["work"], r["threads"]) for r in rows if r["work"] != STEP])
    for cell, work, threads in kinds:
        mine = [r for r in rows if (r["cell"], r["work"], r["threads"]) == (cell, work, threads)]
        where = f"{cell}, all shapes, {work}, threads {threads}"
        wanted = [("numba", "torch", 2.0)]
        if work == FORWARD:
            wanted += [("numba", "onnxruntime", 1.2 if threads == 1 else 1.3)]
            wanted += [("numpy", "torch", 1.3)]
        for side, peer, least in wanted:
            ratios = [r for row in mine if (r := ratio(row, side, peer))]
            if len(ratios) == len(SHAPES):
                mean = geometric(ratios)
                text = f"{side} by {peer}, geometric mean >= {least}"
                yield Bar(where, text, f"{mean:.2f}", mean >= least)


def geometric(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return float(prod(ratios) ** (1 / len(ratios)))


def _first(first: dict[str, Row]) -> Iterator[Bar]:
    if not {"numpy", "torch"} <= first.keys():
        return
    where, seconds = "import and first result", {s: median(f["seconds"]) for s, f in first.items()}
    alone, theirs = seconds["numpy"], seconds["torch"]
    said = f"{alone:.2f} s, torch {theirs:.2f} s"
    yield Bar(where, "NumPy within a fifth of torch's time", said, alone <= theirs / 5)
    if "numba" in first:
        more = seconds["numba"] - alone
        yield Bar(where, "Numba within 0.3 s more than NumPy", f"{more:.2f} s", more <= 0.3)
    for side in ("numpy", "numba"):
        if side in first:
            ours, most = first[side]["MiB"], first["torch"]["MiB"] / 3
            text = f"{side}'s peak memory within a third of torch's"
            yield Bar(where, text, f"{ours} MiB, a third is {most:.0f} MiB", ours <= most)


def median(samples: Iterable[float]) -> float:
    """Of any samples."""
    return statistics.median([*samples])
