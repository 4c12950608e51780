"""A pytest plugin that writes a report of the tests marked `gpu` to `benchmarks/results/`.

After a session in which such tests ran on a device it writes a JSON file and a short Markdown
file: the device, versions, counts, and for each dtype the largest error with its test. A session
with only a part of the suite writes to a separate file, so that it does not replace the report of
the complete suite. It also works with pytest-xdist.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support import tolerances
from tests.support.machine import Description, commit, describe_device, digest, versions
from xprnn.nn.serialization import replacing

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
CRASHED = "???"  # the phase in xdist's report of a process that ended within a test
ERRORS, IMPLEMENTATION = "gpu errors", "implementation"  # properties of a test's report


class GpuReport:
    """The plugin. `describe` returns the description of the device, or None.

    `forced` names the only kernels under test, or is "" for all.
    """

    def __init__(
        self,
        config: pytest.Config,
        describe: Callable[[], Description | None] = describe_device,
        folder: Path = RESULTS,
        forced: str = "",
    ) -> None:
        self._config = config
        self._forced = forced
        self._describe = cache(describe)
        self._folder = folder
        self._start = time.monotonic()
        self._seen = Seen()
        self._message = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Report warnings, as of a new CuPy, NumPy or torch, instead of failing on them."""
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.filterwarnings("default"))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str) -> None:
        """Count warnings by their first line."""
        if when == "runtest":
            self._seen.add_warning(warning_message)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Add the errors of a test to its report, which xdist sends to its main process."""
        if item.get_closest_marker("gpu") is None:
            return (yield)
        compared: list[tuple[str, float, float, str]] = []

        def record(*comparison: Any) -> None:
            compared.append(comparison)

        tolerances.listeners.append(record)
        passed = False
        try:
            result = yield
            passed = True
            return result
        finally:
            tolerances.listeners.remove(record)
            # in a test that passes, an error out of bounds is due to an injected fault
            largest = worst([c for c in compared if not passed or c[1] <= c[2]])
            item.user_properties.append((ERRORS, largest))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count, in the process that the user started."""
        if hasattr(self._config, "workerinput"):
            return
        if "gpu" in report.keywords:
            if report.when == "setup" and report.passed:
                self._describe()  # while the device still works
            self._seen.add(report)
        elif report.when == CRASHED and not self._seen.knows(report.nodeid):
            self._seen.add(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the files if a test ran on a device."""
        if not self._seen.ran:
            return
        device = self._describe()
        if device is None:
            self._message = "nothing written: tests marked gpu ran, but there is no device"
            return
        ended = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        left_out = "it was interrupted" if ended or session.shouldfail else part_of(self._config)
        report = {
            "whole_suite": not left_out,
            "left_out": left_out,
            "forced": self._forced,
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(ROOT),
            "sources": digest(ROOT / "xprnn"),
            "device": device,
            "versions": versions(),
            "seconds": round(time.monotonic() - self._start, 1),
            **self._seen.as_dict(),
        }
        try:
            self._message = f"written to {write(report, self._folder)}"
        except OSError as error:
            self._message = f"not written: {error}"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the path of the files."""
        if self._message:
            terminalreporter.write_line(f"GPU report: {self._message}")


def worst(comparisons: list[tuple[str, float, float, str]]) -> list[list[Any]]:
    """Of comparisons (dtype, error, tolerance, what) the one with each dtype's largest error."""
    largest: dict[str, list[Any]] = {}
    for comparison in comparisons:
        if comparison[1] >= largest.get(comparison[0], comparison)[1]:
            largest[comparison[0]] = [*comparison]
    return [*largest.values()]


class Seen:
    """The sums of the tests' reports."""

    def __init__(self) -> None:
        self._counts = Counter(passed=0, failed=0, skipped=0, errors=0)
        self._reasons: Counter[str] = Counter()
        self._implementations: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._broken: list[str] = []
        self._worst: dict[str, dict[str, Any]] = {}

    @property
    def ran(self) -> bool:
        """Whether a test ran that was not skipped."""
        return sum(self._counts.values()) > self._counts["skipped"]

    def knows(self, nodeid: str) -> bool:
        """Whether this test has failed already."""
        return nodeid in self._broken

    def add(self, report: pytest.TestReport) -> None:
        """Add the report of one phase of a test."""
        if report.skipped:
            self._counts["skipped"] += 1
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "xfail"
            self._reasons[reason.removeprefix("Skipped: ")] += 1
        elif report.failed:
            self._counts["failed" if report.when == "call" else "errors"] += 1
            self._broken.append(report.nodeid)
        elif report.when == "call":
            self._counts["passed"] += 1
        if report.when == "call":  # the other phases' reports repeat the properties
            self._add_properties(report)

    def add_warning(self, warning: warnings.WarningMessage) -> None:
        """Add a warning of a test."""
        lines = str(warning.message).splitlines() or [""]
        self._warnings[f"{warning.category.__name__}: {lines[0]}"] += 1

    def _add_properties(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == IMPLEMENTATION:
                self._implementations[str(value)] += 1
            for dtype, error, most, what in value if name == ERRORS else ():
                entry = {"error": error, "tolerance": most, "test": report.nodeid, "what": what}
                self._worst[dtype] = max(
                    self._worst.get(dtype, entry), entry, key=lambda one: one["error"]
                )

    def as_dict(self) -> dict[str, Any]:
        """The sums, with names sorted."""
        return {
            "counts": dict(self._counts),
            "failed_tests": sorted(set(self._broken)),
            "skipped_because": dict(sorted(self._reasons.items())),
            "warnings": dict(sorted(self._warnings.items())),
            "tests_by_implementation": dict(sorted(self._implementations.items())),
            "worst_error": dict(sorted(self._worst.items())),
        }


def part_of(config: pytest.Config) -> str:
    """The option by which the command line excludes tests marked `gpu`, or ""."""
    options = config.option
    if options.markexpr not in ("", "gpu"):
        return "by -m"
    for flag in ("keyword", "deselect", "ignore", "ignore_glob", "lf", "stepwise"):
        if getattr(options, flag, None):
            return f"by --{flag}"
    paths = {Path(config.invocation_params.dir, argument).resolve() for argument in config.args}
    suite = {config.rootpath, config.rootpath / "tests"}
    return "" if paths & suite else "by names on the command line"


def write(report: dict[str, Any], folder: Path) -> str:
    """Write both files atomically; returns the JSON file's path relative to `folder`."""
    directory = folder / slug(report["device"]["name"])
    cupy = next((v for name, v in report["versions"].items() if name.startswith("cupy")), "none")
    name = f"gpu-suite-{cupy}-py{sys.version_info.major}.{sys.version_info.minor}"
    name += f"-{report['forced']}" if report["forced"] else ""
    name += "" if report["whole_suite"] else "-part"
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    for suffix, content in ((".json", text), (".md", markdown(report))):
        with replacing(directory / f"{name}{suffix}") as part:
            part.write_text(content + "\n", "utf-8")
    return f"{directory.name}/{name}.json"


def slug(device: str) -> str:
    """A device's name as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _finite(value: Any) -> Any:
    """`value` with non-finite numbers as text, for JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    device, counts = report["device"], report["counts"]
    extent = f"suite in part ({report['left_out']})" if report["left_out"] else "whole suite"
    extent += f", {report['forced']} kernels alone," if report["forced"] else ""
    lines = [
        f"# The GPU suite on {device['name']}, {report['date']}",
        "",
        f"- The {extent} in {report['seconds']:.0f} s: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()),
        f"- Commit {report['commit']}; sha256 of the sources {report['sources'][:16]}",
        "- " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items()),
        "- " + ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "- tests by implementation: "
        + (", ".join(f"{n} {k}" for n, k in report["tests_by_implementation"].items()) or "none"),
        *(f"- skipped, {n}: {reason}" for reason, n in report["skipped_because"].items()),
        *(f"- warned, {n}: {text}" for text, n in report["warnings"].items()),
        *(f"- **failed**: `{test}`" for test in report["failed_tests"]),
        "",
        "| dtype | worst error | tolerance | of | in |",
        "|---|---|---|---|---|",
    ]
    for dtype, worst in report["worst_error"].items():
        lines.append(
            f"| {dtype} | {worst['error']:.2e} | {worst['tolerance']:.2e} | {worst['what']} "
            f"| `{worst['test']}` |"
        )
    return "\n".join(lines)
