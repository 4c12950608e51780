"""The tiers of the suite: markers by folder, what a session leaves out, and what it requires.

Every test has `fast` or the marker of another tier. A plain `pytest` runs the fast tier,
`-m "not fast"` all others, `-m ""` everything. Tests that need a CUDA device are left out where
there is none, unless `-m` names `gpu`; tests of frozen kernels run only where `-m` names `frozen`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = {  # in `tests/`, the longest match counts; "fast" or the markers of the folder's tests
    "unit": ("fast",),
    "typing": ("fast",),
    "layers": ("fast",),
    "kernels/cuda/planner": ("fast",),
    "kernels/numba": ("kernels",),
    "kernels/cuda/fake": ("kernels",),
    "kernels/cuda/emulated": ("kernels",),
    "kernels/cuda/compile": ("kernels",),
    "mutation": ("mutation",),
    "tools": ("tools",),
    "endurance": ("endurance",),
    "gpu": ("gpu",),
    "support": ("fast",),  # examples in docstrings
}
OTHERS = {marker for markers in FOLDERS.values() for marker in markers} - {"fast"}
# what takes a test out of the fast tier, whatever its folder
OUT = OTHERS | {"exhaustive", "frozen"}
SLOW = 2.0  # seconds from which a test of the fast tier is listed at the end


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--required",
        metavar="MARKERS",
        default="",
        help="markers, by commas: fail if no test has one of them, or one that has is skipped",
    )


def check_expression(config: pytest.Config) -> None:
    """Refuse names in `-m` and `--required` that no marker has.

    Where files of other tiers are named on the command line and `-m` is not, they run.
    """
    known = {line.partition(":")[0] for line in config.getini("markers")}
    known = {name.partition("(")[0].strip() for name in known}
    names = {*re.findall(r"\w+", config.option.markexpr)} - {"and", "or", "not"}
    if unknown := sorted((names | {*required(config)}) - known):
        raise pytest.UsageError(f"no marker named {', '.join(unknown)}")
    given = config.invocation_params.args
    if hasattr(config, "workerinput") or any(str(option).startswith("-m") for option in given):
        return
    paths = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    if any(tier != ("fast",) for path in paths if (tier := of(path)) and path.exists()):
        config.option.markexpr = ""


def required(config: pytest.Config) -> list[str]:
    return [name for name in config.option.required.split(",") if name]


def of(path: Path) -> tuple[str, ...]:
    """The tier's markers of a file or folder below one of `FOLDERS`, else ()."""
    parents = [path, *path.parents]
    for parent in parents:
        if parent.is_relative_to(TESTS) and str(parent.relative_to(TESTS)) in FOLDERS:
            return FOLDERS[parent.relative_to(TESTS).as_posix()]
    return ()


def is_left_out(path: Path, config: pytest.Config) -> bool:
    """Whether a path holds no test of the fast tier, and nothing else runs."""
    return config.option.markexpr == "fast" and bool(OTHERS & {*of(path)})


def mark(item: pytest.Item) -> None:
    """Add the markers of the folder, and `fast` where no other tier's marker is there."""
    if item.path.is_relative_to(TESTS):
        markers = of(item.path)
        if not markers:
            raise pytest.UsageError(
                f"{item.path.relative_to(TESTS.parent)} is in no tier's folder: {', '.join(FOLDERS)}"
            )
        for marker in OTHERS & {*markers}:
            item.add_marker(marker)
    if not any(item.get_closest_marker(marker) for marker in OUT):
        item.add_marker("fast")


def is_wanted(item: pytest.Item, config: pytest.Config, lacks_device: Callable[[], str]) -> bool:
    """Whether `-m` may select a test at all: see above."""
    named = config.option.markexpr
    if item.get_closest_marker("frozen") and "frozen" not in named:
        return False
    return not (item.get_closest_marker("gpu") and "gpu" not in named and lacks_device())


class Required:
    """A pytest plugin: the tests with a required marker are there, and none of them is skipped."""

    def __init__(self, config: pytest.Config) -> None:
        self._names = [] if hasattr(config, "workerinput") else required(config)
        self._seen: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._slow: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, in the process that the user started."""
        for name in self._names:
            if name in report.keywords:
                self._seen[name] += report.when == "call"
                if report.skipped:
                    self._wrong.append(f"skipped, though {name} is required: {report.nodeid}")
        if report.when == "call" and "fast" in report.keywords and report.duration > SLOW:
            self._slow.append((report.duration, report.nodeid))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail the session where something required is missing."""
        if session.config.option.collectonly:
            return
        self._wrong += [f"no test ran that is {n}" for n in self._names if not self._seen[n]]
        if self._wrong and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List both."""
        for line in self._wrong:
            terminalreporter.write_line(line, red=True)
        for seconds, test in sorted(self._slow, reverse=True):
            terminalreporter.write_line(f"slow for the fast tier, {seconds:.1f} s: {test}")
