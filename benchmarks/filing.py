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
from pathlib import Path
from typing import Any, NamedTuple

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VERSIONS = ("numpy", "torch", "onnxruntime", "cupy-cuda12x", "cupy-cuda13x")


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
    """Write asv's results, `machine.json`, `benchmarks.json` and `skips.json` below `target`."""
    raw = folder / "raw"
    environment = f"{machine}-py{sys.version_info.major}.{sys.version_info.minor}"
    (found,) = (raw / machine).glob("*-existing-*.json")
    results = renamed(json.loads(found.read_text("utf-8")), commit, environment)
    name = f"{commit.hash[:8]}-{environment}"
    skips = collapsed(_skips(folder / "skips"), results)
    place = target / machine
    _write(place / f"{name}.json", results)
    shutil.copyfile(raw / machine / "machine.json", place / "machine.json")
    shutil.copyfile(raw / "benchmarks.json", target / "benchmarks.json")
    kept = place / "skips.json"
    earlier = json.loads(kept.read_text("utf-8")) if kept.exists() else {}
    _write(kept, earlier | {name: skips})
    return place / f"{name}.json"


def renamed(results: dict[str, Any], commit: Commit, environment: str) -> dict[str, Any]:
    """asv's results under the commit and environment, without paths; a skip is null."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    results |= {
        "commit_hash": commit.hash,
        "env_name": environment,
        "python": python,
        "requirements": _versions(),
        "env_vars": {THREADS[0]: "1"},
        "params": results["params"] | {"python": python},
    }
    column = results["result_columns"].index("result")
    for row in results["results"].values():
        if row and row[column]:
            row[column] = [None if _is_nan(value) else value for value in row[column]]
    return results


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _skips(path: Path) -> dict[str, dict[str, set[tuple[str, ...]]]]:
    """Of each benchmark, for each reason, the combinations that were skipped."""
    found: dict[str, dict[str, set[tuple[str, ...]]]] = defaultdict(lambda: defaultdict(set))
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        skip = json.loads(line)
        found[skip["benchmark"]][skip["reason"]].add(tuple(skip["parameters"]))
    return found


def collapsed(
    skips: dict[str, dict[str, set[tuple[str, ...]]]], results: dict[str, Any]
) -> dict[str, dict[str, list[str]]]:
    """The same as texts; "*" stands for every value of a parameter, all of them skipped."""
    column = results["result_columns"].index("params")
    axes = {
        name.rpartition(".")[0]: [
            {ast.literal_eval(value) for value in axis} for axis in row[column]
        ]
        for name, row in results["results"].items()
    }
    return {
        benchmark: {
            reason: sorted(", ".join(item) for item in _starred(found, axes[benchmark]))
            for reason, found in reasons.items()
        }
        for benchmark, reasons in skips.items()
    }


def _starred(
    found: Iterable[tuple[str, ...]], axes: Sequence[set[str]]
) -> Iterable[tuple[str, ...]]:
    for axis, values in enumerate(axes):
        groups = defaultdict(set)
        for item in found:
            groups[item[:axis], item[axis + 1 :]].add(item[axis])
        found = [
            (*before, value, *after)
            for (before, after), seen in groups.items()
            for value in (("*",) if seen >= values else seen)
        ]
    return found


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1 if path.name == "skips.json" else None, allow_nan=False)
    path.write_text(text + "\n", "utf-8")
