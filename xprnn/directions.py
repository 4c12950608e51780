"""What a direction of a layer works on in a call: the work of `sequence.py` and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .backend import Array
from .cells import Weights


@dataclass(slots=True)
class PackedWeights:
    """What kernels make of a direction's weights, good for as long as these stand."""

    made: dict[str, Any] = field(default_factory=dict)  # by its use
    spare: dict[str, Any] = field(default_factory=dict)  # of weights that stand no more

    def get(self, use: str, make: Callable[[Any], Any]) -> Any:
        """What there is for a use; else what `make` makes, of what it may write over or None.

        It is complete before it is there, for other threads may read it; two that come first each
        make it, in memory of their own.
        """
        found = self.made.get(use)
        if found is None:
            found = self.made[use] = make(self.spare.pop(use, None))
        return found

    def renewed(self) -> PackedWeights:
        """Those of weights that are to be written: nothing is made of them yet."""
        return PackedWeights(spare={**self.spare, **self.made})


class PackedWeightsCache(dict[tuple[int, int], PackedWeights]):
    """The packs of a stack, by layer and direction."""

    def __missing__(self, key: tuple[int, int]) -> PackedWeights:
        """Those of a direction that has none yet."""
        return self.setdefault(key, PackedWeights())

    def renewed(self) -> PackedWeightsCache:
        """Those of weights that are to be written."""
        # a list: other threads may add to this
        return PackedWeightsCache([(key, packs.renewed()) for key, packs in [*self.items()]])


class Activations(NamedTuple):
    """What the steps of one direction of one layer leave behind for `backward`.

    All are of the compute dtype but the states after the first, which no product reads.
    """

    x: Array  # (S, I) the layer's input
    gates: Array  # (S, G*H)
    saved: Array  # (S, saved*H)
    states: tuple[Array, ...]  # (n_0 + S, H) each


class ForwardPass(NamedTuple):
    """A direction that is to be run."""

    weights: Weights  # read
    reverse: bool
    ends: tuple[Array, ...]  # (N, H) each: the initial states, read, then = the final ones
    packs: PackedWeights  # of the weights; read, and added to


class BackwardPass(NamedTuple):
    """A direction that is to be undone."""

    weights: Weights  # read
    reverse: bool
    trace: Activations  # used up: its gates and saved are overwritten
    doutput: Array | None  # (S, H) read; None stands for zeros
    dstates: tuple[Array, ...]  # (N, H) each: of the final states, read, then = of the initial ones
    dweights: Weights  # every entry that is not None is written
    dx: Array | None  # (S, I), if given, is written
    packs: PackedWeights  # of the weights; read, and added to
    flow: Array | None = None  # (T,), if given, = the norm of what reaches the state after a step
