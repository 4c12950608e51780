"""What asv's results are filed as: the machine's name, no paths, and the reasons of skips."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

Results = dict[str, Any]  # a file of asv's
Row = dict[str, Any]  # of one benchmark in it, by column
Combination = tuple[str, ...]  # of a benchmark's parameters
Skips = dict[str, dict[str, set[Combination]]]  # by the benchmark's class and the reason
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VERSIONS = (
    *("asv", "asv_runner", "numpy", "torch", "onnxruntime", "onnxruntime-gpu"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x"),
)


class Commit(NamedTuple):
    """What is measured."""

    hash: str
    date: str  # ISO 8601, when it was committed


def machine_name() -> str:
    """The name of the first GPU, or the processor's with the number of cores."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        name = name.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        name = f"{processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The model of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8") if cpuinfo.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def machine_facts(machine: str, target: Path) -> dict[str, str]:
    """What asv keeps of a machine, but for the host's name and the kernel's build.

    What is filed below `target` stands: asv begins a new curve where a fact changes.
    """
    filed = target / machine / "machine.json"
    if filed.exists():
        facts: dict[str, str] = json.loads(filed.read_text("utf-8"))
        del facts["version"]
        return facts
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "machine": machine,
        "os": platform.system(),
        "arch": platform.machine(),
        "cpu": processor(),
        "num_cpu": str(os.cpu_count()),
        "ram": f"{memory:.0f} GiB",
    }


def file_results(folder: Path, target: Path, commit: Commit, machine: str) -> Path:
    """Write asv's results, `machine.json`, `benchmarks.json` and `skips.json` below `target`.

    What was filed of the same commit earlier stands where nothing was measured now.
    """
    raw = folder / "raw"
    environment = f"{machine}-py{sys.version_info.major}.{sys.version_info.minor}"
    place, name = target / machine, f"{commit.hash[:8]}-{environment}"
    (found,) = (raw / machine).glob("*-existing-*.json")
    results = renamed(_read(found), commit, environment)
    skips = _skips(folder / "skips")
    filed, reasons = place / f"{name}.json", place / "skips.json"
    kept = _read(reasons) if reasons.exists() else {}
    if filed.exists():
        restore(skips, kept.get(name, {}), merge(results, _read(filed), skips))
    complete(results, _read(raw / "benchmarks.json"))
    _write(filed, results)
    shutil.copyfile(raw / machine / "machine.json", place / "machine.json")
    shutil.copyfile(raw / "benchmarks.json", target / "benchmarks.json")
    _write(reasons, kept | {name: collapsed(skips, results)})
    return filed


def renamed(results: Results, commit: Commit, environment: str) -> Results:
    """asv's results under the commit and environment, without paths."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return results | {
        "commit_hash": commit.hash,
        "env_name": environment,
        "python": python,
        "requirements": versions(VERSIONS),
        "env_vars": {THREADS[0]: "1"},
        "params": results["params"] | {"python": python},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def merge(results: Results, earlier: Results, skips: Skips) -> dict[str, set[Combination]]:
    """Take numbers from `earlier` where there are none now, but for what failed now.

    `skips` loses what has a number. Returns, by class, what was not tried now, and has none.
    """
    columns = results["result_columns"]
    if earlier["result_columns"] != columns:
        raise SystemExit("filed results: another asv wrote them; measure all of this commit anew")
    left_out: dict[str, set[Combination]] = defaultdict(set)
    for name, old in earlier["results"].items():
        if name not in results["results"]:
            results["results"][name] = old
            left_out[_class(name)] |= set(_combinations(results, old))
            continue
        was, row = (dict(zip_longest(columns, each)) for each in (old, results["results"][name]))
        if row["version"] != was["version"] or not (row["result"] and was["result"]):
            continue
        before = {each: place for place, each in enumerate(_combinations(results, old))}
        skipped = set().union(*skips[_class(name)].values())
        for place, combination in enumerate(axis_product(row["params"])):
            if not _is_nan(row["result"][place]) or combination not in before:
                continue
            if was["result"][before[combination]] is not None:
                _copy(was, before[combination], row, place)
                for found in skips[_class(name)].values():
                    found.discard(combination)
            elif combination not in skipped:
                left_out[_class(name)].add(combination)
        results["results"][name] = [row[column] for column in columns]
    return left_out


def _copy(was: Row, at: int, row: Row, place: int) -> None:
    """The number of one combination, and what asv found about its samples."""
    for column in ("result", *(name for name in row if name.startswith("stats_"))):
        values = row[column] or [None] * len(row["result"])
        values[place] = was[column] and was[column][at]
        row[column] = values


def restore(
    skips: Skips, texts: dict[str, dict[str, list[str]]], left_out: dict[str, set[Combination]]
) -> None:
    """Put back the reasons that were given for combinations that were not tried again."""
    for name, reasons in texts.items():
        for reason, items in reasons.items():
            patterns = [item.split(", ") for item in items]
            skips[name][reason] |= {
                combination
                for combination in left_out[name]
                if any(_fits(combination, pattern) for pattern in patterns)
            }


def complete(results: Results, benchmarks: dict[str, Any]) -> None:
    """Make skips null, and give each benchmark a row: the published site asks for every graph."""
    columns = results["result_columns"]
    result = columns.index("result")
    for row in results["results"].values():
        if row[result]:
            row[result] = [None if _is_nan(value) else value for value in row[result]]
    for name, benchmark in benchmarks.items():
        if name != "version" and name not in results["results"]:
            row = {"params": benchmark["params"], "version": benchmark["version"]}
            results["results"][name] = [row.get(column) for column in columns]


# -- the reasons of skips


def _skips(path: Path) -> Skips:
    found: Skips = defaultdict(lambda: defaultdict(set))
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        skip = json.loads(line)
        found[skip["benchmark"]][skip["reason"]].add(tuple(skip["parameters"]))
    return found


def collapsed(skips: Skips, results: Results) -> dict[str, dict[str, list[str]]]:
    """The same as texts; "*" stands for every value of a parameter, all of them skipped."""
    column = results["result_columns"].index("params")
    known = {_class(name): axes(row[column]) for name, row in results["results"].items()}
    return {
        name: {
            reason: sorted(", ".join(item) for item in _starred(found, known[name]))
            for reason, found in reasons.items()
            if found
        }
        for name, reasons in skips.items()
    }


def _starred(
    found: Iterable[Combination], values: Sequence[Sequence[str]]
) -> Iterable[Combination]:
    for axis, every in enumerate(values):
        groups = defaultdict(set)
        for item in found:
            groups[item[:axis], item[axis + 1 :]].add(item[axis])
        found = [
            (*before, value, *after)
            for (before, after), seen in groups.items()
            for value in (("*",) if seen >= set(every) else seen)
        ]
    return found


def _fits(combination: Sequence[str], pattern: Sequence[str]) -> bool:
    return all(wanted in ("*", value) for value, wanted in zip(combination, pattern, strict=True))


def _combinations(results: Results, row: list[Any]) -> list[Combination]:
    return axis_product(row[results["result_columns"].index("params")])


def axis_product(params: Sequence[Sequence[str]]) -> list[Combination]:
    """Every combination of parameters, in asv's order."""
    return [*product(*axes(params))]


def axes(params: Sequence[Sequence[str]]) -> list[list[str]]:
    """The values of each parameter, of which asv keeps the `repr`."""
    return [[ast.literal_eval(value) for value in axis] for axis in params]


def _class(name: str) -> str:
    """ "layers.Forward" of "layers.Forward.time_forward"."""
    return name.rpartition(".")[0]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, value: Any) -> None:
    """Write it whole or not at all: what was measured before is in the same file.

    Without xprnn.io: nothing here may import the checkout's package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1 if path.name == "skips.json" else None, allow_nan=False)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text + "\n", "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
