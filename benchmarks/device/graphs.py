"""CUDA graphs of single launches: a launch without the preparation of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from xprnn.backend.cupy import CupyBackend

TAG = 1 << 24  # a kernel that times out reports this plus its step


class NotCapturedError(RuntimeError):
    """A graph cannot be captured; the message gives the reason."""


def captured(backend: CupyBackend, work: Callable[[], object]) -> Any:
    """A graph of the kernels that `work` launches on the current stream, which do not run.

    :raises NotCapturedError: CuPy or CUDA does not support it.
    """
    try:
        with backend.xp.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            try:
                work()
            finally:
                graph = stream.end_capture()
    except RuntimeError as error:
        raise NotCapturedError(f"not captured: {error}") from error
    return graph


def replayed(step: Callable[[], object], backend: CupyBackend) -> Callable[[], object]:
    """A call that runs a stepper's next step by replaying a graph of its launch.

    A stepper has two buffers of states; `step` is called twice, once in each direction between
    them, and the two graphs are replayed alternately. Between replays `step` must be called an even
    number of times. A kernel that times out leaves NaN without an error.

    :param step: runs the stepper's next step, in one launch, on the same arrays every time.
    :raises NotCapturedError: it is not a single launch, or cannot be captured.
    """
    launches: list[Any] = []
    original = backend.cooperative.launch

    def launch(*arguments: Any) -> None:
        original(*arguments)
        launches.append(arguments)

    backend.cooperative.launch = launch  # type: ignore[method-assign]
    try:
        step()
        step()
    finally:
        del backend.cooperative.launch
    if len(launches) != 2:
        raise NotCapturedError(f"not captured: two steps were {len(launches)} cooperative launches")
    report = backend.xp.zeros(1, "uint32")
    calls = []
    for _, kernel, shape, arguments in launches:
        values = *arguments, report, np.uint32(TAG)
        work = partial(kernel, shape.grid, (shape.threads,), values, shared_mem=shape.shared)
        calls.append(_Replay(captured(backend, work), values))
    alternating = cycle(calls)
    return lambda: next(alternating)()


class _Replay:
    """A graph and its arrays, kept alive because the graph holds their addresses only."""

    def __init__(self, graph: Any, arrays: tuple[Any, ...]) -> None:
        self.graph, self.arrays = graph, arrays

    def __call__(self) -> None:
        self.graph.launch()
