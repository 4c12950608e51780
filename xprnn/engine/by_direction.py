"""A layer whose directions have different cells: each is run by the runner of its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.passes import Activations, BackwardPass, ForwardPass
from ..kernels.interface import CallContext, LayerRunner, Pass, RunnerCosts, Sizes


class ByDirection:
    """Runs each direction by the runner of its cell.

    :param runners: of the forward and the reverse direction.
    """

    def __init__(self, runners: Sequence[LayerRunner]) -> None:
        self.runners: tuple[LayerRunner, ...] = tuple(runners)
        self.costs: RunnerCosts = self.runners[0].costs

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Each direction separately."""
        return [range(d, d + 1) for d in range(directions)]

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""
        return [
            activations
            for direction in passes
            for activations in self.runners[direction.reverse].forward([direction], call)
        ]

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""
        for direction in passes:
            self.runners[direction.reverse].backward([direction], call)
