"""Broken optional packages: xprnn runs without them and reports the reason.

Each is a package on disk that precedes the installed one in a new process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.numba_cases import needs_numba, python
from xprnn.backend import optional

RUN = """
import logging, sys, numpy as np
logging.basicConfig(stream=sys.stdout, format="logged %(levelname)s %(message)s")
import xprnn
from xprnn.tools import info
gru = xprnn.GRU(3, 4, seed=0).train()
x = np.random.default_rng(0).standard_normal((12, 2, 3)).astype("f")
output, h_n = gru(x)
dx, _ = gru.backward(output)
with_step = gru.eval().stepper(2)
for frame in x:
    h = with_step.step(frame)
np.testing.assert_allclose(h, output[-1], rtol=1e-5, atol=1e-6)
cell = xprnn.GRUCell(3, 4, seed=0).eval()
cell(x[0])
print("sums", output.sum(), dx.sum())
print(gru.explain((12, 2, 3)))
print(with_step.explain())
for name, status in (info.extras() | info.backends()).items():
    print("info", name, status)
"""


@cache
def plain() -> str:
    """The output with the plain code only."""
    return python(RUN, XPRNN_KERNELS="reference")


def sums(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("sums")]
    return line


def broken(folder: Path, name: str, raises: str) -> dict[str, str]:
    """The environment in which package `name` is a folder whose import runs `raises`."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(raises + "\n", "utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def check_plain(printed: str, why: str) -> None:
    """The plain code ran; `explain`, `info` and, once, the log say why."""
    assert sums(printed) == sums(plain())
    lines = printed.splitlines()
    assert [line for line in lines if why in line and line.startswith("  sequence: ")]
    assert len([line for line in lines if why in line and line.startswith("  pointwise: ")]) >= 1
    (status,) = [line for line in lines if line.startswith("info numba ")]
    assert status.startswith("info numba not usable: ") and why in status
    assert len([line for line in lines if line.startswith("logged WARNING") and why in line]) == 1


ERRORS = {
    "SystemError": "raise SystemError('initialization of _internal failed')",
    "OSError": "raise OSError('libtbb.so.12: cannot open shared object file')",
    "AttributeError": "import numpy; numpy.no_such_name",
    "ImportError": "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')",
    "RuntimeWarning": "import warnings; warnings.warn('of an older ABI', RuntimeWarning)",
    "ModuleNotFoundError": "import no_such_module",
}


@pytest.mark.parametrize("kind", ERRORS)
def test_a_numba_that_fails_to_import(kind: str, tmp_path: Path) -> None:
    """Including a warning that -W error turns into an exception."""
    printed = python(RUN, **broken(tmp_path, "numba", ERRORS[kind]))
    check_plain(printed, f"numba: fails to import: {kind}: ")


@needs_numba
def test_an_llvmlite_of_another_version(tmp_path: Path) -> None:
    printed = python(RUN, **broken(tmp_path, "llvmlite", "__version__ = '0.1'"))
    check_plain(printed, "numba: fails to import: ")


def test_a_folder_that_is_called_numba(tmp_path: Path) -> None:
    """An empty package can be imported, but has nothing that the kernels use."""
    printed = python(RUN, **broken(tmp_path, "numba", ""))
    check_plain(printed, "xprnn.kernels.numba.cells: fails to import: ")


@needs_numba
def test_numba_with_compilation_disabled() -> None:
    check_plain(python(RUN, NUMBA_DISABLE_JIT="1"), "NUMBA_DISABLE_JIT")


@needs_numba
def test_a_first_compilation_that_fails(tmp_path: Path) -> None:
    """Numba's own passes raise, as the code generator lacks a name."""
    code = "import llvmlite.ir; del llvmlite.ir.IRBuilder.store\n" + RUN
    empty = {"NUMBA_CACHE_DIR": str(tmp_path)}
    check_plain(python(code, **empty), "the CPU's kernels cannot be compiled: ")


@needs_numba
@pytest.mark.parametrize("kind", ["pointwise", "sequence"])
def test_a_forced_implementation_raises_with_the_reason(kind: str, tmp_path: Path) -> None:
    code = """
import numpy as np, xprnn
try:
    xprnn.GRU(3, 4, seed=0)(np.ones((12, 2, 3), "f"))
except xprnn.KernelUnavailableError as error:
    print(error)
"""
    environment = broken(tmp_path, "numba", ERRORS["SystemError"])
    printed = python(code, XPRNN_KERNELS=kind, **environment)
    assert printed.startswith(f"XPRNN_KERNELS={kind}: ")
    assert "numba: fails to import: SystemError: initialization of _internal failed" in printed
    printed = python(
        "import llvmlite.ir; del llvmlite.ir.IRBuilder.store\n" + code,
        XPRNN_KERNELS=kind,
        NUMBA_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert "the CPU's kernels cannot be compiled: " in printed


@needs_numba
@pytest.mark.parametrize("where", ["file", "below a file"])
def test_a_cache_folder_that_is_a_file(where: str, tmp_path: Path) -> None:
    """Numba uses another folder, and its code is correct."""
    file = tmp_path / "file"
    file.write_text("not a folder", "utf-8")
    folder = file if where == "file" else file / "deeper"
    printed = python(RUN, NUMBA_CACHE_DIR=str(folder))
    assert "logged WARNING" not in printed and "sequence\n" in printed
    assert file.read_text("utf-8") == "not a folder"


@needs_numba
def test_an_unreadable_cache_entry_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a folder without permissions; in this test a folder replaces a file."""
    import numba
    import numpy as np
    from numba import types

    from xprnn.kernels.numba.jit import compile_for, written

    def double(a: np.ndarray) -> None:
        a[0] *= 2

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compile_for(double, (written(types.float32, 1),))
    (index,) = tmp_path.rglob("*double-*.nbi")
    index.unlink()
    index.mkdir()
    double.__qualname__ = double.__name__  # as in a new process
    with caplog.at_level("INFO", "xprnn"):
        compiled = compile_for(double, (written(types.float32, 1),))
    assert "compiled code will not be kept: " in caplog.text
    array = np.ones(1, np.float32)
    compiled(array)
    assert array[0] == 2


# -- the other packages


def test_a_broken_ml_dtypes(tmp_path: Path) -> None:
    code = """
import xprnn
from xprnn.tools import info
from xprnn.diagnostics.verification.suite import types_of
print(xprnn.GRU(3, 4, compute_dtype="float16", seed=0).arithmetic)
print("bfloat16" in types_of(xprnn.get_backend("numpy")))
print(info.extras()["ml_dtypes"])
try:
    xprnn.GRU(3, 4, compute_dtype="bfloat16")
except ValueError as error:
    print(error)
"""
    environment = broken(tmp_path, "ml_dtypes", "raise SystemError('built for another NumPy')")
    why = "ml_dtypes: fails to import: SystemError: built for another NumPy"
    assert python(code, **environment).splitlines() == [
        "float32 with float16",
        "False",
        f"not usable: {why}",
        f"compute_dtype: 'bfloat16' needs a package: {why}",
    ]


@pytest.mark.parametrize("content", ["", "raise OSError('no such library')"])
def test_a_broken_threadpoolctl_sets_no_limit(content: str, tmp_path: Path) -> None:
    code = """
import contextlib
with contextlib.suppress(OSError):
    import threadpoolctl
from xprnn.backend import processors
print(processors.usable())
"""
    assert python(code, OMP_NUM_THREADS="1", **broken(tmp_path, "threadpoolctl", content)) == "1\n"


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_a_broken_peer_is_not_measured(name: str, tmp_path: Path) -> None:
    code = f"""
from xprnn.tools.bench import peers
from xprnn.tools.bench.run import PeerUnavailableError
from xprnn.tools.bench.task import Setting, make_task
try:
    peers.PEERS[{name!r}](make_task(Setting(hidden=3, input=2, batch=1, steps=2)))
except PeerUnavailableError as error:
    print(error)
"""
    environment = broken(tmp_path, name, "raise OSError('libcudart.so.12: not found')")
    expected = f"{name}: fails to import: OSError: libcudart.so.12: not found\n"
    assert python(code, XPRNN_KERNELS="reference", **environment) == expected


@pytest.mark.parametrize("kind", ERRORS)
def test_a_broken_cupy(kind: str, tmp_path: Path) -> None:
    code = """
import xprnn
from xprnn.tools import info
print(xprnn.GRU(3, 4, backend="auto").backend.name)
print(info.backends()["cupy"])
"""
    name, status = python(code, **broken(tmp_path, "cupy", ERRORS[kind])).splitlines()
    assert name == "numpy" and status.startswith(
        "not usable: backend 'cupy': CuPy fails to import: "
    )


# -- the helper


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "MemoryError", "SystemExit"])
def test_interrupts_and_memory_errors_are_not_caught(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ended_by_it.py").write_text(f"raise {kind}", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):  # and it is not cached as a failure
        with pytest.raises((KeyboardInterrupt, MemoryError, SystemExit)) as raised:
            optional.load("ended_by_it")
        assert type(raised.value).__name__ == kind


def test_a_failure_is_cached_and_a_missing_package_is_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "came_later", raising=False)
    with pytest.raises(optional.OptionalPackageError, match="came_later: not installed; pip i"):
        optional.load("came_later")
    (tmp_path / "came_later.py").write_text("raise SystemError('first\\nsecond')", "utf-8")
    for _ in range(2):
        with pytest.raises(
            optional.OptionalPackageError,
            match=r"^came_later: fails to import: SystemError: first$",
        ):
            optional.load("came_later")
        (tmp_path / "came_later.py").write_text("raise OSError('another')", "utf-8")


def test_info_is_printed_with_a_broken_numba(tmp_path: Path) -> None:
    environment = broken(tmp_path, "numba", ERRORS["SystemError"])
    command = [sys.executable, "-m", "xprnn", "info"]
    wide = os.environ | environment | {"COLUMNS": "200"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, check=True)
    assert "numba: fails to import: SystemError: initialization" in done.stdout
