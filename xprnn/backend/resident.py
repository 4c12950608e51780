"""Launches of kernels whose blocks wait for each other, and what such a kernel reports.

All blocks of a resident kernel must be on the device at once. Two of them side by side, from two
threads or on two streams, could each hold half of it and wait for ever. So each waits, on the
device, for the one before it; other work may run beside it and ends by itself. That it fits is
looked up first. A launch is cooperative too, which CUDA refuses where it does not fit; but not one
of clusters, which CUDA is said to have refused so, and taken in the ordinary way (cupy#8778).

A kernel in which a wait lasts too long ends, and leaves its number and the step in a word of
page-locked memory. Nobody waits for that word: the next call on the device looks at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from . import driver
from .exports import exported_from

STEP_BITS = 24  # of a report: below them the step, clipped, above them the kernel's number


@exported_from("xprnn")
class KernelStoppedError(RuntimeError):
    """A kernel gave up waiting: what it computed, and all that was made of it, is NaN."""


class Shape(NamedTuple):
    """How many threads a launch asks for, and the shared memory of each block."""

    grid: tuple[int, ...]  # blocks, in up to three sizes
    threads: int  # a block
    shared: int  # bytes a block
    cluster: int = 1  # neighbours in x that make a cluster: compiled into the kernel

    @property
    def blocks(self) -> int:
        """The blocks that have to be resident at once."""
        return prod(self.grid)


class ResidentKernels:
    """The resident kernels of one device.

    :param cupy: the module CuPy.
    :param device: the device's number.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self._cupy = cupy
        self._device = device
        self._lock = Lock()
        self._names: list[str] = []
        self._rooms: dict[tuple[Any, Shape], int] = {}
        self._last: Any = None  # the event behind the launch before; made with `_memory`
        self._memory: Any = None
        self._word = np.zeros(1, np.uint32)  # 0: nothing to report

    def launch(self, name: str, kernel: Any, shape: Shape, arguments: Sequence[Any]) -> None:
        """Launch a kernel on the current stream, behind the resident kernel before it.

        The device is the current one, and the stream is not being captured.

        :param name: what an error calls it.
        :param kernel: a RawKernel, with `enable_cooperative_groups` unless its blocks make
            clusters, whose size divides the grid's first; its last two parameters are
            `unsigned* report` and `unsigned tag`. When it gives up at the t-th step of its walk,
            it writes tag + min(t, 2^24 - 1) to `report`, in one store.
        :param arguments: those before the two.
        :raises RuntimeError: its blocks cannot all be resident; nothing is launched.
        """
        with self._lock:
            room = self._room(kernel, shape)
            if shape.blocks > room:
                raise RuntimeError(
                    f"kernel {name}: {shape.blocks} blocks of {shape.threads} threads and "
                    f"{shape.shared} bytes{_in_clusters(shape)} wait for each other, and the "
                    f"device holds {room}"
                )
            self._prepare()
            stream = self._cupy.cuda.get_current_stream()
            stream.wait_event(self._last)
            tag = self._number(name) << STEP_BITS
            report = np.uint64(self._memory.ptr), np.uint32(tag)
            kernel(shape.grid, (shape.threads,), (*arguments, *report), shared_mem=shape.shared)
            self._last.record(stream)

    def check(self) -> None:
        """Raise once for a kernel that gave up; one comparison, which waits for nothing.

        :raises KernelStoppedError: naming the kernel and the step.
        """
        if not self._word[0]:
            return
        with self._lock:
            number, step = divmod(int(self._word[0]), 1 << STEP_BITS)
            self._word[0] = 0
        if number:  # else another thread was here first
            raise KernelStoppedError(
                f"kernel {self._names[number - 1]} gave up at step {step}: a block waited too long "
                "for another. Its results, and all that was computed from them, are NaN"
            )

    def _prepare(self) -> None:
        """Make what the first launch on a device needs; page-locking memory is slow."""
        if self._memory is None:
            self._last = self._cupy.cuda.Event(disable_timing=True)
            # not from CuPy's pool, whose allocator a user may change; every device reaches it
            self._memory = self._cupy.cuda.PinnedMemory(4)
            pointer = self._cupy.cuda.PinnedMemoryPointer(self._memory, 0)
            self._word = np.frombuffer(pointer, np.uint32)
            self._word[0] = 0

    def _number(self, name: str) -> int:
        """The number that stands for a name in the word, from 1 on."""
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name) + 1

    def _room(self, kernel: Any, shape: Shape) -> int:
        """How many blocks of a kernel the device holds; CuPy itself would shrink a grid."""
        key = kernel, shape
        if key not in self._rooms:
            cuda = self._cupy.cuda
            facts = cuda.runtime.getDeviceProperties(self._device)
            # the most there is, not this launch's share: the next one may ask for more
            most = facts["sharedMemPerBlockOptin"] - kernel.shared_size_bytes
            kernel.max_dynamic_shared_size_bytes = most
            self._rooms[key] = self._count(kernel, shape, facts["multiProcessorCount"])
        return self._rooms[key]

    def _count(self, kernel: Any, shape: Shape, processors: int) -> int:
        pointer = kernel.kernel.ptr
        if shape.cluster == 1:
            most = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
            return int(most(pointer, shape.threads, shape.shared)) * processors
        clusters = driver.active_clusters(pointer, shape.grid, shape.threads, shape.shared)
        return clusters * shape.cluster


def _in_clusters(shape: Shape) -> str:
    return f" in clusters of {shape.cluster}" if shape.cluster > 1 else ""
