"""A cell's steps on a CPU, kept ready: most of a call that is not recorded is then arithmetic."""

from __future__ import annotations

from . import kernels
from .arithmetic import Arithmetic
from .backend import Array, Backend
from .network import Stack
from .parameters import Parameters
from .stack_steps import StackSteps

MOST = 4  # batch sizes that are kept ready; one more, and all begin anew


class CellSteps:
    """Takes steps of a cell from states that are given.

    For each batch size there are as many `StackSteps` as threads have been at work at once: lists
    from which a call takes one, and puts it back. Compiled ones share the packed weights, the
    others have copies of their own.
    """

    def __init__(self, net: Stack, backend: Backend) -> None:
        self._net, self._backend = net, backend
        self._free: dict[tuple[int, str], list[StackSteps]] = {}

    def engine(self, arithmetic: Arithmetic, batch: int) -> kernels.Engine:
        """Who takes a step of this many rows in these types."""
        net = self._net
        sizes = net.num_layers, batch, net.input_size, net.hidden_size
        return kernels.choose_step(net.cell, self._backend, arithmetic, sizes)

    def take(
        self,
        arithmetic: Arithmetic,
        parameters: Parameters,
        x: Array,
        initial: tuple[Array | None, ...] | None,
        forced: str,
    ) -> tuple[Array, ...]:
        """The next states (N, H) from x (N, I) and the initial ones, None for zeros: new arrays.

        `forced` is what `kernels.asked` gives now: who serves, `engine` says.
        """
        batch = x.shape[0]
        free = self._list(batch, forced)
        try:
            steps = free.pop()
        except IndexError:  # the first call, or another thread has it
            steps = StackSteps(self.engine(arithmetic, batch), self._net, batch)
            steps.bind(parameters)
        for k, state in enumerate(steps.sides[0]):
            value = None if initial is None else initial[k]
            state[0] = 0.0 if value is None else value
        thread = parameters.reading.share()
        try:
            steps.follow(parameters.version, parameters.packs)
            h = steps.take(0, x, None, None)
        finally:
            parameters.reading.leave(thread)
        others = [state[0].copy() for state in steps.sides[1][1:]]
        free.append(steps)
        return (h, *others)

    def _list(self, batch: int, forced: str) -> list[StackSteps]:
        """The steps of a batch size that nobody uses now."""
        free = self._free.get((batch, forced))
        if free is None:
            if len(self._free) >= MOST:
                self._free = {}
            free = self._free.setdefault((batch, forced), [])
        return free
