"""Fake CuPy for launches of `stack_step.cu` by a stepper; its source runs on the emulator."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.support.emulator.build import Faults
from tests.support.emulator.sequence import Run
from tests.support.emulator.stack_step import THREADS, launch
from tests.support.fake_cupy import cuda as fake_cuda
from tests.support.fake_cupy import sequence as fake_sequence
from tests.support.fake_cupy.array import FakeArray, FakeModule


class Function:
    """Like a `cupy.RawKernel` of a `RawModule`; each launch uses the next seed."""

    run: ClassVar[Run] = Run()
    faults: ClassVar[Faults] = ()
    max_polls: ClassVar[int] = 1 << 23
    launches: ClassVar[list[tuple[str, tuple[int, ...]]]] = []  # name and grid of each
    shared_size_bytes = 0
    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, name: str) -> None:
        self.name = name
        self.kernel = SimpleNamespace(ptr=id(self))

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
        stream = fake_cuda.get_current_stream()
        if stream.is_capturing():
            stream.captured.append(partial(self, grid, block, args, shared_mem=shared_mem))
            return
        assert block == (THREADS,) and shared_mem <= self.max_dynamic_shared_size_bytes
        # a seed of 0 runs the threads in their order, in every launch
        run = self.run._replace(seed=self.run.seed and self.run.seed + len(self.launches))
        values = [a._inner if isinstance(a, FakeArray) else a for a in args]
        assert all(a is None or isinstance(a, (np.ndarray, np.integer)) for a in values)
        assert all(a.flags.c_contiguous for a in values if isinstance(a, np.ndarray))
        plain = [int(a) if isinstance(a, np.integer) else a for a in values]
        plain[-3] = self.max_polls  # followed by the report and the tag
        outcome = launch(self.name, plain, grid, shared_mem, run, self.faults)
        if outcome != "fine":
            raise RuntimeError(f"{self.name}: {outcome}")
        self.launches.append((self.name, grid))
        fake_cuda.LOG.kernels += 1


class RawModule(fake_sequence.RawModule):
    """Like `cupy.RawModule`."""

    def get_function(self, name: str) -> Function:
        assert name in self.names
        return Function(name)


def install(monkeypatch: pytest.MonkeyPatch, **properties: int) -> None:
    """Make the fake CuPy launch steps of stacks; `properties` override those of the H200."""
    fake_sequence.install(monkeypatch, **properties)
    monkeypatch.setattr(FakeModule, "RawModule", RawModule, False)
    for name, value in (("launches", []), ("run", Run()), ("faults", ()), ("max_polls", 1 << 23)):
        monkeypatch.setattr(Function, name, value)
