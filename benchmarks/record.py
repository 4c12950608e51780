"""Runs asv's suite on a commit, in the environment that is there, and files the results.

    python -m benchmarks.record [COMMIT] [--machine NAME] [--quick | --bench REGEX] [--out FOLDER]

asv writes the interpreter's path and the host's name into files and file names. Here they get the
name of the machine, by default its GPU or processor, and `<machine>-py<version>` as environment,
and go to `benchmarks/results/asv/<machine>/` with `skips.json`: what was not measured, and why.

COMMIT (default HEAD) is taken from git into a folder of its own and measured from there: neither
the checkout's changes nor an installed xprnn take part, but the benchmarks are the checkout's.
Libraries are held to one thread. Where there is no git history, `HASH --date DATE` files what the
checkout holds as that commit. `--bench` measures what asv finds by a regular expression; of the
rest what was filed of the commit before stands. `--quick` measures a few combinations once each,
and files nothing unless `--out` says where. Exit status: 0 all measured or skipped with a reason,
1 a benchmark failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO, TextIOWrapper
from pathlib import Path

from .filing import THREADS, Commit, file_results, machine_facts, machine_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "asv"
# of asv's output; thousands of lines
LEFT_OUT = re.compile(r" n/a *$|asv: skipped|^ *For parameters|· For |^ *$")
QUICK = (  # of the combinations of asv's names and parameters
    r"^layers\.Forward\.time_forward\(.*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.Training\.time_training\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.Forward\.track_throughput_forward\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.(Training)?Launches\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.TrainingMemory\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^layers\.(Step|Stepper)\.time_100_steps\('gru', .*'float32', 'N=1 H=128'\)",
    r"^programs\.(DemoEpoch|Load)\.\w+\('gru', ",
    r"^programs\.Import\.",
)


def main() -> int:
    options = _options()
    if shutil.which("git") is None:
        raise SystemExit("git: not installed; asv needs it, even where there is no history")
    machine = options.machine or machine_name()
    with tempfile.TemporaryDirectory(prefix="xprnn-asv-") as name:
        folder = Path(name)
        tree, commit = folder / "tree", take_sources(options, folder / "tree")
        print(f"{machine}: measuring {commit.hash[:8]} of {commit.date}", flush=True)
        status = run_asv(folder, tree, commit, machine, options)
        if status not in (0, 2):  # 2: a benchmark failed; its number is null, the others stand
            print(f"asv ended with status {status}", file=sys.stderr)
            return status
        if options.out or not options.quick:
            written = file_results(folder, options.out or RESULTS, commit, machine)
            print(f"filed: {written}")
    return 1 if status else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--date", help="of COMMIT, where there is no git history to ask")
    parser.add_argument("--machine", metavar="NAME", help="default: the GPU's, else the CPU's")
    parser.add_argument("--quick", action="store_true", help="a few combinations, once each")
    parser.add_argument("--bench", action="append", metavar="REGEX", help="as asv's --bench")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
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


def run_asv(
    folder: Path, tree: Path, commit: Commit, machine: str, options: argparse.Namespace
) -> int:
    """asv's exit status; its raw results lie in `folder`/raw, the skips in `folder`/skips."""
    # a copy: asv reads the files again for each benchmark, and a run takes long
    suite = folder / "benchmarks"
    shutil.copytree(ROOT / "benchmarks", suite, ignore=shutil.ignore_patterns("results"))
    conf = json.loads((ROOT / "asv.conf.json").read_text("utf-8"))
    conf |= {
        "repo": str(_repository(folder / "repo", commit)),
        "benchmark_dir": str(suite),
        "results_dir": str(folder / "raw"),
        "matrix": {},
    }
    (folder / "asv.conf.json").write_text(json.dumps(conf), "utf-8")
    facts = machine_facts(machine, options.out or RESULTS)
    (folder / ".asv-machine.json").write_text(json.dumps({machine: facts, "version": 1}), "utf-8")
    cache = Path.home() / ".cupy" / "kernel_cache"
    environment = {
        "CUPY_CACHE_DIR": str(cache),
        **{name: value for name, value in os.environ.items() if not name.startswith("XPRNN_")},
        **dict.fromkeys(THREADS, "1"),
        "HOME": str(folder),  # asv keeps what it knows of machines there
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONPATH": str(tree),  # for processes that a benchmark starts
        "ASV_PYTHONPATH": str(tree),  # for those that asv starts
        "XPRNN_MEASURED": str(tree),
        "XPRNN_SKIPS": str(folder / "skips"),
    }
    _check_measured(tree, environment)
    command = [sys.executable, "-m", "asv", "run", "--environment", f"existing:{sys.executable}"]
    command += ["--set-commit-hash", "HEAD", "--machine", machine, "--show-stderr"]
    if options.quick:
        command += ["-a", "rounds=1", "-a", "repeat=5"]
    patterns = options.bench or (QUICK if options.quick else ())
    command += [f"--bench={pattern}" for pattern in patterns]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        for line in process.stdout or ():
            if not LEFT_OUT.search(line):
                print(line, end="", flush=True)
    return process.returncode


def _repository(folder: Path, commit: Commit) -> Path:
    """A repository of one empty commit of the same date: asv asks for one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_CONFIG_GLOBAL": os.devnull,  # the user's may ask for signatures
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_COMMITTER_DATE": commit.date,
        "GIT_AUTHOR_DATE": commit.date,
    }
    who = ["-c", "user.name=xprnn", "-c", "user.email=xprnn@localhost"]
    for command in (
        ["git", "init", "-q", "-b", "main", str(folder)],
        ["git", "-C", str(folder), *who, "commit", "-q", "--allow-empty", "-m", commit.hash],
    ):
        subprocess.run(command, check=True, env=environment)
    return folder


def _check_measured(tree: Path, environment: dict[str, str]) -> None:
    """SystemExit unless it is the package in `tree` that the benchmarks will import."""
    command = [sys.executable, "-c", "import xprnn; print(xprnn.__file__)"]
    found = subprocess.run(
        command, cwd=tree.parent, env=environment, capture_output=True, text=True
    )
    if found.returncode or not Path(found.stdout.strip()).is_relative_to(tree.resolve()):
        raise SystemExit(f"xprnn of this commit: not imported; {found.stdout}{found.stderr}")


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):  # asv's lines hold what not every stream takes
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
