"""The report's acceptance thresholds, and whether the measurements pass them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from .problems import BOTH, FORWARD, SHAPES, STEP

Row = dict[str, Any]


class Check(NamedTuple):
    """One threshold and its measurement; ratios of times are peer / xprnn."""

    call: str
    criterion: str
    measured: str
    passed: bool


def ratio(row: Row, implementation: str, peer: str) -> float | None:
    """The median over the rounds of the peer's time / the implementation's."""
    ours, theirs = row["us"].get(implementation), row["us"].get(peer)
    if not ours or not theirs:
        return None
    return statistics.median([b / a for a, b in zip(ours, theirs, strict=True)])


def call_name(row: Row) -> str:
    """The call that a row describes."""
    sizes = ", ".join([str(row[name]) for name in "TNIH"])
    return f"{row['cell']} {sizes} {row['work']}, threads {row['threads']}"


def evaluate(rows: Sequence[Row], first: dict[str, Row]) -> list[Check]:
    """All thresholds whose libraries were measured; means only where every shape was."""
    checks: list[Check] = []
    for row in rows:
        checks += {FORWARD: _forward, BOTH: _both, STEP: _step}[row["work"]](row)
    return [*checks, *_means(rows), *_first(first)]


def _forward(row: Row) -> Iterator[Check]:
    ratios = [r for peer in ("torch", "onnxruntime") if (r := ratio(row, "numba", peer))]
    if ratios:
        least = _least_speedup(row["N"], row["H"])
        of_products = ratio(row, "products", "numba") if least == 1.0 else None
        text = "faster of torch and ONNX Runtime / Numba"
        yield _check(row, text, min(ratios), least, of_products, 1.05)
    plain = ratio(row, "numpy", "torch")
    if plain:
        yield _check(row, "torch / NumPy", plain, 0.9)


def _least_speedup(N: int, H: int) -> float:
    if N == 1 and H <= 64:
        return 2.0
    if (N, H) == (8, 64):
        return 1.4
    return 1.2 if (N, H) == (1, 128) else 1.0


def _both(row: Row) -> Iterator[Check]:
    torch, jax = ratio(row, "numba", "torch"), ratio(row, "numba", "jax")
    if torch:
        of_products = ratio(row, "products", "numba")
        yield _check(row, "torch / Numba", torch, 1.2, of_products, 1.10)
    if jax:
        yield _check(row, "JAX / Numba", jax, 1.0)


def _step(row: Row) -> Iterator[Check]:
    for implementation, name, peer, least in (
        ("numba", "torch's cell / Numba", "torch", 3.0),
        ("numba", "ONNX Runtime's session / Numba", "onnxruntime", 1.0),
        ("numpy", "torch's cell / NumPy", "torch", 1.0),
    ):
        measured = ratio(row, implementation, peer)
        if measured:
            yield _check(row, name, measured, least)


def _check(
    row: Row,
    what: str,
    measured: float,
    least: float,
    of_products: float | None = None,
    most: float = 0,
) -> Check:
    """At least `least`, or a time of at most `most` times that of the products."""
    criterion, text, passed = f"{what} >= {least}", f"{measured:.2f}", measured >= least
    if of_products:
        criterion += f", or at most {most} times the products"
        text += f", {of_products:.2f} times the products"
        passed = passed or of_products <= most
    return Check(call_name(row), criterion, text, passed)


def _means(rows: Sequence[Row]) -> Iterator[Check]:
    """Geometric means over all shapes, by cell and number of threads."""
    kinds = dict.fromkeys([(r["cell"], r["work"], r["threads"]) for r in rows if r["work"] != STEP])
    for cell, work, threads in kinds:
        of_kind = [r for r in rows if (r["cell"], r["work"], r["threads"]) == (cell, work, threads)]
        call = f"{cell}, all shapes, {work}, threads {threads}"
        pairs = [("numba", "torch", 2.0)]
        if work == FORWARD:
            pairs += [("numba", "onnxruntime", 1.2 if threads == 1 else 1.3)]
            pairs += [("numpy", "torch", 1.3)]
        for implementation, peer, least in pairs:
            ratios = [r for row in of_kind if (r := ratio(row, implementation, peer))]
            if len(ratios) == len(SHAPES):
                mean = geometric(ratios)
                text = f"{peer} / {implementation}, geometric mean >= {least}"
                yield Check(call, text, f"{mean:.2f}", mean >= least)


def geometric(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return float(prod(ratios) ** (1 / len(ratios)))


def _first(first: dict[str, Row]) -> Iterator[Check]:
    if not {"numpy", "torch"} <= first.keys():
        return
    call, seconds = "import and first result", {s: median(f["seconds"]) for s, f in first.items()}
    plain, torch = seconds["numpy"], seconds["torch"]
    text = f"{plain:.2f} s, torch {torch:.2f} s"
    yield Check(call, "NumPy at most a fifth of torch's time", text, plain <= torch / 5)
    if "numba" in first:
        more = seconds["numba"] - plain
        yield Check(call, "Numba at most 0.3 s more than NumPy", f"{more:.2f} s", more <= 0.3)
    for implementation in ("numpy", "numba"):
        if implementation in first:
            ours, most = first[implementation]["MiB"], first["torch"]["MiB"] / 3
            text = f"{implementation}'s peak memory at most a third of torch's"
            yield Check(call, text, f"{ours} MiB, a third is {most:.0f} MiB", ours <= most)


def median(samples: Iterable[float]) -> float:
    """The median of an iterable."""
    return statistics.median([*samples])
