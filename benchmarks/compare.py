"""What two commits measured on one machine, beside each other, from the stored results."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from .result_store import Results, axis_product, is_rate, read

LIMIT = 1.1  # ratios up to this are seen between equal versions
UNITS = {"seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")), "bytes": ((1e6, "MB"),)}
WORDS = {"seconds": ("slower", "faster")}  # others: more, less


class NotStoredError(Exception):
    """No machine has results of both commits; the message lists the commits that there are."""


def compare(folder: Path, before: str, after: str, machine: str | None) -> str:
    """Tables of what both commits measured: both values, and the ratio `after` / `before`.

    :param before: A commit's hash, or how it begins; likewise `after`.
    :param machine: The machine's name; by default every machine that has both commits.
    :raises NotStoredError: No machine has both.
    """
    files = sorted(folder.glob(f"{machine or '*'}/*-py*.json"))
    environments = dict.fromkeys((path.parent, path.name.partition("-")[2]) for path in files)
    tables = []
    for parent, environment in environments:
        pair = [next(parent.glob(f"{each[:8]}*-{environment}"), None) for each in (before, after)]
        if pair[0] and pair[1]:
            units = {name: facts["unit"] for name, facts in _benchmarks(folder).items()}
            tables.append(_table(read(pair[0]), read(pair[1]), units))
    if not tables:
        commits = dict.fromkeys(f"{path.name[:8]} on {path.parent.name}" for path in files)
        raise NotStoredError(
            f"no results of both {before[:8]} and {after[:8]} on {machine or 'one machine'}; "
            f"stored: {', '.join(commits) or 'none'}; "
            "python -m benchmarks.record COMMIT measures and stores"
        )
    return "\n\n".join(tables)


def _benchmarks(folder: Path) -> dict[str, dict[str, Any]]:
    known = read(folder / "benchmarks.json")
    return {name: facts for name, facts in known.items() if name != "version"}


def _table(before: Results, after: Results, units: dict[str, str]) -> str:
    first, second = before["commit_hash"][:8], after["commit_hash"][:8]
    lines = [f"{before['env_name']}: {first}, {second}, and the ratio {second} / {first}"]
    versions = before["requirements"], after["requirements"]
    lines += [
        f"{name}: {versions[0][name]}, {versions[1][name]}"
        for name in sorted(versions[0].keys() & versions[1].keys())
        if versions[0][name] != versions[1][name]
    ]
    earlier, later, worse, rows = _measured(before), _measured(after), 0, 0
    for row, value in later.items():
        if row in earlier:
            name, _, combination = row
            unit, ratio = units[name], value / earlier[row]
            more, less = WORDS.get(unit, ("more", "less"))
            verdict = more if ratio > LIMIT else less if ratio < 1 / LIMIT else ""
            rows, worse = rows + 1, worse + (ratio > LIMIT)
            lines.append(
                f"{_text(earlier[row], unit):>10} {_text(value, unit):>10} {ratio:6.2f} "
                f"{verdict:6}  {name}({', '.join(combination)})"
            )
    lines.append(f"{rows} measured by both, {worse} of them more than {LIMIT} times the first")
    if rows < max(len(earlier), len(later)):  # a benchmark that failed at a commit has no number
        only = len(earlier) - rows, len(later) - rows
        missing = f"{only[0]} that only {first} has, {only[1]} that only {second} has"
        lines.append(f"not compared: {missing}")
    return "\n".join(lines)


def _measured(results: Results) -> dict[tuple[str, str, tuple[str, ...]], float]:
    """The numbers by benchmark, version and combination, without what is computed from others."""
    numbers = {}
    for name, values in sorted(results["results"].items()):
        row = dict(zip_longest(results["result_columns"], values))
        if row["result"] and not is_rate(name):
            for combination, value in zip(axis_product(row["params"]), row["result"], strict=True):
                if value is not None:
                    numbers[name, row["version"], combination] = value
    return numbers


def _text(value: float, unit: str) -> str:
    """With a prefix: 1.23 ms."""
    scales = UNITS.get(unit, ((1.0, ""),))
    scale, symbol = next((each for each in scales if abs(value) >= each[0]), scales[-1])
    return f"{value / scale:.4g} {symbol}".strip()
