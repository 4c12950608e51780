"""A pytest plugin: a test after which CUDA refuses every call is named, and its process ends.

An illegal address or a failed launch stays with the process: all that it asks of CUDA afterwards
gives the same error, so that every later test would fail with it, or skip. Under pytest-xdist the
other tests go on in a new process; without it the session ends with status `ENDED`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator

import pytest

from tests.support.machine import context_error

ENDED = 70  # no status of pytest's own
NO_DEVICE = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")  # which no test leaves behind


def error_here() -> str:
    """That of this process, or "": without CuPy, a driver or a device there is none."""
    cupy = sys.modules.get("cupy")
    error = context_error(cupy) if cupy is not None else ""
    return "" if error.startswith(NO_DEVICE) else error


class ContextCheck:
    """The plugin. `error` gives what CUDA refuses every call with, "" if it does not."""

    def __init__(self, config: pytest.Config, error: Callable[[], str] = error_here) -> None:
        self._in_worker = hasattr(config, "workerinput")
        self._error = error
        self._skipped = False
        self._found = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Behind the last phase of a test marked `gpu`, let it fail with the error."""
        report = yield
        if call.when == "setup":
            self._skipped = report.skipped
        if call.when != "teardown" or self._skipped or not item.get_closest_marker("gpu"):
            return report
        if error := self._error():
            self._found = f"{item.nodeid} left a CUDA context that refuses every call: {error}"
            report.outcome, report.longrepr = "failed", self._found
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """End the process once the test's reports are out."""
        if self._found and self._in_worker:
            os._exit(ENDED)  # xdist replaces a worker that is gone
        if self._found:
            pytest.exit(self._found, returncode=ENDED)
