"""The tiers of the suite: markers by folder, and the tests that a session excludes or requires.

Every test has the marker `fast` or that of another tier. `pytest` runs the fast tier,
`-m "not fast"` all others, `-m ""` everything. Tests that need a CUDA device are deselected without
one, unless `-m` names `gpu`; tests of frozen kernels run only if `-m` names `frozen`.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = {  # in `tests/`: the tier of the tests in them, longer paths first
    "unit": "fast",
    "layers": "fast",
    "typing": "fast",
    "support": "fast",  # examples in docstrings
    "kernels/cuda/planner": "fast",
    "kernels/cuda/fake": "kernels",
    "kernels/cuda/emulated": "kernels",
    "kernels/cuda/compile": "kernels",
    "kernels/numba": "kernels",
    "mutation": "mutation",
    "tools": "tools",
    "endurance": "endurance",
    "gpu": "gpu",
}
FUNCTIONS = {  # tests of a tier other than their folder's
    "kernels/cuda/planner/test_bidirectional_plans.py::test_every_choice_fits": "exhaustive",
    "kernels/cuda/planner/test_plan.py::test_every_choice_fits": "exhaustive",
    "layers/test_defined_layers.py::test_diagnostics": "kernels",  # of all implementations
    "layers/test_gradcheck.py::test_an_injected_fault_is_detected": "mutation",
    "layers/test_recompute.py::test_segments_with_the_sequence_kernels_of_a_gpu": "kernels",
    # ONNX Runtime is not one of the fast tier's packages
    "layers/test_shipped_cells.py::test_definitions_equal_onnx_runtime": "kernels",
    "layers/test_recorded_calls.py::test_skipped_batches_leave_no_memory": "endurance",
    "unit/test_random_definitions.py::test_gradients_of_many_random_definitions": "exhaustive",
    "gpu/test_smoke.py::test_there_is_a_kind_for_every_kernel": "kernels",
}
# markers that take a test out of the fast tier
OWN = ("kernels", "mutation", "tools", "endurance", "exhaustive", "gpu", "frozen")
SLOW = 2.0  # seconds; slower tests of the fast tier are listed at the end


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--required",
        metavar="MARKERS",
        default="",
        help="markers, separated by commas: fail if no test of one runs, or one is skipped",
    )
    parser.addoption(
        "--allow-skip",
        metavar="TEXT",
        action="append",
        default=[],
        help="allow required tests to be skipped for a reason that contains this text",
    )


def required(config: pytest.Config) -> list[str]:
    return [name for name in config.option.required.split(",") if name]


def check_expression(config: pytest.Config) -> None:
    """Refuse unknown markers in `-m` and `--required`."""
    known = {re.match(r"\w*", line)[0] for line in config.getini("markers")}
    names = {*re.findall(r"\w+", config.option.markexpr)} - {"and", "or", "not"}
    if unknown := sorted((names | {*required(config)}) - known):
        raise pytest.UsageError(f"no marker named {', '.join(unknown)}")


def run_what_is_named(config: pytest.Config) -> None:
    """Without `-m`, run the files named on the command line, whatever their tier."""
    options = config.invocation_params.args
    if any(str(word).startswith("-m") for word in options):
        return
    named = [Path(config.invocation_params.dir, word.partition("::")[0]) for word in config.args]
    if any(tier_of(path.resolve()) not in ("fast", "") for path in named):
        config.option.markexpr = ""


def tier_of(path: Path) -> str:
    """The tier of a file or folder by its path, or ""."""
    if not path.is_relative_to(TESTS):
        return ""
    parts = path.relative_to(TESTS).parts
    ancestors = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((FOLDERS[path] for path in ancestors if path in FOLDERS), "")


def is_left_out(path: Path, config: pytest.Config) -> bool:
    """Whether only the fast tier runs and a path has no tests of it, so that it is not imported."""
    return config.option.markexpr == "fast" and tier_of(path) not in ("fast", "")


def mark(items: list[pytest.Item]) -> None:
    """Add the tier's marker to each test.

    :raises pytest.UsageError: a file is in no tier's folder.
    """
    for item in items:
        if item.path.is_relative_to(TESTS):
            item.add_marker(_tier(item))
        elif _own(item) is None:  # examples in the package's docstrings
            item.add_marker("fast")


def _tier(item: pytest.Item) -> str:
    name = item.path.relative_to(TESTS).as_posix()
    tier = tier_of(item.path)
    if not tier:
        raise pytest.UsageError(f"tests/{name} is in no tier's folder: {', '.join(FOLDERS)}")
    tier = FUNCTIONS.get(f"{name}::{getattr(item, 'originalname', '')}", tier)
    if tier in ("fast", "gpu") and item.get_closest_marker("compiler"):
        return "kernels"  # emulated
    return (_own(item) or tier) if tier == "fast" else tier


def _own(item: pytest.Item) -> str | None:
    return next((name for name in OWN if item.get_closest_marker(name)), None)


def check_functions(items: list[pytest.Item], config: pytest.Config) -> None:
    """Refuse unknown tests in `FUNCTIONS`, if all tests of their files are collected.

    :raises pytest.UsageError: an entry names no test.
    """
    collected = {
        f"{item.path.relative_to(TESTS).as_posix()}::{getattr(item, 'originalname', '')}"
        for item in items
        if item.path.is_relative_to(TESTS)
    }
    files = {name.partition("::")[0] for name in collected}
    names = [name for name in FUNCTIONS if name.partition("::")[0] in files]
    all_collected = not any("::" in word for word in config.args)
    if all_collected and (missing := [name for name in names if name not in collected]):
        raise pytest.UsageError(f"no test named {', '.join(missing)}: tests/support/tiers.py")


def is_wanted(item: pytest.Item, config: pytest.Config, lacks_device: Callable[[], str]) -> bool:
    """Whether `-m` may select a test.

    A frozen test only if `-m` names `frozen`; a test that needs a device only if there is one or
    `-m` names `gpu`.
    """
    named = config.option.markexpr
    if item.get_closest_marker("frozen") and "frozen" not in named:
        return False
    return not (item.get_closest_marker("gpu") and "gpu" not in named and lacks_device())


def skip_without_compiler(item: pytest.Item) -> None:
    """Skip a test marked `compiler` if there is no compiler."""
    if item.get_closest_marker("compiler") and shutil.which("g++") is None:
        pytest.skip("there is no g++ to compile the kernels for the host")


class Required:
    """A pytest plugin that fails unless tests with each required marker run, none of them skipped.

    It also lists slow tests of the fast tier.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._names = [] if hasattr(config, "workerinput") else required(config)
        self._allowed: list[str] = config.option.allow_skip
        self._ran: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._slow: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, in the process that the user started."""
        for name in self._names:
            if name in report.keywords:
                self._ran[name] += report.when == "call"
                if report.skipped and not any(
                    text in str(report.longrepr) for text in self._allowed
                ):
                    self._wrong.append(f"skipped, but {name} is required: {report.nodeid}")
        if report.when == "call" and "fast" in report.keywords and report.duration > SLOW:
            self._slow.append((report.duration, report.nodeid))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail the session if a required test is missing."""
        if not session.config.option.collectonly:
            self._wrong += [f"no test ran that is {n}" for n in self._names if not self._ran[n]]
        if self._wrong and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """List missing and slow tests."""
        for line in self._wrong:
            terminalreporter.write_line(line, red=True)
        for seconds, test in sorted(self._slow, reverse=True)[:20]:
            terminalreporter.write_line(f"slow for the fast tier, {seconds:.1f} s: {test}")
