"""A pytest plugin that reports the test after which every CUDA call fails, and ends its process.

After an illegal address or a failed launch, every later CUDA call of the process returns the same
error, so that all later tests would fail or be skipped. With pytest-xdist the other tests continue
in a new process; without it the session ends with status `ENDED`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator

import pytest

from tests.support.machine import context_error

ENDED = 70  # not a status of pytest
NO_DEVICE = ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")  # not caused by a test


def error_of_process() -> str:
    """The CUDA error of this process, or "", as without CuPy, a driver or a device."""
    cupy = sys.modules.get("cupy")
    error = context_error(cupy) if cupy is not None else ""
    return "" if error.startswith(NO_DEVICE) else error


class ContextCheck:
    """The plugin. `error` returns the error of every CUDA call, or ""."""

    def __init__(self, config: pytest.Config, error: Callable[[], str] = error_of_process) -> None:
        self._in_worker = hasattr(config, "workerinput")
        self._error = error
        self._skipped = False
        self._message = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """After the last phase of a test marked `gpu`, make it fail with the error."""
        report = yield
        if call.when == "setup":
            self._skipped = report.skipped
        if call.when != "teardown" or self._skipped or not item.get_closest_marker("gpu"):
            return report
        if error := self._error():
            self._message = f"{item.nodeid} left a CUDA context that refuses every call: {error}"
            report.outcome, report.longrepr = "failed", self._message
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        """End the process after the test's reports."""
        if self._message and self._in_worker:
            os._exit(ENDED)  # xdist replaces a worker that exits
        if self._message:
            pytest.exit(self._message, returncode=ENDED)
