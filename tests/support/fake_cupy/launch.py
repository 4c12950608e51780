"""Fake CuPy streams, events, page-locked memory and kernels, for tests of launches.

Nothing runs immediately: launches, records and waits are appended to a stream's queue, and
`Gpu.run` processes the queues in a random order that CUDA allows: block by block, from any stream,
until the device is full. That is harsher than a cooperative launch, whose blocks start all at
once.
"""

from __future__ import annotations

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

STATIC_LIMIT = 48 * 1024  # bytes of shared memory available without opting in


class StarvedError(AssertionError):
    """Blocks wait for others that cannot become resident."""


class Kernel:
    """Like a `cupy.RawKernel`; `effect` is called with the arguments after all blocks have run."""

    def __init__(self, effect: Callable[..., None] = lambda *arguments: None) -> None:
        self.effect = effect
        self.kernel = SimpleNamespace(ptr=id(self))
        self.shared_size_bytes = 16
        self.max_dynamic_shared_size_bytes = STATIC_LIMIT - 16
        self.gpu: Gpu | None = None

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, *, shared_mem: int = 0
    ) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        if not all(isinstance(a, (np.generic, int, float)) or hasattr(a, "_inner") for a in args):
            raise TypeError("Unsupported type")
        assert self.gpu is not None
        self.gpu.put(("launch", int(np.prod(grid)), lambda: self.effect(*args)))


class Event:
    """Like `cupy.cuda.Event`: the latest record counts."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.mark: dict[str, bool] | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.mark = {"done": False}
        (stream or Stream.current()).queue.append(("record", self.mark))


class Stream:
    """Like `cupy.cuda.Stream`: a queue; current inside `with`, in its own thread."""

    _local = threading.local()

    def __init__(self, gpu: Gpu) -> None:
        self.queue: deque[tuple[Any, ...]] = deque()
        gpu.streams.append(self)

    def __enter__(self) -> Stream:
        Stream._local.stream = self
        return self

    def __exit__(self, *error: Any) -> None:
        del Stream._local.stream

    @classmethod
    def current(cls) -> Stream:
        return cls._local.stream

    def wait_event(self, event: Event) -> None:
        if event.mark is not None:
            self.queue.append(("wait", event.mark))


class PinnedMemory:
    """Like `cupy.cuda.PinnedMemory`, with arbitrary initial content."""

    def __init__(self, size: int, flags: int = 0) -> None:
        self.bytes = np.full(size, 0xA5, np.uint8)
        self.ptr = self.bytes.ctypes.data


class Gpu:
    """A device that holds a number of blocks, and a fake module `cupy` for it."""

    def __init__(self, processors: int, each: int = 1) -> None:
        self.capacity = processors * each
        self.streams: list[Stream] = []
        properties = {"multiProcessorCount": processors, "sharedMemPerBlockOptin": 232448}
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(
                Event=Event,
                PinnedMemory=PinnedMemory,
                PinnedMemoryPointer=lambda memory, offset: memoryview(memory.bytes)[offset:],
                get_current_stream=Stream.current,
                runtime=SimpleNamespace(getDeviceProperties=lambda device: properties),
                driver=SimpleNamespace(
                    occupancyMaxActiveBlocksPerMultiprocessor=lambda ptr, threads, shared: each
                ),
            )
        )

    def kernel(self, effect: Callable[..., None] = lambda *arguments: None) -> Kernel:
        kernel = Kernel(effect)
        kernel.gpu = self
        return kernel

    def put(self, task: tuple[Any, ...]) -> None:
        Stream.current().queue.append(task)

    def run(self, seed: int) -> None:
        """Run the queued operations, in random order.

        :raises StarvedError: some of them can never run.
        """
        rng, free, placed = random.Random(seed), self.capacity, dict.fromkeys(self.streams, 0)
        while busy := [stream for stream in self.streams if stream.queue]:
            ready = [stream for stream in busy if self._may_go_on(stream.queue[0], free)]
            if not ready:
                raise StarvedError(f"{len(busy)} streams wait, {free} of {self.capacity} free")
            stream = rng.choice(ready)
            kind, *what = stream.queue[0]
            if kind == "launch":
                placed[stream], free = placed[stream] + 1, free - 1
                if placed[stream] < what[0]:
                    continue
                placed[stream], free = 0, free + what[0]
                what[1]()
            elif kind == "record":
                what[0]["done"] = True
            stream.queue.popleft()

    @staticmethod
    def _may_go_on(task: Sequence[Any], free: int) -> bool:
        return {"launch": free > 0, "record": True}.get(task[0]) or (
            task[0] == "wait" and task[1]["done"]
        )


def times_out(step: int) -> Callable[..., None]:
    """The effect of a kernel that times out at `step`, for `CooperativeKernels.launch`."""

    def effect(*arguments: Any) -> None:
        report, tag = arguments[-2:]
        ctypes.c_uint32.from_address(int(report)).value = int(tag) + step

    return effect
