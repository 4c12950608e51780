"""Steps kept ready for calls of one step that are not recorded, of a cell or a layer on a CPU.

Most of such a call is then arithmetic.
"""

from __future__ import annotations

from threading import get_ident
from typing import NamedTuple

from . import kernels
from .arithmetic import PrecisionPolicy
from .backend import Array, Backend
from .locking import WRITER
from .network import StackSpec
from .parameters import Parameters
from .stack_steps import StepExecutor

KNOWN = 1024  # batch sizes of which `_Size` is remembered; with one more they are forgotten
# A layer's larger calls go the sequence's way: their products take most of the time, and a step
# would keep memory for so many rows, and copies of the weights.
ROWS = 64
PRODUCTS = 2_000_000  # multiply-adds of a layer's step by array calls, for several rows
PRODUCTS_OF_ONE = 4_000_000  # for one row, to whose products contiguous columns mean more


class _Size(NamedTuple):
    """What is known of the steps of a batch size."""

    free: list[StepExecutor]  # those that are not in use
    short: bool  # whether a layer's call is faster this way


class StepPool:
    """Takes steps of a stack from states that are given.

    For each implementation there are as many `StepExecutor` as threads have been at work at once:
    lists from which a call takes one, of whatever batch size it was last, and puts it back.
    Compiled ones share the packed weights, the others have copies of their own.
    """

    def __init__(self, net: StackSpec, backend: Backend) -> None:
        self._net, self._backend = net, backend
        self._free: dict[tuple[str, str], list[StepExecutor]] = {}
        self._sizes: dict[tuple[int, str], _Size] = {}

    def engine(self, arithmetic: PrecisionPolicy, batch: int) -> kernels.ExecutionPlan:
        """Who takes a step of this many rows in these types."""
        net = self._net
        sizes = net.num_layers, batch, net.input_size, net.hidden_size
        return kernels.plan_step(net.cell, self._backend, arithmetic, sizes)

    def is_short(self, arithmetic: PrecisionPolicy, batch: int, forced: str) -> bool:
        """Whether a layer's call of one step of so many rows is faster this way."""
        if batch > ROWS:
            return False
        size = self._sizes.get((batch, forced)) or self._size(arithmetic, batch, forced)
        return size.short

    def take(
        self,
        arithmetic: PrecisionPolicy,
        parameters: Parameters,
        x: Array,
        initial: tuple[Array | None, ...] | None,
        forced: str,
        cell: bool = False,
    ) -> tuple[Array, ...]:
        """The last layer's next h (N, H), and all next states (L, N, H): new arrays.

        :param x: (N, I), any strides; read.
        :param initial: (L, N, H) each, or (N, H) where there is one layer, None for zeros; None:
            all are. Read.
        :param forced: what `kernels.asked` gives now, on which `engine` depends.
        :param cell: there is one layer; after h only the other states are returned, (N, H) each.
        """
        batch = x.shape[0]
        size = self._sizes.get((batch, forced)) or self._size(arithmetic, batch, forced)
        free = size.free
        try:
            steps = free.pop()
        except IndexError:  # the first call, or other threads have them
            steps = StepExecutor(self.engine(arithmetic, batch), self._net, batch)
            steps.bind(parameters)
        if steps.batch != batch:
            steps.resize(batch)
        for k, state in enumerate(steps.sides[0]):
            given = None if initial is None else initial[k]
            state[...] = 0.0 if given is None else given
        reading, me = parameters.reading, get_ident()
        readers = reading.readers
        try:  # as `with reading:`, in less time
            readers.add(me)
            if WRITER in readers:
                reading.wait_for_writers(me)
            steps.follow(parameters)
            h = steps.take(0, x, None, None)
        finally:
            readers.discard(me)
            if WRITER in readers:
                reading.notify_writers()
        after = steps.sides[1]
        if cell:
            final = [state[0].copy() for state in after[1:]]
        else:
            final = [state.copy() for state in after]
        free.append(steps)
        return (h, *final)

    def _size(self, arithmetic: PrecisionPolicy, batch: int, forced: str) -> _Size:
        """What is to be known of a batch size."""
        if len(self._sizes) >= KNOWN:
            self._sizes = {}
        net, engine = self._net, self.engine(arithmetic, batch)
        products = batch * (net.widest_input + net.hidden_size) * net.hidden_size * net.cell.gates
        most = PRODUCTS_OF_ONE if batch == 1 else PRODUCTS
        short = engine.implementation == "sequence" or products <= most
        free = self._free.setdefault((engine.implementation, forced), [])
        return self._sizes.setdefault((batch, forced), _Size(free, short))
