"""A pytest plugin for `XPRNN_KERNELS=sequence python -m pytest -m gpu`.

Only the tests with the fixture `implementation` run, with these kernels as the only implementation.
The variable is removed from the environment, so that it does not affect other calls, such as the
references on NumPy. A test of something that these kernels do not support, such as float64, is
skipped with the reason of the error.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from xprnn.kernels import ENVIRONMENT_VARIABLE, KernelUnavailableError

FIXTURE = "implementation"


_requested = os.environ.get(ENVIRONMENT_VARIABLE, "")
NAME = _requested if _requested == "sequence" else ""  # the only kernels under test, or ""


@pytest.fixture(autouse=True, scope="session")
def variable_is_removed() -> Iterator[None]:
    """Remove the variable after the workers of xdist, which read it too, have started."""
    with pytest.MonkeyPatch.context() as patch:
        if NAME:
            patch.delenv(ENVIRONMENT_VARIABLE)
        yield


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not import files without such tests, which are most of the suite."""
    if not NAME or not collection_path.is_file():
        return None
    text = collection_path.read_bytes()  # pytest also passes data files
    return None if f"{FIXTURE}: str".encode() in text else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that do not depend on the variable."""
    if not NAME:
        return
    selected = [item for item in items if FIXTURE in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*selected}])
    items[:] = selected


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip tests that these kernels do not support."""
    try:
        return (yield)
    except KernelUnavailableError as error:
        if not NAME or item.get_closest_marker("gpu") is None:
            raise
        pytest.skip(str(error))
