"""A pytest plugin for `XPRNN_KERNELS=sequence python -m pytest -m gpu`.

The tests that let each implementation have its turn on the GPU are run, with that one alone. The
variable is taken away from everything else, NumPy's oracles above all. A test that asks for what
no such kernel does, float64 for one, is skipped with the kernel table's own reason.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from xprnn.kernels import ENVIRONMENT_VARIABLE, KernelUnavailableError

FIXTURE = "implementation"


_asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
NAME = _asked if _asked == "sequence" else ""  # the kernels that alone have their turns, or ""


@pytest.fixture(autouse=True, scope="session")
def nobody_else_is_forced() -> Iterator[None]:
    """Not before the session: workers of xdist, started then, read the variable too."""
    with pytest.MonkeyPatch.context() as patch:
        if NAME:
            patch.delenv(ENVIRONMENT_VARIABLE)
        yield


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not import files without such a test: most of the suite, whose import takes its time."""
    if not NAME or not collection_path.is_file():
        return None
    text = collection_path.read_bytes()  # data files are asked about, too
    return None if f"{FIXTURE}: str".encode() in text else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that would be the same without."""
    if not NAME:
        return
    kept = [item for item in items if FIXTURE in getattr(item, "fixturenames", ())]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*kept}])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip what no such kernel does."""
    try:
        return (yield)
    except KernelUnavailableError as error:
        if not NAME or item.get_closest_marker("gpu") is None:
            raise
        pytest.skip(str(error))
