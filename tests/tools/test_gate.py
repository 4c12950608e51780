"""`benchmarks/gate.py`, run as a user would in small repositories with faults in xprnn."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/gate.py"
# the rows of the plain code; those with Numba, which compile first, have a test of their own
KEYS = {"gru forward", "gru training", "gru step", "lstm forward", "rnn_tanh forward"}
ONLY = ("--only", *sorted(KEYS))
LSTM = "xprnn/cells/lstm.py"

SLOW = """
def _slow(part):
    import time
    from functools import partial

    def slow(call):
        def slower(*arguments, **named):
            start = time.process_time()
            call(*arguments, **named)
            end = time.process_time()
            while time.process_time() - end < 0.5 * (end - start):
                pass

        return slower

    def injected(cell, xp, *arguments):
        calls = getattr(xp, "_calls", None)
        if calls is None:
            slow(part)(cell, xp, *arguments)
        else:  # its calls are captured, and run later
            first = len(calls)
            part(cell, xp, *arguments)
            calls[first:] = [
                partial(slow(call.func), *call.args, **call.keywords) for call in calls[first:]
            ]

    return injected

GRU.{part} = _slow(GRU.{part})
"""
FAULTY = """
import os, signal
def injected(*arguments):
    {fault}
LSTM.forward_gates = injected
"""

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository whose only commit is this checkout's xprnn and benchmarks."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("xprnn", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    git(folder, "init", "--quiet")
    commit(folder)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """A user's, but with settings of git and a folder for temporary files of its own."""
    temporary = folder.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    ours = {
        "TMPDIR": str(temporary),
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return theirs | ours


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def commit(folder: Path, changed: str = "", appended: str = "") -> None:
    """Commit everything, after `appended` has been added to the file `changed`."""
    if changed:
        with (folder / changed).open("a") as file:
            file.write(appended)
    git(folder, "add", "--all", "--force")
    git(folder, "commit", "--quiet", "--message", "injected", "--allow-empty")


def run(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the gate to its end, and check that it leaves nothing behind."""
    done = subprocess.run(
        [sys.executable, SCRIPT, *options],
        cwd=folder,
        env=environment(folder) | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert not list(leftovers(folder))
    return done


def leftovers(folder: Path) -> Iterator[str]:
    """The processes, on Linux, and the files of gates that have ended."""
    temporary = folder.parent / "temporary"
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):  # has ended since
            continue
        if str(temporary) in command:
            yield command
    yield from (str(path) for path in temporary.iterdir())


def verdicts(printed: str) -> dict[str, str]:
    """The verdict on each benchmark in the gate's table."""
    table = printed.splitlines()[2:-1]
    return {line[:24].strip(): line[71:] for line in table}


def failed(printed: str) -> set[str]:
    """What the last line names."""
    return set(printed.splitlines()[-1].removeprefix("gate: failed: ").split(", "))


@pytest.mark.parametrize(
    ("part", "slower"),
    [
        ("forward_gates", {"gru forward", "gru training", "gru step"}),
        ("backward_gates", {"gru training"}),
    ],
)
def test_detects_a_kernel_that_takes_half_as_long_again(
    folder: Path, part: str, slower: set[str]
) -> None:
    commit(folder, "xprnn/cells/gru.py", SLOW.format(part=part))
    done = run(folder, *ONLY)
    assert done.returncode == 1, done.stdout + done.stderr
    assert failed(done.stdout) == slower, done.stdout
    verdict_of = verdicts(done.stdout)
    assert verdict_of.keys() == KEYS
    assert {key for key, verdict in verdict_of.items() if verdict == "SLOWER"} == slower


def test_numba_rows_and_an_older_parent(folder: Path) -> None:
    pytest.importorskip("numba")
    slow = (
        "\ndef _slow(step):\n    import time\n\n    def slower(*arguments, **named):\n"
        "        start = time.process_time()\n        y = step(*arguments, **named)\n"
        "        end = time.process_time()\n"
        "        while time.process_time() - end < 0.5 * (end - start):\n            pass\n"
        "        return y\n\n    return slower\n\nStepper.step = _slow(Stepper.step)\n"
    )
    commit(folder, "xprnn/nn/stepper.py", slow)
    commit(folder)
    rows = ("--only", "numba gru stepper", "numba gru training", "--pairs", "3")
    done = run(folder, *rows, "--parent", "HEAD~2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert failed(done.stdout) == {"numba gru stepper"}, done.stdout
    done = run(folder, "--only", "numba gru stepper", "--pairs", "3")
    assert done.returncode == 0, done.stdout + done.stderr  # HEAD^ is as slow


def test_an_unknown_parent(folder: Path) -> None:
    done = run(folder, "--parent", "nowhere")
    assert done.returncode == 1 and "--parent: expected a commit, got 'nowhere'" in done.stderr


def test_passes_ten_times_without_a_fault(folder: Path) -> None:
    # with a third of the pairs, which is harder: medians of fewer processes lie further from 1
    commit(folder, "xprnn/cells/gru.py", "# nothing\n")
    for _ in range(10):
        done = run(folder, *ONLY, "--pairs", "3")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1].startswith("gate: passed, nothing is clearly slower")
        verdict_of = verdicts(done.stdout)
        assert verdict_of.keys() == KEYS
        assert all(verdict.startswith("ok") for verdict in verdict_of.values()), done.stdout


def test_no_parent(folder: Path) -> None:
    nothing = "gate: passed, there is no parent commit to compare with: "
    done = run(folder)
    assert done.returncode == 0 and done.stdout.startswith(nothing), done.stdout + done.stderr
    assert "is the first commit" in done.stdout

    commit(folder)
    shallow = folder.with_name("shallow")
    git(folder, "clone", "--quiet", "--depth", "1", f"file://{folder}", str(shallow))
    done = run(shallow)
    assert done.returncode == 0 and done.stdout.startswith(nothing), done.stdout + done.stderr

    done = run(folder, PATH=str(folder))
    assert done.returncode == 0 and done.stdout == f"{nothing}git is not installed\n"

    shutil.rmtree(folder / ".git")
    done = run(folder)
    assert done.returncode == 0 and done.stdout.startswith(nothing), done.stdout + done.stderr
    assert "not a git repository" in done.stdout


def test_a_failure_of_git_is_not_a_missing_parent(folder: Path) -> None:
    commit(folder)
    done = run(folder, GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert done.returncode == 1 and "dubious ownership" in done.stderr, done.stdout + done.stderr
    tree = git(folder, "rev-parse", "HEAD^:xprnn")
    (folder / ".git" / "objects" / tree[:2] / tree[2:]).unlink()
    done = run(folder)
    assert done.returncode == 1 and "gate: git archive HEAD^ xprnn: " in done.stderr


def test_a_parent_without_what_a_benchmark_needs(folder: Path) -> None:
    source = (folder / "xprnn/__init__.py").read_text()
    commit(folder, "xprnn/__init__.py", "del LSTM\n")
    (folder / "xprnn/__init__.py").write_text(source)
    commit(folder)
    done = run(folder, *ONLY, "--pairs", "3")
    assert done.returncode == 1 and failed(done.stdout) == {"lstm forward"}, done.stdout
    verdict_of = verdicts(done.stdout)
    message = verdict_of.pop("lstm forward")
    assert message.startswith("FAILS on the parent: AttributeError: ") and "'LSTM'" in message
    assert all(verdict.startswith("ok") for verdict in verdict_of.values()), done.stdout

    script = folder / SCRIPT
    script.write_text(
        script.read_text().replace(
            "NEW: dict[str, str] = {}", 'NEW = {"lstm forward": "came with this commit"}'
        )
    )
    done = run(folder, "--only", "lstm forward", "--pairs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done.stdout) == {"lstm forward": "not compared: came with this commit"}


def test_a_parent_that_cannot_be_imported(folder: Path) -> None:
    source = (folder / "xprnn/__init__.py").read_text()
    commit(folder, "xprnn/__init__.py", "raise ImportError('half an idea')\n")
    (folder / "xprnn/__init__.py").write_text(source)
    commit(folder)
    done = run(folder, *ONLY, "--pairs", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    message = "FAILS on the parent: ImportError: half an idea"
    assert verdicts(done.stdout) == dict.fromkeys(KEYS, message)


def test_a_commit_that_does_not_run(folder: Path) -> None:
    commit(folder, "xprnn/__init__.py", "del LSTM\n")
    done = run(folder, *ONLY, "--pairs", "1")
    assert done.returncode == 1
    assert "lstm forward" in failed(done.stdout)
    assert verdicts(done.stdout)["lstm forward"].startswith("FAILS on the commit: AttributeError: ")
    assert "Traceback" in done.stderr and "benchmarks/implementations.py" in done.stderr


@pytest.mark.parametrize(
    ("fault", "message", "written"),
    [
        ("while True: pass", "no answer in 5 s, see above", "in injected"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "no answer in 5 s, see above", ""),
        ("os._exit(7)", "its process died with status 7, see above", ""),
        ("os.kill(os.getpid(), 11)", "its process died with status -11, see above", "in injected"),
    ],
    ids=["hangs", "stops", "exits", "crashes"],
)
def test_a_worker_that_does_not_answer(
    folder: Path, fault: str, message: str, written: str
) -> None:
    commit(folder, LSTM, FAULTY.format(fault=fault))
    done = run(folder, *ONLY, "--pairs", "1", "--timeout", "5")
    assert done.returncode == 1
    assert "lstm forward" in failed(done.stdout)
    assert verdicts(done.stdout)["lstm forward"] == f"FAILS on the commit: {message}"
    assert written in done.stderr


def test_a_parent_that_hangs(folder: Path) -> None:
    source = (folder / LSTM).read_text()
    commit(folder, LSTM, FAULTY.format(fault="while True: pass"))
    (folder / LSTM).write_text(source)
    commit(folder)
    done = run(folder, *ONLY, "--pairs", "3", "--timeout", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    message = "FAILS on the parent: no answer in 5 s, see above"
    assert verdicts(done.stdout)["lstm forward"] == message


def test_another_xprnn_than_the_measured_one_is_refused(folder: Path) -> None:
    commit(folder, "xprnn/__init__.py", "__file__ = '/elsewhere/xprnn/__init__.py'\n")
    done = run(folder, *ONLY, "--pairs", "1")
    assert done.returncode == 1 and failed(done.stdout) == KEYS
    assert "gate: xprnn was imported from /elsewhere/xprnn, expected " in done.stderr


def test_leaves_nothing_when_it_is_terminated(folder: Path) -> None:
    commit(folder, LSTM, FAULTY.format(fault="while True: pass"))
    command = [sys.executable, SCRIPT, *ONLY, "--pairs", "1"]
    log = folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=folder, env=environment(folder), stderr=file) as process,
    ):
        end = time.monotonic() + 60
        while not any("gate_worker.py" in each and "lstm" in each for each in leftovers(folder)):
            if time.monotonic() > end or process.poll() is not None:
                break
            time.sleep(0.05)
        process.terminate()
    assert "gate: terminated" in log.read_text()
    assert not list(leftovers(folder))


@pytest.mark.parametrize("option", ["--pairs", "--timeout"])
def test_bad_options(folder: Path, option: str) -> None:
    done = run(folder, option, "0")
    assert done.returncode == 2 and option in done.stderr
