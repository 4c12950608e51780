"""A pytest plugin: each Numba kernel is compiled by one process, the others take it from the cache.

The fast tier asks for the kernels of `FAST` only; a test of it that compiles another one fails.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "lstm")
PARTS = ("forward_reset", "forward_candidate", "backward_candidate", "backward_reset")
FAST = frozenset(  # by the names of the compiled functions, in float32 and float64
    (
        # whole sequences: each cell, the products over all steps, packed weights
        *(f"{cell}_{phase}" for cell in SEQUENCE for phase in ("forward", "backward")),
        *("weight_gradient", "input_gradient", "pack", "pack_transposed"),
        # the element-wise part of a step, and a step of all layers
        *(f"_{cell}_{phase}" for cell in SEQUENCE for phase in ("forward", "backward")),
        *(f"_{part}" for part in PARTS),
        *(f"{cell}_step" for cell in (*SEQUENCE, "gru_reset_before")),
        "_pack_one",
    )
)
_asked: list[str] = []  # names of the functions that this process compiled or read


@pytest.fixture(autouse=True, scope="session")
def kernels_compiled_once() -> Iterator[None]:
    """Behind a lock for each kernel and cache folder."""
    if importlib.util.find_spec("numba") is None:
        yield
        return
    from numba.core.dispatcher import Dispatcher

    genuine = Dispatcher.compile

    def compile_alone(self: Any, signature: Any) -> Any:
        name, folder = self.py_func.__qualname__, self.stats.cache_path
        if folder is None:  # not kept on disk
            return genuine(self, signature)
        _asked.append(name)
        with _lock(f"{folder} {name} {signature}"):
            return genuine(self, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", compile_alone)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test of the fast tier that asks for a kernel which is not in its list."""
    _asked.clear()
    result = yield
    others = sorted({name.rpartition("-")[0] for name in _asked} - FAST)
    if others and item.get_closest_marker("fast"):
        pytest.fail(f"the fast tier compiles no {', '.join(others)}: tests/support/compile_once.py")
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Leave torch one thread: as many workers as there are processors compare with it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """One process at a time; nothing where the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    digest = hashlib.sha256(key.encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"xprnn-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with (folder / digest).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
