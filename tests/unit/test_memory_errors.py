"""Out-of-memory errors: which are translated, their text, and NumPy's at a real limit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xprnn.core.oom import translate_out_of_memory

RAISED = {
    "cupy": MemoryError("Out of memory allocating 4,096 bytes (allocated so far: 0 bytes)."),
    "cuda": RuntimeError("cudaErrorMemoryAllocation: out of memory"),
    "driver": RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
    "cublas": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    "torch": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", RAISED)
def test_out_of_memory_errors_are_translated(kind: str) -> None:
    @translate_out_of_memory
    def fail(array: np.ndarray) -> None:
        raise RAISED[kind]

    with pytest.raises(MemoryError) as caught:
        fail(np.zeros(3))
    message = str(RAISED[kind]) or "no memory is left"
    assert str(caught.value) == f"{fail.__module__}.fail on numpy: {message}"
    assert caught.value.__cause__ is RAISED[kind]


@pytest.mark.parametrize("error", [RuntimeError("cudaErrorIllegalAddress"), KeyError("memory")])
def test_other_errors_are_not_changed(error: Exception) -> None:
    @translate_out_of_memory
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error and error.__cause__ is None
    assert caught.traceback[-1].name == "fail"


# -- NumPy at a limit of the system

LIMITED = """
import resource, numpy as np, xprnn
from xprnn import functional

def space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

rng = np.random.default_rng(0)
x = rng.standard_normal((1000, 64, 32)).astype("f")
layer = xprnn.LSTM(32, 64, seed=0).train()
weights = [layer.parameters[f"{kind}_l0"] for kind in ("weight_ih", "weight_hh")]
expected, _ = layer(x)
expected = expected.sum()
layer.eval().train()
layer(x[:2])
layer.backward(None, None)
functional.lstm(x[:2], None, *weights)  # everything is compiled or loaded now

used = space()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), hard))
errors = []
for call in (lambda: layer(x), lambda: functional.lstm(x, None, *weights)):
    try:
        call()
    except MemoryError as error:
        errors.append(error)
held = space() - used
small, _ = layer(x[:2])
dx, _ = layer.backward(small)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
again, _ = layer(x)
for error in errors:
    print("error", error)
print("held", held)
print("same", bool(again.sum() == expected), bool(np.isfinite(dx).all()))
"""


def limited(before: str = "") -> tuple[list[str], int]:
    """The errors that the program above prints, and the bytes that it still holds."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the address space in use is read from /proc")
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    malloc_options = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc returns an array when it is freed
    done = subprocess.run(
        [sys.executable, "-c", before + LIMITED],
        env={**os.environ, **one, **malloc_options},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "same True True" in done.stdout
    errors = re.findall("^error (.*)$", done.stdout, re.MULTILINE)
    return errors, int(re.findall(r"held (-?\d+)", done.stdout)[0])


def test_numpy_at_a_memory_limit() -> None:
    errors, held = limited()
    for name, error in zip(("LSTM", r"xprnn\.functional"), errors, strict=True):
        assert re.match(rf"{name} on numpy: Unable to allocate \d\S* [KMG]iB for an array", error)
    assert held < 1 << 20


def test_memory_that_is_not_freed_is_detected() -> None:
    """The injected fault: errors that keep their frames."""
    plain = "from xprnn.nn.layers import _Layer as L; L._call = L._call.__wrapped__"
    _, held = limited(f"{plain}\n")
    assert held > 8 << 20
