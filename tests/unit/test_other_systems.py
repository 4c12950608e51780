"""On macOS, Windows and Linux with musl xprnn computes the same, as far as this system shows.

A new process imports Python's and NumPy's modules, and then lacks what those systems lack, and
Numba.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.numba_cases import python

LACKING = """
import ctypes, os, platform, sys, urllib.request
import numpy as np, numpy.random, numpy.testing, safetensors.numpy

def refuse(name):
    raise OSError(f"{name}: no such library")

sys.platform, machine, absent = SYSTEM
platform.machine = lambda: machine
ctypes.PyDLL = refuse  # of glibc's libraries
if sys.platform != "linux":
    ctypes.CDLL = refuse
for name in absent:
    delattr(os, name)
sys.modules.update(dict.fromkeys(("fcntl", "grp", "numba", "pwd", "resource")))
"""
RUN = """
import xprnn
from xprnn.backend import floating_point, processors
from xprnn.kernels.numba import threads
from xprnn.tools import info
assert processors.processors() >= processors.usable() >= 1
assert info.installation()["threads"]
with threads.pool(2) as pool:
    pool.run([np.zeros(3).sum] * 4)
gru = xprnn.GRU(3, 8, num_layers=2, bidirectional=True, seed=0).train()
x = np.random.default_rng(0).standard_normal((12, 2, 3)).astype("f")
for path in ("new.safetensors", "new.safetensors"):  # the second time it is replaced
    output, h_n = gru(x, lengths=[12, 5])
    dx, _ = gru.backward(output)
    gru.save(path)
same = xprnn.load("new.safetensors")
np.testing.assert_array_equal(same(x, lengths=[12, 5])[0], gru.eval()(x, lengths=[12, 5])[0])
print(floating_point.environment.flushes)
print(output.sum(), h_n.sum(), dx.sum(), sum(np.abs(g).sum() for g in gru.grads.values()))
"""
POSIX = ["sched_getaffinity", "sched_setaffinity"]
SYSTEMS = {
    "macOS": ("darwin", "arm64", POSIX),
    "Windows": ("win32", "AMD64", [*POSIX, "register_at_fork", "fork", "chown", "getuid", "uname"]),
    "Linux with musl": ("linux", "x86_64", []),
}


def results(folder: Path, before: str) -> list[str]:
    return python(before + RUN, folder, XPRNN_KERNELS="reference").splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="imitates other systems on Linux")
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_layer_trains_and_is_saved_on(system: str, tmp_path: Path) -> None:
    _, expected = results(tmp_path, "import numpy as np\n")
    lacking = LACKING.replace("SYSTEM", repr(SYSTEMS[system]))
    assert results(tmp_path, lacking) == ["False", expected]
