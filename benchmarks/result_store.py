"""The store of asv's results: named after the machine, without paths, with reasons for skips."""

from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from .common import gpu_name, numbers

Results = dict[str, Any]  # one of asv's result files
Row = dict[str, Any]  # one benchmark's entry in it, by column
Combination = tuple[str, ...]  # values of a benchmark's parameters
Benchmarks = dict[str, Any]  # asv's descriptions of benchmarks, by name
Skips = dict[str, dict[str, set[Combination]]]  # by benchmark class and reason
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "asv"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VERSIONS = (
    *("asv", "asv_runner", "numpy", "numba", "torch", "onnxruntime", "onnxruntime-gpu"),
    *("cupy", "cupy-cuda12x", "cupy-cuda13x"),
)
RATE_UNIT = "sequence steps / s"
# by a benchmark's method: the method of the same work as a rate, which is computed from its time
RATES = {"time_forward": "track_throughput_forward", "time_training": "track_throughput_training"}


class Commit(NamedTuple):
    """The commit under test."""

    hash: str
    date: str  # of the commit, ISO 8601


def machine_name() -> str:
    """The name of the first GPU, or that of the processor with its number of cores."""
    name = gpu_name() or f"{processor()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def names_a_model(processor: str) -> bool:
    """Whether a processor's name has a model number; many cloud machines give only a family."""
    family = re.sub(r"@.*|\(.*?\)|version .*|\d+-(bit|core)\w*", "", processor.lower())
    return processor != platform.machine() and re.search(r"\d", family) is not None


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

    Earlier results of the same commit are kept where nothing was measured now. Parameters' values
    of which nothing was measured are left out of the results, and out of `benchmarks.json` where no
    results have them: the published site has a button for each that is there.
    """
    raw = folder / "raw"
    environment = f"{machine}-py{sys.version_info.major}.{sys.version_info.minor}"
    machine_folder, name = target / machine, f"{commit.hash[:8]}-{environment}"
    (raw_results,) = (raw / machine).glob("*-existing-*.json")
    results = anonymized(read(raw_results), commit, environment)
    suite, skips = read(raw / "benchmarks.json"), _skips(folder / "skips")
    complete(results, suite)
    stored, reasons = machine_folder / f"{name}.json", machine_folder / "skips.json"
    stored_reasons = read(reasons) if reasons.exists() else {}
    if stored.exists():
        restore(skips, stored_reasons.get(name, {}), merge(results, read(stored), skips))
    _write(reasons, stored_reasons | {name: collapsed(skips, suite)})
    compact(results)
    add_rates(results)
    _write(stored, results)
    shutil.copyfile(raw / machine / "machine.json", machine_folder / "machine.json")
    write_benchmarks(target, suite)
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
            if not is_rate(name):
                results["results"][name] = old
            continue
        previous, row = (
            dict(zip_longest(columns, each)) for each in (old, results["results"][name])
        )
        if row["version"] != previous["version"] or not (row["result"] and previous["result"]):
            continue
        indices = {each: index for index, each in enumerate(axis_product(previous["params"]))}
        _widen(row, previous["params"])
        skipped = set().union(*skips[_class(name)].values())
        for index, combination in enumerate(axis_product(row["params"])):
            if not _is_nan(row["result"][index]):
                continue
            source = indices.get(combination)
            if source is not None and previous["result"][source] is not None:
                _copy(previous, source, row, index)
                for combinations in skips[_class(name)].values():
                    combinations.discard(combination)
            elif combination not in skipped:
                not_tried[_class(name)].add(combination)
        results["results"][name] = _listed(results, row)
    return not_tried


def _widen(row: Row, params: list[list[str]]) -> None:
    """Add parameters' values to a row, with NaN: a peer may not be installed any more."""
    wider = [
        [*axis, *(value for value in more if value not in axis)]
        for axis, more in zip(row["params"], params, strict=True)
    ]
    indices = {each: index for index, each in enumerate(product(*row["params"]))}
    for column in _by_combination(row):
        absent = math.nan if column == "result" else None
        row[column] = row[column] and [
            row[column][indices[each]] if each in indices else absent for each in product(*wider)
        ]
    row["params"] = wider


def _by_combination(row: Row) -> list[str]:
    """The columns with a value for each combination: results, and statistics of their samples."""
    return ["result", *(name for name in row if name.startswith("stats_"))]


def _copy(previous: Row, source: int, row: Row, target: int) -> None:
    """Copy the value of one combination and asv's statistics of its samples."""
    for column in _by_combination(row):
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


def complete(results: Results, suite: Benchmarks) -> None:
    """Add rows for benchmarks that were not selected: NaN, as asv has for skipped combinations."""
    for name, benchmark in suite.items():
        if name != "version" and name not in results["results"]:
            row = {key: benchmark[key] for key in ("params", "version")}
            row["result"] = [math.nan] * len(axis_product(row["params"]))
            results["results"][name] = _listed(results, row)


def compact(results: Results) -> None:
    """Leave out benchmarks and parameters' values that have NaN only, and make others' NaN null."""
    for name, values in [*results["results"].items()]:
        row = dict(zip_longest(results["result_columns"], values))
        if row["result"] is None:  # the benchmark failed as a whole
            continue
        every = [*product(*row["params"])]
        tried = [
            each for each, value in zip(every, row["result"], strict=True) if not _is_nan(value)
        ]
        if not tried:
            del results["results"][name]
            continue
        used = [{*axis} for axis in zip(*tried, strict=True)]
        params = [
            [value for value in axis if value in seen]
            for axis, seen in zip(row["params"], used, strict=True)
        ]
        kept = {*product(*params)}
        for column in _by_combination(row):
            row[column] = row[column] and [
                None if _is_nan(value) else value
                for each, value in zip(every, row[column], strict=True)
                if each in kept
            ]
        results["results"][name] = _listed(results, row | {"params": params})


def add_rates(results: Results) -> None:
    """Add rows of sequence steps per second, N T divided by the stored time of a call."""
    for name, values in [*results["results"].items()]:
        if rate := _rate(name):
            row = dict(zip_longest(results["result_columns"], values))
            rates = row["result"] and [
                second and _steps_per_second(combination, second)
                for combination, second in zip(
                    axis_product(row["params"]), row["result"], strict=True
                )
            ]
            derived = {"result": rates, "params": row["params"], "version": row["version"]}
            results["results"][rate] = _listed(results, derived)


def _steps_per_second(combination: Combination, seconds: float) -> float:
    """To four significant digits."""
    n = numbers(combination[-1])
    return float(f"{n['N'] * n['T'] / seconds:.4g}")


def _rate(name: str) -> str:
    """The name of the same benchmark as a rate, "" if it has none."""
    kind, _, method = name.rpartition(".")
    return f"{kind}.{RATES[method]}" if method in RATES else ""


def is_rate(name: str) -> bool:
    """Whether a benchmark's values are computed from another's."""
    return name.rpartition(".")[2] in RATES.values()


def write_benchmarks(target: Path, suite: Benchmarks) -> None:
    """Write asv's `benchmarks.json`: the benchmarks of which `target` has results."""
    file = target / "benchmarks.json"
    known: Benchmarks = (read(file) if file.exists() else {}) | suite
    for name, benchmark in suite.items():
        if rate := _rate(name):
            known[rate] = {
                **{key: benchmark[key] for key in ("param_names", "params", "timeout", "version")},
                "code": f"N T / the time of {name}",
                "name": rate,
                "setup_cache_key": None,
                "type": "track",
                "unit": RATE_UNIT,
            }
    stored = [read(path) for path in sorted(target.glob("*/*-py*.json"))]
    described = {"version": known.pop("version")}
    for name, benchmark in sorted(known.items()):
        rows = [
            dict(zip_longest(each["result_columns"], each["results"][name]))
            for each in stored
            if name in each["results"]
        ]
        params = [row["params"] for row in rows if row["version"] == benchmark["version"]]
        if params:
            axes_known = zip(benchmark["params"], *params, strict=True)
            described[name] = benchmark | {"params": [_in_order(*each) for each in axes_known]}
    _write(file, described)


def _in_order(known: list[str], *stored: list[str]) -> list[str]:
    """The stored values of a parameter: those known now in their order, then others."""
    values = dict.fromkeys(value for axis in stored for value in axis)
    return [
        *(value for value in known if value in values),
        *(value for value in values if value not in known),
    ]


def _listed(results: Results, row: Row) -> list[Any]:
    return [row.get(column) for column in results["result_columns"]]


# -- reasons for skips


def _skips(path: Path) -> Skips:
    skips: Skips = defaultdict(lambda: defaultdict(set))
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        skip = json.loads(line)
        skips[skip["benchmark"]][skip["reason"]].add(tuple(skip["parameters"]))
    return skips


def collapsed(skips: Skips, suite: Benchmarks) -> dict[str, dict[str, list[str]]]:
    """The skips as texts; "*" means that all values of a parameter are skipped."""
    known = {_class(name): axes(suite[name]["params"]) for name in suite if name != "version"}
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
        if len(every) == 1:
            continue
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


def read(path: Path) -> Any:
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
