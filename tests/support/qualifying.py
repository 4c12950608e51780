"""Workers of `qualify` with faults, and a small grid."""

from __future__ import annotations

import sys

from xprnn.diagnostics.qualifying.grid import Grid
from xprnn.diagnostics.qualifying.run import Limits

GRID = (Grid(("float32",), (4,), (5, 6), (3,)),)
LIMITS = Limits(total=300.0, compare=120.0, sample=60.0)
MAIN = "from xprnn.diagnostics.qualifying.worker import main; main()"

# Code that a worker runs first. The compiled loops compute h with the wrong sign, or stop.
WRONG = """
from xprnn.kernels.numba import sequence
original = sequence.write_results
def wrong(direction, activations, batch):
    activations.states[0][...] *= -1
    original(direction, activations, batch)
sequence.write_results = wrong
"""
STOPPING = """
import os, time
from xprnn.kernels.numba import sequence
original = sequence.NumbaRunner.{method}
def stopping(self, passes, call):
    if passes[0].weights.weight_hh.shape[1] == {H}:
        {action}
    return original(self, passes, call)
sequence.NumbaRunner.{method} = stopping
"""
# The fake CuPy as backend "fake_cupy", with sequence kernels and steps on the emulator.
FAKE_CUPY = """
import pytest
from tests.support.fake_cupy import cuda, devices, sequence, stack_step
from tests.support.fake_cupy.array import FakeCupyBackend
from xprnn.backend import registry
registry.BACKENDS["fake_cupy"] = FakeCupyBackend
stack_step.install(pytest.MonkeyPatch(), name=b"Fake H200", totalGlobalMem=1 << 37)
cuda.CUDA.runtime.driverGetVersion = lambda: 13000
cuda.CUDA.runtime.runtimeGetVersion = lambda: 12090
steps = sequence.FakeModule.RawModule
def raw_module(**options):
    kind = steps if "stack_step" in options["name_expressions"][0] else sequence.RawModule
    return kind(**options)
sequence.FakeModule.RawModule = staticmethod(raw_module)
"""
WITHOUT_NUMBA = "import sys; sys.modules['numba'] = None"


def worker(code: str = "") -> tuple[str, ...]:
    """The command of a worker that runs `code` first."""
    return sys.executable, "-c", f"{code}\n{MAIN}"


def stopping(action: str, method: str = "forward", H: int = 6) -> str:
    """Code after which sequence kernels do something else at one H."""
    return STOPPING.format(action=action, method=method, H=H)
