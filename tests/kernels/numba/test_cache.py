"""The cache of compiled code: kept on disk, renewed if a source changes, and errors of the disk."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.numba_cases import needs_numba, python

COUNTING = """
import logging, sys, numpy as np, xprnn
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
print(xprnn.__file__)
layer = xprnn.RNN(3, 8, seed=0)
print(float(layer(np.ones((12, 4, 3), "f"))[0].sum()))
"""


@needs_numba
def test_compiled_code_is_cached_and_follows_every_source(tmp_path: Path) -> None:
    """A second process compiles nothing; after a change of the same size and time it does."""
    package = tmp_path / "xprnn"
    shutil.copytree(Path(xprnn.__file__).parent, package, ignore=shutil.ignore_patterns("__py*"))
    environment = {
        "PYTHONPATH": str(tmp_path),
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "XPRNN_KERNELS": "sequence",
    }
    first = python(COUNTING, tmp_path, **environment)
    assert str(package) in first
    assert re.search(r"compiled rnn_\w{16}_forward for the CPU in ", first)
    second = python(COUNTING, tmp_path, **environment)
    assert "compiled rnn" not in second and second.split()[-1] == first.split()[-1]
    source = package / "kernels" / "numba" / "elementary.py"
    before, text = source.stat(), source.read_text("utf-8")
    source.write_text(text.replace("return e / (e + (one + one))", "return e / (e - (one + one))"))
    assert source.stat().st_size == before.st_size
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    shutil.rmtree(source.parent / "__pycache__", ignore_errors=True)
    third = python(COUNTING, tmp_path, **environment)
    assert "compiled rnn" in third and third.split()[-1] != first.split()[-1]


@needs_numba
def test_code_that_cannot_be_cached_is_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A function without a source file, which Numba cannot cache."""
    from numba import types

    from xprnn.kernels.numba.jit import compile_for, written

    names: dict[str, Any] = {}
    exec(compile("def double(a):\n    a[0] *= 2\n", "<nowhere>", "exec"), names)
    with caplog.at_level(logging.INFO, "xprnn"):
        double = compile_for(names["double"], (written(types.float32, 1),))
    warning, info = (record.getMessage() for record in caplog.records)
    assert warning.startswith("compiled code will not be kept: ") and "compiled double" in info
    a = np.full(1, 3, np.float32)
    double(a)
    assert a[0] == 6


@needs_numba
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_with_a_full_disk_code_is_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba
    from numba import types

    from xprnn.kernels.numba.jit import compile_for, written

    def full(self: Any, name: str, data: Any) -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"all of it")

    def double(a: Any) -> None:
        a[0] *= 2

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", full)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO, "xprnn"):
        compiled = compile_for(double, (written(types.float32, 1),))
    warning, info = (record.getMessage() for record in caplog.records)
    assert "No space left on device" in warning and "compiled double" in info
    array = np.ones(1, np.float32)
    compiled(array)
    assert array[0] == 2


@needs_numba
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_code_on_disk_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numba
    from numba import types

    from xprnn.kernels.numba.jit import compile_for, written

    def double(a: Any) -> None:
        a[0] *= 2

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compile_for(double, (written(types.float32, 1),))
    (cached,) = tmp_path.rglob(f"*double-*.{kind}")
    cached.write_bytes(cached.read_bytes()[:-20])
    double.__qualname__ = double.__name__  # as in a new process
    with pytest.raises(RuntimeError, match=r"double: .* is damaged .*; delete that") as raised:
        compile_for(double, (written(types.float32, 1),))
    assert str(cached.parent) in str(raised.value)
    cached.unlink()
    compile_for(double, (written(types.float32, 1),))
