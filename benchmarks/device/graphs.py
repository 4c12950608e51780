"""CUDA graphs of single launches: what is left of a launch when nothing is prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from xprnn.backend.cupy import CupyBackend

TAG = 1 << 24  # what a kernel that gives up adds its step to


class NotCapturedError(RuntimeError):
    """There is no graph; the message says why."""


def captured(backend: CupyBackend, work: Callable[[], object]) -> Any:
    """A graph of what `work` launches on the current stream; nothing of it runs.

    :raises NotCapturedError: CuPy or CUDA refuses it.
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
    """A call that takes a stepper's next step by a graph of its launch.

    `step` is called twice, from one side of the states to the other and back; a graph of each has
    its turn. Between such calls it may only be called an even number of times. A kernel that gives
    up leaves NaN and tells nobody.

    :param step: takes the stepper's next step, in one launch, on the same arrays every time.
    :raises NotCapturedError: it is not one launch, or there is no graph of it.
    """
    launches: list[Any] = []
    genuine = backend.cooperative.launch

    def launch(*arguments: Any) -> None:
        genuine(*arguments)
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
        given = *arguments, report, np.uint32(TAG)
        work = partial(kernel, shape.grid, (shape.threads,), given, shared_mem=shape.shared)
        calls.append(_Replay(captured(backend, work), given))
    turns = cycle(calls)
    return lambda: next(turns)()


class _Replay:
    """A graph, and the arrays that it works on: it knows their addresses only."""

    def __init__(self, graph: Any, arrays: tuple[Any, ...]) -> None:
        self.graph, self.arrays = graph, arrays

    def __call__(self) -> None:
        self.graph.launch()
