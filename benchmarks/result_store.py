"""The store of asv's results: named after the machine, without paths, with reasons for skips."""

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

Results = dict[str, Any]  # one of asv's result files
Row = dict[str, Any]  # one benchmark's entry in it, by column
Combination = tuple[str, ...]  # values of a benchmark's parameters
Skips = dict[str, dict[str, set[Combination]]]  # by benchmark class and reason
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VERSIONS = (
    *("asv", "asv_runner", "numpy", "torch", "onnxruntime", "onnxruntime-gpu"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x"),
)


class Commit(NamedTuple):
    """The commit under test."""

    hash: str
    date: str  # of the commit, ISO 8601


def machine_name() -> str:
    """The name of the first GPU, or that of the processor with its number of cores."""
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
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.machine()


def machine_facts(machine: str, target: Path) -> dict[str, str]:
    """asv's description of a machine, without the host's name and the kernel's build.

    Facts stored below `target` are reused: asv starts a new curve where a fact changes.
    """
    stored = target / machine / "machine.json"
    if stored.exists():
        facts: dict[str, str] = json.loads(stored.read_text("utf-8"))
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


def store_results(folder: Path, target: Path, commit: Commit, machine: str) -> Path:
    """Write asv's results, `machine.json`, `benchmarks.json` and `skips.json` below `target`.

    Earlier results of the same commit are kept where nothing was measured now.
    """
    raw = folder / "raw"
    environment = f"{machine}-py{sys.version_info.major}.{sys.version_info.minor}"
    machine_folder, name = target / machine, f"{commit.hash[:8]}-{environment}"
    (raw_results,) = (raw / machine).glob("*-existing-*.json")
    results = anonymized(_read(raw_results), commit, environment)
    skips = _skips(folder / "skips")
    stored, reasons = machine_folder / f"{name}.json", machine_folder / "skips.json"
    stored_reasons = _read(reasons) if reasons.exists() else {}
    if stored.exists():
        restore(skips, stored_reasons.get(name, {}), merge(results, _read(stored), skips))
    complete(results, _read(raw / "benchmarks.json"))
    _write(stored, results)
    shutil.copyfile(raw / machine / "machine.json", machine_folder / "machine.json")
    shutil.copyfile(raw / "benchmarks.json", target / "benchmarks.json")
    _write(reasons, stored_reasons | {name: collapsed(skips, results)})
    return stored


def anonymized(results: Results, commit: Commit, environment: str) -> Results:
    """asv's results for a commit and environment, without paths."""
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
    """The versions of the installed packages among these."""
    installed = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def merge(results: Results, earlier: Results, skips: Skips) -> dict[str, set[Combination]]:
    """Copy values from `earlier` for combinations that have none now, except those that failed.

    Removes from `skips` the combinations that have a value. Returns, by class, those that were not
    tried now and have none.
    """
    columns = results["result_columns"]
    if earlier["result_columns"] != columns:
        raise SystemExit("stored results: written by another asv; measure all of this commit again")
    not_tried: dict[str, set[Combination]] = defaultdict(set)
    for name, old in earlier["results"].items():
        if name not in results["results"]:
            results["results"][name] = old
            not_tried[_class(name)] |= set(_combinations(results, old))
            continue
        previous, row = (
            dict(zip_longest(columns, each)) for each in (old, results["results"][name])
        )
        if row["version"] != previous["version"] or not (row["result"] and previous["result"]):
            continue
        indices = {each: index for index, each in enumerate(_combinations(results, old))}
        skipped = set().union(*skips[_class(name)].values())
        for index, combination in enumerate(axis_product(row["params"])):
            if not _is_nan(row["result"][index]) or combination not in indices:
                continue
            if previous["result"][indices[combination]] is not None:
                _copy(previous, indices[combination], row, index)
                for combinations in skips[_class(name)].values():
                    combinations.discard(combination)
            elif combination not in skipped:
                not_tried[_class(name)].add(combination)
        results["results"][name] = [row[column] for column in columns]
    return not_tried


def _copy(previous: Row, source: int, row: Row, target: int) -> None:
    """Copy the value of one combination and asv's statistics of its samples."""
    for column in ("result", *(name for name in row if name.startswith("stats_"))):
        values = row[column] or [None] * len(row["result"])
        values[target] = previous[column] and previous[column][source]
        row[column] = values


def restore(
    skips: Skips, texts: dict[str, dict[str, list[str]]], not_tried: dict[str, set[Combination]]
) -> None:
    """Restore the recorded reasons of combinations that were not tried again."""
    for name, reasons in texts.items():
        for reason, items in reasons.items():
            patterns = [item.split(", ") for item in items]
            skips[name][reason] |= {
                combination
                for combination in not_tried[name]
                if any(_fits(combination, pattern) for pattern in patterns)
            }


def complete(results: Results, benchmarks: dict[str, Any]) -> None:
    """Make skips null and add missing rows: the published site requests every benchmark's graph."""
    columns = results["result_columns"]
    result = columns.index("result")
    for row in results["results"].values():
        if row[result]:
            row[result] = [None if _is_nan(value) else value for value in row[result]]
    for name, benchmark in benchmarks.items():
        if name != "version" and name not in results["results"]:
            row = {"params": benchmark["params"], "version": benchmark["version"]}
            results["results"][name] = [row.get(column) for column in columns]


# -- reasons for skips


def _skips(path: Path) -> Skips:
    skips: Skips = defaultdict(lambda: defaultdict(set))
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        skip = json.loads(line)
        skips[skip["benchmark"]][skip["reason"]].add(tuple(skip["parameters"]))
    return skips


def collapsed(skips: Skips, results: Results) -> dict[str, dict[str, list[str]]]:
    """The skips as texts; "*" means that all values of a parameter are skipped."""
    column = results["result_columns"].index("params")
    known = {_class(name): axes(row[column]) for name, row in results["results"].items()}
    return {
        name: {
            reason: sorted(", ".join(item) for item in _starred(combinations, known[name]))
            for reason, combinations in reasons.items()
            if combinations
        }
        for name, reasons in skips.items()
    }


def _starred(
    items: Iterable[Combination], values: Sequence[Sequence[str]]
) -> Iterable[Combination]:
    """Replace complete sets of values by "*", one parameter after the other."""
    for axis, every in enumerate(values):
        groups = defaultdict(set)
        for item in items:
            groups[item[:axis], item[axis + 1 :]].add(item[axis])
        items = [
            (*before, value, *after)
            for (before, after), seen in groups.items()
            for value in (("*",) if seen >= set(every) else seen)
        ]
    return items


def _fits(combination: Sequence[str], pattern: Sequence[str]) -> bool:
    return all(wanted in ("*", value) for value, wanted in zip(combination, pattern, strict=True))


def _combinations(results: Results, row: list[Any]) -> list[Combination]:
    return axis_product(row[results["result_columns"].index("params")])


def axis_product(params: Sequence[Sequence[str]]) -> list[Combination]:
    """Every combination of parameters, in asv's order."""
    return [*product(*axes(params))]


def axes(params: Sequence[Sequence[str]]) -> list[list[str]]:
    """The values of each parameter, which asv stores as their `repr`."""
    return [[ast.literal_eval(value) for value in axis] for axis in params]


def _class(name: str) -> str:
    """ "layers.Forward" for "layers.Forward.time_forward"."""
    return name.rpartition(".")[0]


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _write(path: Path, value: Any) -> None:
    """Write atomically: the file also holds earlier measurements.

    Not with xprnn.nn.serialization: this module must not import the checkout's package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1 if path.name == "skips.json" else None, allow_nan=False)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text + "\n", "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
