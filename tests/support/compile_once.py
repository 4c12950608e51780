"""A pytest plugin: one process compiles each Numba kernel, the others load it from the cache.

The fast tier uses only the kernels of `FAST`: a test in it that compiles another one fails.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "gru_reset_before", "lstm")
DEFINED = ("rnn", "ligru", "min_gru")  # built in, and of the documentation
PARTS = ("forward_reset", "forward_candidate", "backward_candidate", "backward_reset")
FAST = frozenset(  # names of compiled functions, in float32 and float64
    (
        # full sequences: each cell, the products over all steps, packed weights
        *(f"{cell}_{phase}" for cell in (*SEQUENCE, *DEFINED) for phase in ("forward", "backward")),
        *("weight_gradient", "input_gradient", "pack", "pack_transposed"),
        # the element-wise part of a step, and a step of all layers
        *(f"_{cell}_{phase}" for cell in SEQUENCE for phase in ("forward", "backward")),
        *(f"_{part}" for part in PARTS),
        *(f"{cell}_step" for cell in (*SEQUENCE, *DEFINED)),
        "_pack_one",
    )
)
_requested: list[str] = []  # functions that this process compiled or loaded


@pytest.fixture(autouse=True, scope="session")
def kernels_compiled_once() -> Iterator[None]:
    """Compile under a lock for each kernel and cache folder."""
    if importlib.util.find_spec("numba") is None:
        yield
        return
    from numba.core.dispatcher import Dispatcher

    original = Dispatcher.compile

    def compile_alone(self: Any, signature: Any) -> Any:
        name, folder = self.py_func.__qualname__, self.stats.cache_path
        if folder is None:  # not cached on disk
            return original(self, signature)
        _requested.append(name)
        with lock(f"{folder} {name} {signature}"):
            return original(self, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "compile", compile_alone)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test of the fast tier that compiles a kernel outside `FAST`."""
    _requested.clear()
    result = yield
    names = {re.sub("_[0-9a-f]{16}_", "_", name.rpartition("-")[0]) for name in _requested}
    others = sorted(names - FAST)
    if others and item.get_closest_marker("fast"):
        pytest.fail(f"not in FAST of tests/support/compile_once.py: {', '.join(others)}")
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Let torch use one thread: there may be as many workers as processors."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@contextmanager
def lock(key: str) -> Iterator[None]:
    """Allow one process at a time, if the system has file locks."""
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
