"""Shared by the tests of the Numba kernels: the skip, forced kernels, cases and faulty sources."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import Case, Results, build, draw, numpy_run, product, run
from tests.support.tolerances import assert_close

needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None,
    reason="Numba is not installed: pip install xprnn[numba]",
)
SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "lstm")
# N, I, H: tiles of every height, complete and partial panels and transposes, vectors and remainders
SIZES = ((1, 1, 1), (1, 40, 33), (2, 16, 32), (3, 3, 17), (5, 17, 64), (7, 33, 16), (19, 8, 40))


def sized(**options: Any) -> list[Case]:
    """Cases of the sizes above in both dtypes."""
    types = ("float32", "float64")
    return [
        case
        for size in SIZES
        for case in product(
            dtype=types, **{name: (n,) for name, n in zip("NIH", size, strict=True)}, **options
        )
    ]


def forced(kernels: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that runs every layer on these kernels."""
    with xprnn.use_kernels(kernels):
        return function(*arguments)


@contextmanager
def several(threads: int) -> Iterator[None]:
    """Let every call, however small, run on this number of threads."""
    from xprnn.kernels.numba import sequence
    from xprnn.kernels.numba import threads as pool

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "usable", lambda: threads)
        patch.setattr(sequence, "PER_THREAD", 1)
        yield


def compare(case: Case, kernels: str) -> Results:
    """Run a case with these kernels, and compare all results with the reference in float64."""
    layer, problem = build(case), draw(case)
    expected = forced("reference", numpy_run, case, layer, problem)
    actual = forced(kernels, run, layer, case, problem)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(actual[name], values.astype(np.float64), case.dtype, f"{case}: {name}")
    return actual


def faulty(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A new module of kernels from a source with substitutions; each must match exactly once."""
    name = module.__name__.rpartition(".")[2]
    source = (resources.files("xprnn.kernels.numba") / f"{name}.py").read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    broken = ModuleType(module.__name__)
    broken.__package__ = module.__package__
    exec(compile(source, f"<faulty {name}>", "exec"), vars(broken))
    return broken


def uncached(function: Any, signature: Any) -> Any:
    """As `compile_for`, without a cache on disk."""
    import numba

    from xprnn.kernels.numba.jit import OPTIONS

    return numba.njit([signature], **OPTIONS)(function)


def python(code: str, folder: Path | None = None, **environment: str) -> str:
    """The output of a new process."""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
