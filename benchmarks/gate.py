"""Regression gate: compare key benchmarks with an earlier commit, in three minutes.

    python benchmarks/gate.py [--parent HEAD^] [--only ROW ...] [--pairs 9] [--timeout 30]

The checkout's xprnn and the parent commit's, extracted with `git archive`, run the checkout's
benchmarks, each in its own process on one thread: the plain code, and the default kernels where
Numba is installed. A pair of processes runs ROUNDS interleaved rounds of samples of about SAMPLE
seconds, in alternating order; each round gives one ratio, this commit's time / the parent's.
Several pairs are run, because one process can be slower than another throughout its lifetime (by
3 % typically, 50 % has been observed). Processor time is measured: it excludes other processes and
waiting, and xprnn on one CPU thread does not wait.

A benchmark is slower if the median of its ratios exceeds LIMIT and the lower quartile exceeds 1,
and if both hold again with AGAIN times as many new processes. Equal versions gave medians of 0.95
to 1.05 on two busy cores, so that 1.05 passes and 1.15 fails. The exit status is 1 if a benchmark
is slower or fails with either version; a row that the parent does not support is listed in NEW with
the reason and is not compared. Without a parent nothing is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 1.1  # times the parent's time
PAIRS = 9  # pairs of processes, run sequentially
AGAIN = 2  # factor of the number of pairs in the second measurement
ROUNDS = 10  # per pair
SAMPLE = 4e-3  # seconds
TIMEOUT = 30.0  # seconds allowed for a worker's setup or sample
COMPILATION = 300.0  # seconds allowed for a setup that compiles kernels

PLAIN = ("xprnn-numpy-reference", "float32")
CHOSEN = ("xprnn-numpy-auto", "float32")  # the default kernels, with Numba
GRU_2014 = "gru_reset_before"
# sizes at which the code of a step, not the products around it, takes most of the time
KEY = {
    "gru forward": ("Forward", "time_forward", "gru", *PLAIN, "N=8 H=32 T=32"),
    "gru training": ("Training", "time_training", "gru", *PLAIN, "N=8 H=32 T=32"),
    "gru step": ("Step", "time_100_steps", "gru", *PLAIN, "N=8 H=32"),
    "lstm forward": ("Forward", "time_forward", "lstm", *PLAIN, "N=8 H=32 T=32"),
    "rnn_tanh forward": ("Forward", "time_forward", "rnn_tanh", *PLAIN, "N=8 H=32 T=32"),
    "numba gru forward": ("Forward", "time_forward", "gru", *CHOSEN, "N=8 H=32 T=32"),
    "numba gru training": ("Training", "time_training", "gru", *CHOSEN, "N=8 H=32 T=32"),
    "numba lstm forward": ("Forward", "time_forward", "lstm", *CHOSEN, "N=8 H=32 T=32"),
    "numba lstm training": ("Training", "time_training", "lstm", *CHOSEN, "N=8 H=32 T=32"),
    "numba gru stepper": ("Stepper", "time_100_steps", "gru", *CHOSEN, "N=1 H=32"),
    "numba gru cell": ("Step", "time_100_steps", "gru", *CHOSEN, "N=1 H=32"),
    "numba li_gru forward": ("Forward", "time_forward", "li_gru", *CHOSEN, "N=8 H=32 T=32"),
    "numba li_gru training": ("Training", "time_training", "li_gru", *CHOSEN, "N=8 H=32 T=32"),
    "numba gru_2014 forward": ("Forward", "time_forward", GRU_2014, *CHOSEN, "N=8 H=32 T=32"),
    "numba gru_2014 training": ("Training", "time_training", GRU_2014, *CHOSEN, "N=8 H=32 T=32"),
    "numba gru T=1": ("Forward", "time_forward", "gru", *CHOSEN, "N=1 H=64 T=1"),
}
NEW: dict[str, str] = {}  # rows that the parent does not support, with reasons

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("gate_worker.py")
ONE_THREAD = ("OMP", "OPENBLAS", "MKL", "BLIS")
PARENT, COMMIT = "parent", "commit"  # names of equal length, so that path lengths are equal too
SLOWER = "SLOWER"
ROW = "{:24} {:>9} {:>9}  {:24} {}"


class WorkerError(RuntimeError):
    """A version cannot run a benchmark; the message gives the reason."""

    def __init__(self, version: str, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.version = version
        self.details = details


class Round(NamedTuple):
    """The seconds of one call, with the parent's version and with this commit's."""

    before: float
    after: float


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gate: terminated"))  # ends the workers too
    with tempfile.TemporaryDirectory(prefix="xprnn-gate-") as name:
        versions = Path(name)
        parent, reason = extract_parent(versions / PARENT, options.parent)
        if reason:
            print(f"gate: passed, there is no parent commit to compare with: {reason}")
            return 0
        shutil.copytree(ROOT / "xprnn", versions / COMMIT / "xprnn")  # with its compiled kernels
        print(f"gate: this checkout against {options.parent}, {parent}; a call in microseconds")
        print(ROW.format("benchmark", "before", "after", "ratio (quartiles)", "verdict"))
        bad = [
            key
            for key in options.only
            if not _passes(key, versions, options.pairs, options.timeout)
        ]
    if bad:
        print(f"gate: failed: {', '.join(bad)}")
        return 1
    print(f"gate: passed, nothing is clearly slower than {LIMIT} times the parent")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parent", metavar="REV", default="HEAD^", help="commit to compare with; default HEAD^"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="ROW", choices=KEY, default=[*KEY], help="benchmarks to run"
    )
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help=f"of processes per benchmark; default {PAIRS}"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help=f"seconds allowed for a worker's reply; default {TIMEOUT:g}",
    )
    options = parser.parse_args()
    if options.pairs < 1 or not options.timeout > 0:
        parser.error("--pairs and --timeout: expected positive numbers")
    return options


def extract_parent(folder: Path, revision: str) -> tuple[str, str]:
    """Extract xprnn at `revision` into `folder`; returns the commit and "", or "" and a reason.

    Only HEAD^ may be missing. SystemExit if git fails for another reason or the revision is
    unknown: the gate must not pass then.
    """
    if shutil.which("git") is None:
        return "", "git is not installed"
    if not (ROOT / ".git").exists():
        return "", "not a git repository"
    head = _git("rev-parse", "--verify", "HEAD^0")
    parsed = _git("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}", ok=(0, 1))
    if parsed.returncode and revision == "HEAD^":
        commit = head.stdout.decode().strip()[:12]
        return "", f"{commit} is the first commit, or the first of a shallow clone"
    if parsed.returncode:
        sys.exit(f"gate: --parent: expected a commit, got {revision!r}")
    done = _git("archive", revision, "xprnn")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
        return archive.pax_headers["comment"][:12], ""  # git writes the commit there


def _git(*arguments: str, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode not in ok:
        message = done.stderr.decode(errors="replace").strip()
        sys.exit(f"gate: git {' '.join(arguments)}: {message}")
    return done


def _passes(key: str, versions: Path, pairs: int, timeout: float) -> bool:
    """Measure a benchmark and print its row; returns whether it passes."""
    try:
        if CHOSEN[0] in KEY[key]:
            compile_kernels(KEY[key], versions)
        rounds, verdict = decide(lambda pairs: measure(KEY[key], versions, pairs, timeout), pairs)
    except WorkerError as error:
        expected = error.version == PARENT and key in NEW
        failure = f"FAILS on the {error.version}: {error}"
        text = f"not compared: {NEW[key]}" if expected else failure
        print(ROW.format(key, "-", "-", "-", text), flush=True)
        if not expected:
            print(error.details, end="", file=sys.stderr, flush=True)
        return expected
    before, after = (statistics.median(times) * 1e6 for times in zip(*rounds, strict=True))
    low, middle, high = quartiles(rounds)
    ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    print(ROW.format(key, f"{before:.1f}", f"{after:.1f}", ratio, verdict), flush=True)
    return verdict != SLOWER


def decide(measure: Callable[[int], Sequence[Round]], pairs: int) -> tuple[Sequence[Round], str]:
    """Apply the rule; returns the last measurement and the verdict.

    :param measure: called with a number of pairs.
    """
    rounds = measure(pairs)
    if not is_slower(rounds):
        return rounds, "ok"
    rounds = measure(AGAIN * pairs)
    return rounds, SLOWER if is_slower(rounds) else "ok, measured again"


def quartiles(rounds: Sequence[Round]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of the rounds' ratios."""
    ratios = [after / before for before, after in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def is_slower(rounds: Sequence[Round]) -> bool:
    """Whether one measurement indicates a regression; the rule requires two."""
    low, middle, _ = quartiles(rounds)
    return middle > LIMIT and low > 1.0


def compile_kernels(benchmark: Sequence[str], versions: Path) -> None:
    """Run a benchmark's setup with both versions, which cache compiled code beside their sources.

    :raises WorkerError: a version cannot run it; names this commit if neither can.
    """
    with (
        Worker(versions, PARENT, benchmark, COMPILATION) as parent,
        Worker(versions, COMMIT, benchmark, COMPILATION) as commit,
    ):
        commit.reply()
        parent.reply()


def measure(benchmark: Sequence[str], versions: Path, pairs: int, timeout: float) -> list[Round]:
    """Run a benchmark with both versions in interleaved rounds, in `pairs` pairs of new processes.

    :raises WorkerError: a version cannot run it; names this commit if neither can.
    """
    rounds = []
    for _ in range(pairs):
        with (
            Worker(versions, PARENT, benchmark, timeout) as parent,
            Worker(versions, COMMIT, benchmark, timeout) as commit,
        ):
            number = math.ceil(SAMPLE / max(commit.reply(), parent.reply()))
            for count in range(ROUNDS):
                order = (parent, commit) if count % 2 else (commit, parent)
                seconds = {worker.version: worker.time(number) for worker in order}
                rounds.append(Round(seconds[PARENT], seconds[COMMIT]))
    return rounds


class Worker:
    """A process that runs one benchmark with one version; it ends with the `with` block."""

    def __init__(
        self, versions: Path, version: str, benchmark: Sequence[str], timeout: float
    ) -> None:
        self.version = version
        self._timeout = timeout
        folder = versions / version
        path = os.environ.get("PYTHONPATH")
        paths = [str(folder), str(ROOT), *([path] if path else [])]
        # -P: do not search the worker script's folder; faulthandler: traceback of a crash
        command = [sys.executable, "-P", "-X", "faulthandler", str(WORKER), str(folder), *benchmark]
        self._process = subprocess.Popen(
            command,
            bufsize=0,  # so that `select` sees all data
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env={
                **os.environ,
                **{f"{name}_NUM_THREADS": "1" for name in ONE_THREAD},
                "PYTHONPATH": os.pathsep.join(paths),
            },
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:  # close the pipes and wait
            pass

    def time(self, number: int) -> float:
        """The seconds per call, of `number` calls; WorkerError as for `reply`."""
        with contextlib.suppress(BrokenPipeError):  # the worker has died: `reply` raises
            self._process.stdin.write(b"%d\n" % number)
        return self.reply()

    def reply(self) -> float:
        """The seconds reported by the worker.

        :raises WorkerError: it reports an error, has died, or does not reply in time.
        """
        if not select.select([self._process.stdout], [], [], self._timeout)[0]:
            self._process.send_signal(signal.SIGABRT)  # faulthandler prints where it hangs
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            raise WorkerError(self.version, f"no answer in {self._timeout:g} s, see above")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(self.version, f"its process died with status {status}, see above")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(self.version, reply["error"], reply["traceback"])
        return float(reply["seconds"])


if __name__ == "__main__":
    sys.exit(main())
