"""Fake CuPy for launches of sequence kernels, whose source runs on the emulator.

The device is an H200; launches are synchronous.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.support.emulator.sequence import Run, Tiling, launch
from tests.support.fake_cupy import cuda as fake_cuda
from tests.support.fake_cupy.array import FakeArray, FakeModule
from tests.support.fake_cupy.devices import H200
from tests.support.fake_cupy.launch import PinnedMemory
from xprnn.backend import driver
from xprnn.kernels.cuda.table import KERNELS

NAME = re.compile(r"(\w+<)xprnn::(\w+), (\d+), (\d+), (\d+), (\d+)((?:, true|, false)?>)")
CLUSTER = re.compile(r"#define XP_CLUSTER (\d)\n")
WAVEFRONT = "#define XP_WAVEFRONT 1\n"
WORKS = {kernel.template: key for key, kernel in KERNELS.items()}


class Function:
    """Like a `cupy.RawKernel` of a `RawModule`."""

    run: ClassVar[Run] = Run()
    launches: ClassVar[list[tuple[str, tuple[int, ...]]]] = []  # name and grid of each
    shared_size_bytes = 0
    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, name: str, cluster: int = 1, wave: bool = False) -> None:
        file, kind, *sizes, rest = NAME.fullmatch(name.removeprefix("xprnn::")).groups()
        self.tiling = Tiling(*WORKS[f"{file}{{}}{rest}"], kind, *map(int, sizes), cluster, wave)
        self.name = name
        self.kernel = SimpleNamespace(ptr=id(self))

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int) -> None:
        passes = int([a for a in args if isinstance(a, np.int32)][4])  # T N H S passes
        assert shared_mem == self.tiling.shared(passes) <= self.max_dynamic_shared_size_bytes
        assert block == (32 * self.tiling.warps,) and len(grid) == 3
        outcome = launch(self.tiling, [_plain(a) for a in args], grid, passes, self.run)
        if outcome != "fine":
            raise RuntimeError(f"{self.name}: {outcome}")
        self.launches.append((self.name, grid))
        fake_cuda.LOG.kernels += 1


def _plain(argument: Any) -> Any:
    """An argument in the form that the emulator takes."""
    if isinstance(argument, FakeArray):
        return argument._inner
    if isinstance(argument, np.ndarray) and argument.size == 1:
        return argument  # by value
    if argument is None or isinstance(argument, np.integer):
        return argument if argument is None else int(argument)
    raise TypeError(f"Unsupported type {type(argument)}")


class RawModule:
    """Like `cupy.RawModule`."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...],
        name_expressions: tuple[str, ...],
        enable_cooperative_groups: bool,
    ) -> None:
        cluster = CLUSTER.match(code)
        self.cluster, self.wave = int(cluster[1]) if cluster else 1, WAVEFRONT in code
        assert options == ("--std=c++17",) and enable_cooperative_groups == (self.cluster == 1)
        assert all(
            name.partition("<")[0].removeprefix("xprnn::") in code for name in name_expressions
        )
        self.names = name_expressions

    def get_function(self, name: str) -> Function:
        assert name in self.names
        return Function(name, self.cluster, self.wave)


class Event:
    """Like `cupy.cuda.Event`, on streams without pending work."""

    def __init__(self, disable_timing: bool = False) -> None:
        self.records = 0

    def record(self, stream: Any) -> None:
        self.records += 1


def install(monkeypatch: pytest.MonkeyPatch, **properties: int) -> None:
    """Make the fake CuPy launch sequence kernels; `properties` override those of the H200."""
    cuda = fake_cuda.CUDA
    device_properties = {**H200, **properties}
    monkeypatch.setattr(
        cuda.runtime, "getDeviceProperties", lambda device: device_properties, False
    )
    monkeypatch.setattr(fake_cuda.Stream, "wait_event", lambda self, event: None, False)
    monkeypatch.setattr(FakeModule, "RawModule", RawModule, False)
    monkeypatch.setattr(cuda, "Event", Event, False)
    monkeypatch.setattr(cuda, "PinnedMemory", PinnedMemory, False)
    pointer = lambda memory, offset: memoryview(memory.bytes)[offset:]  # noqa: E731
    monkeypatch.setattr(cuda, "PinnedMemoryPointer", pointer, False)
    driver_functions = SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=lambda *launch: 1)
    monkeypatch.setattr(cuda, "driver", driver_functions, False)
    pairs = device_properties["multiProcessorCount"] // 2
    monkeypatch.setattr(driver, "active_clusters", lambda kernel, grid, threads, shared: pairs)
    monkeypatch.setattr(Function, "launches", [])
