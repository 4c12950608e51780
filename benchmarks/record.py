"""Runs asv's suite on a commit, in the environment that is there, and files the results.

    python benchmarks/record.py [COMMIT] [--machine NAME] [--quick] [--out FOLDER]

asv writes the interpreter's path and the host's name into files and file names. Here they get the
name of the machine, by default its GPU or processor, and `<machine>-py<version>` as environment,
and go to `benchmarks/results/asv/<machine>/` with `skips.json`: what was not measured, and why.

COMMIT (default HEAD) is taken from git into a folder of its own and measured from there: neither
the checkout's changes nor an installed xprnn take part, but the benchmarks are the checkout's.
Libraries are held to one thread.
Where there is no git history, give the commit and its date: `--commit HASH --date DATE` files what
the checkout holds as that. `--quick` measures a few combinations once and files nothing unless
`--out` says where. Exit status: 0 all measured or skipped with a reason, 1 a benchmark failed.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "asv"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
VERSIONS = ("numpy", "torch", "onnxruntime", "cupy-cuda12x", "cupy-cuda13x")
QUICK = (  # of the combinations of asv's names and parameters
    r"^layers\.(Forward|Training)\.time_\w+\(.*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.Forward\.track_throughput_forward\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.(Training)?Launches\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.TrainingMemory\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.Step\.time_step\(.*'float32', 'N=1 H=128'\)",
    r"^programs\.(DemoEpoch|Load)\.\w+\('gru', ",
    r"^programs\.Import\.",
)


class Commit(NamedTuple):
    """What is measured."""

    hash: str
    date: str  # ISO 8601, when it was committed


def main() -> int:
    options = _options()
    machine = options.machine or machine_name()
    with tempfile.TemporaryDirectory(prefix="xprnn-asv-") as name:
        folder = Path(name)
        tree, commit = folder / "tree", take_sources(options, folder / "tree")
        print(f"{machine}: measuring {commit.hash[:8]} of {commit.date}", flush=True)
        status = run_asv(folder, tree, commit, machine, quick=options.quick)
        if status not in (0, 2):  # 2: a benchmark failed; its number is null, the others stand
            print(f"asv ended with status {status}", file=sys.stderr)
            return status
        target = options.out or (folder / "filed" if options.quick else RESULTS)
        written = file_results(folder, target, commit, machine)
    print(f"filed: {written}" if options.out or not options.quick else "quick: nothing is filed")
    return 1 if status else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--date", help="of COMMIT, where there is no git history to ask")
    parser.add_argument("--machine", metavar="NAME", help="default: the GPU's, else the CPU's")
    parser.add_argument("--quick", action="store_true", help="a few combinations, once each")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"default: {RESULTS.name}")
    return parser.parse_args()


# -- what is measured


def take_sources(options: argparse.Namespace, tree: Path) -> Commit:
    """Put the package as it was at the commit into `tree`; SystemExit if that cannot be."""
    if options.date:
        if not re.fullmatch(r"[0-9a-f]{40}", options.commit):
            raise SystemExit(f"commit: with --date expected 40 hex digits, got {options.commit!r}")
        shutil.copytree(ROOT / "xprnn", tree / "xprnn")
        return Commit(options.commit, options.date)
    try:
        found = _git("log", "-1", "--format=%H %cI", options.commit, "--").decode().split()
        archive = _git("archive", found[0], "xprnn")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        raise SystemExit(
            f"commit {options.commit}: {reason.decode().strip()}; where there is no git history "
            "give the 40 digits and --date"
        ) from error
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tree, filter="data")
    return Commit(*found)


def _git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, check=True
    ).stdout


# -- the run


def run_asv(folder: Path, tree: Path, commit: Commit, machine: str, *, quick: bool) -> int:
    """asv's exit status; its raw results lie in `folder`/raw, the skips in `folder`/skips."""
    conf = json.loads((ROOT / "asv.conf.json").read_text("utf-8"))
    conf |= {
        "repo": str(_repository(folder / "repo", commit)),
        "benchmark_dir": str(ROOT / "benchmarks"),
        "results_dir": str(folder / "raw"),
        "matrix": {},
    }
    (folder / "asv.conf.json").write_text(json.dumps(conf), "utf-8")
    facts = machine_facts(machine)
    (folder / ".asv-machine.json").write_text(json.dumps({machine: facts, "version": 1}), "utf-8")
    cache = Path.home() / ".cupy" / "kernel_cache"
    environment = {
        "CUPY_CACHE_DIR": str(cache),
        **os.environ,
        **dict.fromkeys(THREADS, "1"),
        "HOME": str(folder),  # asv keeps what it knows of machines there
        "PYTHONPATH": str(tree),
        "XPRNN_SKIPS": str(folder / "skips"),
    }
    _check_measured(tree, environment)
    command = [sys.executable, "-m", "asv", "run", "--environment", f"existing:{sys.executable}"]
    command += ["--set-commit-hash", "HEAD", "--machine", machine, "--show-stderr"]
    if quick:
        command += ["-a", "rounds=1", "-a", "repeat=5"]
        command += [f"--bench={pattern}" for pattern in QUICK]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout or ():
            if not re.search(
                r" n/a *$|asv: skipped", line
            ):  # thousands; skips.json has the reasons
                print(line, end="", flush=True)
    return process.returncode


def _repository(folder: Path, commit: Commit) -> Path:
    """A repository of one empty commit of the same date: asv asks for one."""
    dates = {"GIT_COMMITTER_DATE": commit.date, "GIT_AUTHOR_DATE": commit.date}
    who = ["-c", "user.name=xprnn", "-c", "user.email=xprnn@localhost"]
    git = ["git", "-C", str(folder), *who]
    subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True)
    subprocess.run(
        [*git, "commit", "-q", "--allow-empty", "-m", commit.hash],
        check=True,
        env=os.environ | dates,
    )
    return folder


def _check_measured(tree: Path, environment: dict[str, str]) -> None:
    """SystemExit unless it is the package in `tree` that the benchmarks will import."""
    command = [sys.executable, "-c", "import xprnn; print(xprnn.__file__)"]
    found = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if found.returncode or not Path(found.stdout.strip()).is_relative_to(tree.resolve()):
        raise SystemExit(f"xprnn of this commit: not imported; {found.stdout}{found.stderr}")


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


def machine_facts(machine: str) -> dict[str, str]:
    """What asv keeps of a machine, but for the host's name and the kernel's build."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "machine": machine,
        "os": platform.system(),
        "arch": platform.machine(),
        "cpu": processor(),
        "num_cpu": str(os.cpu_count()),
        "ram": f"{memory:.0f} GiB",
    }


# -- filing


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


if __name__ == "__main__":
    sys.exit(main())
