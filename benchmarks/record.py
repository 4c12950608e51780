"""Run asv's suite on a commit, in the current environment, and store the results.

    python -m benchmarks.record [COMMIT] [--machine NAME] [--quick | --bench REGEX] [--out FOLDER]
    python -m benchmarks.record --compare A B [--machine NAME] [--out FOLDER]

asv writes the interpreter's path and the host's name into files and file names. These are replaced
by the machine's name, by default that of its GPU or processor, and by the environment's name
`<machine>-py<version>`. A processor's name without a model number, which many cloud machines have,
is refused for storing: `--machine NAME` is needed there. Results are stored in
`benchmarks/results/asv/<machine>/`; `skips.json` there lists the combinations that were not
measured, with reasons.

COMMIT (default HEAD) is extracted from git into a temporary folder and measured there, independent
of local changes and of an installed xprnn; the benchmarks are those of the checkout. Libraries are
limited to one thread. Without git history, `HASH --date DATE` stores results of the checkout's
package as results of that commit. `--bench` selects benchmarks by regular expression, as in asv;
stored results of the commit's other benchmarks are kept. `--quick` measures a few combinations once
each and stores results only with `--out`. `--compare` measures nothing: it prints what two commits
have in the stored results, with the ratio B / A. Exit status: 0 all measured or skipped with a
reason, 1 a benchmark failed.
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

from .common import PEERS, gpu_name, installed
from .compare import NotStoredError, compare
from .result_store import (
    RESULTS,
    ROOT,
    THREADS,
    Commit,
    machine_facts,
    machine_name,
    names_a_model,
    processor,
    store_results,
)

# lines of asv's output, thousands of them, that are not printed
HIDDEN = re.compile(r" n/a *$|asv: skipped|^ *For parameters|· For |^ *$")
QUICK = (  # regular expressions over asv's names with parameters
    r"\.Forward\.\w+\(.*'float32', 'N=8 H=64 T=128'\)",
    r"\.Definition(Forward|Training)\.\w+\(.*'float32', 'N=8 H=64 T=128'\)",
    r"\.(Training|TrainingMemory)\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"^gpu\.(Training)?Launches\.\w+\('gru', .*'float32', 'N=8 H=64 T=128'\)",
    r"\.(Step|Stepper)\.\w+\('gru', .*'float32', 'N=1 H=128'\)",
    r"\.(DemoEpoch|Load)\.\w+\('gru', ",
    r"^programs\.Import\.",
)


def main() -> int:
    options = _options()
    if options.compare:
        return _compare(options)
    if shutil.which("git") is None:
        raise SystemExit("git: not installed; asv needs it, even without git history")
    machine = options.machine or machine_name()
    stores = options.out or not options.quick
    if stores and not (options.machine or gpu_name() or names_a_model(processor())):
        raise SystemExit(
            f"machine: {processor()!r} is the name of many different machines, and their results "
            "must not become one curve; pass --machine NAME, a new name or that of this machine's "
            "earlier results"
        )
    if lacking := [peer for peer in PEERS if not installed((peer,))]:
        print(f"not installed, not measured: {', '.join(lacking)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="xprnn-asv-") as name:
        folder = Path(name)
        tree, commit = folder / "tree", extract_sources(options, folder / "tree")
        print(f"{machine}: measuring {commit.hash[:8]} of {commit.date}", flush=True)
        status = run_asv(folder, tree, commit, machine, options)
        if status not in (0, 2):  # 2: a benchmark failed; its value is null, others are valid
            print(f"asv ended with status {status}", file=sys.stderr)
            return status
        if stores:
            written = store_results(folder, options.out or RESULTS, commit, machine)
            print(f"stored: {written}")
    return 1 if status else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--date", help="date of COMMIT, without git history")
    parser.add_argument("--machine", metavar="NAME", help="default: the GPU's, else the CPU's")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print what both measured")
    parser.add_argument("--quick", action="store_true", help="a few combinations, once each")
    parser.add_argument("--bench", action="append", metavar="REGEX", help="as asv's --bench")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    return parser.parse_args()


def _compare(options: argparse.Namespace) -> int:
    commits = [_resolved(name) for name in options.compare]
    try:
        print(compare(options.out or RESULTS, *commits, options.machine))
    except NotStoredError as error:
        raise SystemExit(f"compare: {error}") from error
    return 0


def _resolved(name: str) -> str:
    """The commit's hash; the name itself where git does not know it."""
    try:
        return _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return name


# -- the package under test


def extract_sources(options: argparse.Namespace, tree: Path) -> Commit:
    """Extract the commit's package into `tree`; SystemExit if that is not possible."""
    if options.date:
        if not re.fullmatch(r"[0-9a-f]{40}", options.commit):
            raise SystemExit(f"commit: with --date expected 40 hex digits, got {options.commit!r}")
        shutil.copytree(ROOT / "xprnn", tree / "xprnn")
        return Commit(options.commit, options.date)
    try:
        fields = _git("log", "-1", "--format=%H %cI", options.commit, "--").decode().split()
        archive = _git("archive", fields[0], "xprnn")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        raise SystemExit(
            f"commit {options.commit}: {reason.decode().strip()}; without git history pass the "
            "40 digits and --date"
        ) from error
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(tree, filter="data")
    return Commit(*fields)


def _git(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, check=True
    ).stdout


# -- the run


def run_asv(
    folder: Path, tree: Path, commit: Commit, machine: str, options: argparse.Namespace
) -> int:
    """asv's exit status; raw results are written to `folder`/raw, skips to `folder`/skips."""
    # a copy, because asv reads the files again for each benchmark during a long run
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
        "HOME": str(folder),  # asv stores its machine file there
        "PYTHONUSERBASE": site.getuserbase(),
        "PYTHONPATH": str(tree),  # for processes started by benchmarks
        "ASV_PYTHONPATH": str(tree),  # for processes started by asv
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
            if not HIDDEN.search(line):
                print(line, end="", flush=True)
    return process.returncode


def _repository(folder: Path, commit: Commit) -> Path:
    """A repository of one empty commit of the same date, which asv requires."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "GIT_CONFIG_GLOBAL": os.devnull,  # the user's may require signatures
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_COMMITTER_DATE": commit.date,
        "GIT_AUTHOR_DATE": commit.date,
    }
    author = ["-c", "user.name=xprnn", "-c", "user.email=xprnn@localhost"]
    for command in (
        ["git", "init", "-q", "-b", "main", str(folder)],
        ["git", "-C", str(folder), *author, "commit", "-q", "--allow-empty", "-m", commit.hash],
    ):
        subprocess.run(command, check=True, env=environment)
    return folder


def _check_measured(tree: Path, environment: dict[str, str]) -> None:
    """SystemExit unless the benchmarks will import the package in `tree`."""
    command = [sys.executable, "-c", "import xprnn; print(xprnn.__file__)"]
    done = subprocess.run(command, cwd=tree.parent, env=environment, capture_output=True, text=True)
    if done.returncode or not Path(done.stdout.strip()).is_relative_to(tree.resolve()):
        raise SystemExit(f"xprnn of this commit: not imported; {done.stdout}{done.stderr}")


if __name__ == "__main__":
    if isinstance(sys.stdout, TextIOWrapper):  # not every encoding has the characters of asv
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
