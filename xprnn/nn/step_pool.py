"""Prepared step executors for unrecorded calls of one step, of a cell or a layer on a CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from .. import kernels
from ..backend import Array, Backend
from ..core.precision import PrecisionPolicy
from ..core.spec import StackSpec
from ..engine.step import StepExecutor
from ..kernels import StepPlan
from ..kernels.request import Request
from .parameters import Parameters

MAX_SIZES = 1024  # batch sizes for which `_Size` is cached; then all are dropped
# A layer's larger calls are run as sequences: their products take most of the time, and a step
# executor would keep memory for as many rows, and copies of the weights
MAX_ROWS = 64
MAX_MULTIPLY_ADDS = 2_000_000  # of a layer's step by array calls, for several rows
MAX_MULTIPLY_ADDS_OF_ONE = 4_000_000  # for one row, which gains more from contiguous columns


class _Size(NamedTuple):
    """The executors for a batch size, and whether they are used."""

    free: list[StepExecutor]  # those that are not in use
    is_run: bool  # whether calls are run as steps


class StepPool:
    """Runs steps of a stack from given states.

    For each implementation there is a list of executors, from which a call takes one, last used for
    any batch size, and to which it returns it: as many as threads have called at the same time.
    Compiled ones share the packed weights, the others have their own copies. The caller excludes
    writes of the parameters.

    :param requests: names of the requests for which calls are run as steps.
    :param only_short: whether large calls are run as sequences.
    """

    def __init__(
        self,
        spec: StackSpec,
        backend: Backend,
        precision: PrecisionPolicy,
        requests: Collection[str],
        only_short: bool,
    ) -> None:
        self._spec, self._backend, self._precision = spec, backend, precision
        self._requests, self._only_short = requests, only_short
        self._begin = spec.cell.initial_values
        self._free: dict[tuple[str, Request], list[StepExecutor]] = {}
        self._sizes: dict[tuple[int, Request], _Size] = {}

    def plan(self, batch: int) -> StepPlan:
        """The plan of a step of `batch` rows."""
        return kernels.plan_step(self._spec, self._backend, self._precision, batch)

    def size(self, batch: int) -> _Size | None:
        """The executors for calls of one step of `batch` rows; None: they are run as sequences."""
        if self._only_short and batch > MAX_ROWS:
            return None
        request = kernels.requested()
        size = self._sizes.get((batch, request)) or self._size(batch, request)
        return size if size.is_run else None

    def _size(self, batch: int, request: Request) -> _Size:
        if request.name not in self._requests:
            return _Size([], False)
        if len(self._sizes) >= MAX_SIZES:
            self._sizes = {}
        spec, plan = self._spec, self.plan(batch)
        width = (spec.widest_input + spec.hidden_size) * spec.cell.gates
        limit = MAX_MULTIPLY_ADDS_OF_ONE if batch == 1 else MAX_MULTIPLY_ADDS
        is_run = not self._only_short or plan.is_fused or batch * width * spec.hidden_size <= limit
        free = self._free.setdefault((plan.implementation, request), [])
        return self._sizes.setdefault((batch, request), _Size(free, is_run))

    def run_cell(
        self,
        size: _Size,
        parameters: Parameters,
        x: Array,
        initial: tuple[Array | None, ...] | None,
        inputs: tuple[Array, ...] = (),
    ) -> tuple[Array, ...]:
        """All next states of the only layer, (N, H) each: new arrays.

        :param x: in: (N, I), any strides.
        :param initial: in: (N, H) each, None for the cell's initial values; None: all.
        :param inputs: in: the cell's extra inputs, N numbers each.
        """
        steps, h = self._run(size, parameters, x, initial, inputs)
        others = [state[0].copy() for state in steps.sides[1][1:]]
        size.free.append(steps)
        return (h, *others)

    def run_layers(
        self,
        size: _Size,
        parameters: Parameters,
        x: Array,
        initial: tuple[Array | None, ...] | None,
        inputs: tuple[Array, ...] = (),
    ) -> tuple[Array, tuple[Array, ...]]:
        """The last layer's next h (N, H), and all next states (L, N, H) each: new arrays.

        :param x: in: (N, I), any strides.
        :param initial: in: (L, N, H) each, None for the cell's initial values; None: all.
        :param inputs: in: the cell's extra inputs, N numbers each.
        """
        steps, h = self._run(size, parameters, x, initial, inputs)
        final = tuple([state.copy() for state in steps.sides[1]])
        size.free.append(steps)
        return h, final

    def _run(
        self,
        size: _Size,
        parameters: Parameters,
        x: Array,
        initial: tuple[Array | None, ...] | None,
        inputs: tuple[Array, ...] = (),
    ) -> tuple[StepExecutor, Array]:
        """An executor that has run a step, and the last layer's next h."""
        batch = x.shape[0]
        try:
            steps = size.free.pop()
        except IndexError:  # the first call, or other threads use them
            steps = StepExecutor(self.plan(batch), self._spec, batch)
            steps.bind(parameters)
        if steps.batch != batch:
            steps.resize(batch)
        begin = self._begin
        values = begin if initial is None else initial
        for k, state in enumerate(steps.sides[0]):  # `zip` takes longer
            value = values[k]
            state[...] = begin[k] if value is None else value
        steps.follow(parameters)
        return steps, steps.run(0, x, None, None, inputs)
