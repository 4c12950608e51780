"""Is this checkout slower than a commit before it? Key benchmarks, side by side, in three minutes.

    python benchmarks/gate.py [--parent HEAD^] [--only ROW ...] [--pairs 9] [--timeout 30]

The checkout's xprnn and the parent commit's, taken with `git archive`, run the checkout's own
benchmarks, each in a process of its own on one thread: the plain code, and what users run where
Numba is installed, with the kernels that xprnn chooses by itself. A pair of processes takes ROUNDS
rounds: each side runs a sample of about SAMPLE seconds, one side first in one round and the other
in the next, and a round gives one ratio, this commit's time over the parent's. New pairs follow,
because a process may be slower than its twin for as long as it lives (3 % as a rule, 50 % was
seen). Time is that of the processor: other processes do not count, and neither does waiting, but
xprnn on one thread of a CPU waits for nothing.

The rule: a benchmark is slower if the median of its ratios is over LIMIT and their lower quartile
over 1, and if both are so again with new processes, AGAIN times as many. Equal sides gave medians
of 0.95 to 1.05 on two busy cores, so that 1.05 passes and 1.15 does not. The exit status is 1 if
a benchmark is slower or does not run, on either side; a row that the parent cannot run yet is
listed in NEW with the reason, and is not compared. Without a parent nothing is compared.
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
PAIRS = 9  # of processes, one after the other
AGAIN = 2  # times as many pairs before a benchmark is called slower
ROUNDS = 10  # of a pair
SAMPLE = 4e-3  # seconds
TIMEOUT = 30.0  # seconds that a worker may take for its setup, or for a sample
COMPILATION = 300.0  # seconds that it may take for a setup that compiles kernels

PLAIN = ("xprnn-numpy-reference", "float32")
CHOSEN = ("xprnn-numpy-auto", "float32")  # Numba's kernels, as xprnn chooses them by itself
# sizes at which the code of a step, not the products around it, is most of the time
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
    "numba gru T=1": ("Forward", "time_forward", "gru", *CHOSEN, "N=1 H=64 T=1"),
}
NEW: dict[str, str] = {}  # rows that the parent cannot run yet, and why

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("gate_worker.py")
ONE_THREAD = ("OMP", "OPENBLAS", "MKL", "BLIS")
PARENT, COMMIT = "parent", "commit"  # names of one length: paths decide nothing either
SLOWER = "SLOWER"
ROW = "{:20} {:>9} {:>9}  {:24} {}"


class WorkerError(RuntimeError):
    """A side cannot run a benchmark; the message says why."""

    def __init__(self, side: str, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.side = side
        self.details = details


class Round(NamedTuple):
    """The seconds that one call took on either side."""

    before: float
    after: float


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gate: terminated"))  # ends the workers too
    with tempfile.TemporaryDirectory(prefix="xprnn-gate-") as name:
        sides = Path(name)
        parent, reason = take_parent(sides / PARENT, options.parent)
        if reason:
            print(f"gate: passed, there is no parent commit to compare with: {reason}")
            return 0
        shutil.copytree(ROOT / "xprnn", sides / COMMIT / "xprnn")  # with the kernels compiled there
        print(f"gate: this checkout against {options.parent}, {parent}; a call in microseconds")
        print(ROW.format("benchmark", "before", "after", "ratio (quartiles)", "verdict"))
        bad = [
            key for key in options.only if not _passes(key, sides, options.pairs, options.timeout)
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
        help=f"seconds that a worker may take to answer; default {TIMEOUT:g}",
    )
    options = parser.parse_args()
    if options.pairs < 1 or not options.timeout > 0:
        parser.error("--pairs and --timeout: expected more than 0")
    return options


def take_parent(folder: Path, revision: str) -> tuple[str, str]:
    """Put the xprnn of commit `revision` into `folder`: the commit, and why there is none or "".

    Only HEAD^ may be missing. SystemExit where git fails for another reason, or does not know the
    revision: the gate must not pass for that.
    """
    if shutil.which("git") is None:
        return "", "git is not installed"
    if not (ROOT / ".git").exists():
        return "", "not a git repository"
    head = _git("rev-parse", "--verify", "HEAD^0")
    found = _git("rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}", ok=(0, 1))
    if found.returncode and revision == "HEAD^":
        commit = head.stdout.decode().strip()[:12]
        return "", f"{commit} is the first commit, or the first that a shallow clone has"
    if found.returncode:
        sys.exit(f"gate: --parent: expected a commit, got {revision!r}")
    done = _git("archive", revision, "xprnn")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
        return archive.pax_headers["comment"][:12], ""  # git's archives name their commit there


def _git(*arguments: str, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode not in ok:
        said = done.stderr.decode(errors="replace").strip()
        sys.exit(f"gate: git {' '.join(arguments)}: {said}")
    return done


def _passes(key: str, sides: Path, pairs: int, timeout: float) -> bool:
    """Measure a benchmark, print its row, and say whether the gate lets it through."""
    try:
        if CHOSEN[0] in KEY[key]:
            compile_kernels(KEY[key], sides)
        rounds, verdict = judge(lambda pairs: measure(KEY[key], sides, pairs, timeout), pairs)
    except WorkerError as error:
        expected = error.side == PARENT and key in NEW
        said = f"not compared: {NEW[key]}" if expected else f"FAILS on the {error.side}: {error}"
        print(ROW.format(key, "-", "-", "-", said), flush=True)
        if not expected:
            print(error.details, end="", file=sys.stderr, flush=True)
        return expected
    before, after = (statistics.median(times) * 1e6 for times in zip(*rounds, strict=True))
    low, middle, high = quartiles(rounds)
    ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    print(ROW.format(key, f"{before:.1f}", f"{after:.1f}", ratio, verdict), flush=True)
    return verdict != SLOWER


def judge(measured: Callable[[int], Sequence[Round]], pairs: int) -> tuple[Sequence[Round], str]:
    """Apply the rule: the last measurement and the verdict. `measured` takes a number of pairs."""
    rounds = measured(pairs)
    if not is_slower(rounds):
        return rounds, "ok"
    rounds = measured(AGAIN * pairs)
    return rounds, SLOWER if is_slower(rounds) else "ok, measured again"


def quartiles(rounds: Sequence[Round]) -> tuple[float, float, float]:
    """Of the rounds' ratios: a quarter of them is below the first, half below the second."""
    ratios = [after / before for before, after in rounds]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def is_slower(rounds: Sequence[Round]) -> bool:
    """Whether one measurement is evidence against this commit; the rule asks for two."""
    low, middle, _ = quartiles(rounds)
    return middle > LIMIT and low > 1.0


def compile_kernels(benchmark: Sequence[str], sides: Path) -> None:
    """Run a benchmark's setup on both sides, each of which keeps what is compiled beside its code.

    :raises WorkerError: a side cannot run it; this commit, if neither can.
    """
    with (
        Worker(sides, PARENT, benchmark, COMPILATION) as parent,
        Worker(sides, COMMIT, benchmark, COMPILATION) as commit,
    ):
        commit.reply()
        parent.reply()


def measure(benchmark: Sequence[str], sides: Path, pairs: int, timeout: float) -> list[Round]:
    """Run a benchmark on both sides in turns, in `pairs` pairs of new processes.

    :raises WorkerError: a side cannot run it; this commit, if neither can.
    """
    rounds = []
    for _ in range(pairs):
        with (
            Worker(sides, PARENT, benchmark, timeout) as parent,
            Worker(sides, COMMIT, benchmark, timeout) as commit,
        ):
            number = math.ceil(SAMPLE / max(commit.reply(), parent.reply()))
            for turn in range(ROUNDS):
                order = (parent, commit) if turn % 2 else (commit, parent)
                seconds = {worker.side: worker.time(number) for worker in order}
                rounds.append(Round(seconds[PARENT], seconds[COMMIT]))
    return rounds


class Worker:
    """A process that runs one benchmark on one side's xprnn; it ends with the `with` block."""

    def __init__(self, sides: Path, side: str, benchmark: Sequence[str], timeout: float) -> None:
        self.side = side
        self._timeout = timeout
        folder = sides / side
        before = os.environ.get("PYTHONPATH")
        paths = [str(folder), str(ROOT), *([before] if before else [])]
        # -P: the worker's own folder is not searched; faulthandler: a crash says where
        command = [sys.executable, "-P", "-X", "faulthandler", str(WORKER), str(folder), *benchmark]
        self._process = subprocess.Popen(
            command,
            bufsize=0,  # so that `select` sees all that there is
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
        with self._process:  # closes the pipes and waits
            pass

    def time(self, number: int) -> float:
        """The seconds of one call, of `number` calls; WorkerError as `reply`."""
        with contextlib.suppress(BrokenPipeError):  # a worker that has died: `reply` says so
            self._process.stdin.write(b"%d\n" % number)
        return self.reply()

    def reply(self) -> float:
        """The seconds that the worker reports.

        :raises WorkerError: it reports an error, has died, or says nothing in time.
        """
        if not select.select([self._process.stdout], [], [], self._timeout)[0]:
            self._process.send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            raise WorkerError(self.side, f"no answer in {self._timeout:g} s, see above")
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(self.side, f"its process died with status {status}, see above")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(self.side, reply["error"], reply["traceback"])
        return float(reply["seconds"])


if __name__ == "__main__":
    sys.exit(main())
