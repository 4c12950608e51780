"""Launches of persistent kernels, whose blocks wait for each other, and reports of their timeouts.

All blocks of such a kernel must be resident on the device at once. Two of these kernels side by
side, from two threads or on two streams, could each occupy half of the device and wait forever.
Therefore each launch waits, on the device, for the previous one; other work may run concurrently,
as it ends without waiting. Whether a launch fits is checked first. Launches are also cooperative,
which CUDA refuses if they do not fit; except those of clusters, which CUDA is reported to have
refused as cooperative, and accepted as ordinary launches (cupy#8778).

A kernel in which a wait times out ends, and stores its number and the step in a word of page-locked
memory. The host does not wait for that word: the next call on the device checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from . import driver
from .exports import exported_from

STEP_BITS = 24  # of a report: the step, clipped, in the low bits, the kernel's number above


@exported_from("xprnn")
class KernelStoppedError(RuntimeError):
    """A kernel timed out: its results, and everything computed from them, are NaN."""


class LaunchShape(NamedTuple):
    """The threads of a launch, and the shared memory of each block."""

    grid: tuple[int, ...]  # blocks, in up to three dimensions
    threads: int  # per block
    shared: int  # bytes per block
    cluster: int = 1  # blocks of a cluster, adjacent in x: compiled into the kernel

    @property
    def blocks(self) -> int:
        """The number of blocks, all of which must be resident at once."""
        return prod(self.grid)


class CooperativeKernels:
    """Launches the persistent kernels of one device.

    :param cupy: the module CuPy.
    :param device: the device's number.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self._cupy = cupy
        self._device = device
        self._lock = Lock()
        self._names: list[str] = []
        self._capacities: dict[tuple[Any, LaunchShape], int] = {}
        self._last: Any = None  # event after the previous launch; made with `_memory`
        self._memory: Any = None
        self._word = np.zeros(1, np.uint32)  # 0: nothing to report

    def launch(self, name: str, kernel: Any, shape: LaunchShape, arguments: Sequence[Any]) -> None:
        """Launch a kernel on the current stream, after the previous persistent kernel.

        The device is the current one, and the stream is not being captured.

        :param name: the kernel's name in errors.
        :param kernel: a RawKernel, with `enable_cooperative_groups` unless its blocks form
            clusters, whose size divides the grid's x size; its last two parameters are
            `unsigned* report` and `unsigned tag`. If it times out at the t-th of its steps, it
            writes tag + min(t, 2^24 - 1) to `report`, in one store.
        :param arguments: the arguments before these two.
        :raises RuntimeError: its blocks cannot all be resident; nothing is launched.
        """
        with self._lock:
            capacity = self._capacity(kernel, shape)
            if shape.blocks > capacity:
                raise RuntimeError(
                    f"kernel {name}: {shape.blocks} blocks of {shape.threads} threads and "
                    f"{shape.shared} bytes{_in_clusters(shape)} wait for each other, and the "
                    f"device holds {capacity}"
                )
            self._prepare()
            stream = self._cupy.cuda.get_current_stream()
            stream.wait_event(self._last)
            tag = self._number(name) << STEP_BITS
            report = np.uint64(self._memory.ptr), np.uint32(tag)
            kernel(shape.grid, (shape.threads,), (*arguments, *report), shared_mem=shape.shared)
            self._last.record(stream)

    def check(self) -> None:
        """Raise once if a kernel has timed out; one comparison, without waiting for the device.

        :raises KernelStoppedError: naming the kernel and the step.
        """
        if not self._word[0]:
            return
        with self._lock:
            number, step = divmod(int(self._word[0]), 1 << STEP_BITS)
            self._word[0] = 0
        if number:  # else another thread has reported it
            raise KernelStoppedError(
                f"kernel {self._names[number - 1]} timed out at step {step}: a block waited too "
                "long for another. Its results, and everything computed from them, are NaN"
            )

    def _prepare(self) -> None:
        """Create the event and the report at the first launch: page-locking memory is slow."""
        if self._memory is None:
            self._last = self._cupy.cuda.Event(disable_timing=True)
            # not from CuPy's pool, whose allocator users may change; accessible from every device
            self._memory = self._cupy.cuda.PinnedMemory(4)
            pointer = self._cupy.cuda.PinnedMemoryPointer(self._memory, 0)
            self._word = np.frombuffer(pointer, np.uint32)
            self._word[0] = 0

    def _number(self, name: str) -> int:
        """The number of a name in reports, from 1 on."""
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name) + 1

    def _capacity(self, kernel: Any, shape: LaunchShape) -> int:
        """How many blocks of a kernel can be resident; CuPy alone would shrink the grid."""
        key = kernel, shape
        if key not in self._capacities:
            cuda = self._cupy.cuda
            properties = cuda.runtime.getDeviceProperties(self._device)
            # the device's maximum, not this launch's size: the next launch may need more
            most = properties["sharedMemPerBlockOptin"] - kernel.shared_size_bytes
            kernel.max_dynamic_shared_size_bytes = most
            self._capacities[key] = self._count(kernel, shape, properties["multiProcessorCount"])
        return self._capacities[key]

    def _count(self, kernel: Any, shape: LaunchShape, processors: int) -> int:
        pointer = kernel.kernel.ptr
        if shape.cluster == 1:
            most = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
            return int(most(pointer, shape.threads, shape.shared)) * processors
        clusters = driver.active_clusters(pointer, shape.grid, shape.threads, shape.shared)
        return clusters * shape.cluster


def _in_clusters(shape: LaunchShape) -> str:
    return f" in clusters of {shape.cluster}" if shape.cluster > 1 else ""
