"""The arguments of a call and of a pass over a direction, saved activations and packed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array
from .cell import Weights


class Call(NamedTuple):
    """Checked arguments of a forward call, with a batch dimension."""

    x: Array  # (T, N, I) or, batch first, (N, T, I)
    initial: tuple[Array | None, ...] | None  # (L*D, N, H) each; None: zeros
    lengths: np.ndarray | None  # (N,)
    batch_first: bool
    batched: bool  # whether the caller's arrays had a batch dimension
    sizes: tuple[int, int]  # T and N
    inputs: tuple[Array, ...] = ()  # the cell's extra inputs, (T, N, 1) each, laid out as x
    sequence: int | None = None  # selects masks that all steps share; None: the number of the call


@dataclass(slots=True)
class PackedWeights:
    """The weights of a direction in the layouts that kernels read, until the next write."""

    entries: dict[str, Any] = field(default_factory=dict)  # by use
    reusable: dict[str, Any] = field(default_factory=dict)  # buffers of an older version

    def get(self, use: str, make: Callable[[Any], Any]) -> Any:
        """The entry for a use; made if it is missing, in a reusable buffer or with None.

        An entry is complete before it is stored, because other threads may read it. If it is
        missing in two threads, each makes one, in separate memory.
        """
        entry = self.entries.get(use)
        if entry is None:
            entry = self.entries[use] = make(self.reusable.pop(use, None))
        return entry

    def invalidated(self) -> PackedWeights:
        """An empty copy, for weights that are about to be written; it reuses the buffers."""
        return PackedWeights(reusable={**self.reusable, **self.entries})


class PackedWeightsCache(dict[tuple[int, int], PackedWeights]):
    """The packed weights of a stack, by layer and direction."""

    def __missing__(self, key: tuple[int, int]) -> PackedWeights:
        """Those of a direction without an entry."""
        return self.setdefault(key, PackedWeights())

    def invalidated(self) -> PackedWeightsCache:
        """A copy with invalidated entries, for weights that are about to be written."""
        # from a list: other threads may add entries
        return PackedWeightsCache([(key, packed.invalidated()) for key, packed in [*self.items()]])


class StackWeights(NamedTuple):
    """The weights of a stack, by layer and direction, and their packed copies."""

    arrays: list[list[Weights]]
    packed: PackedWeightsCache


class Activations(NamedTuple):
    """What the steps of a direction save for its backward pass.

    All have the compute dtype, except the states after the first, which no product reads.
    """

    x: Array  # (S, I) the layer's input
    gates: Array  # (S, G*H)
    saved: Array  # (S, saved*H)
    states: tuple[Array, ...]  # (n_0 + S, H) each, or of the cell's `state_sizes`


class Extra(NamedTuple):
    """What the steps of a direction read besides x and states."""

    inputs: tuple[Array, ...]  # (S, 1) each
    # of the masks, which are drawn from them; in eval mode the keys are empty
    step_key: tuple[int, ...] = ()
    sequence_key: tuple[int, ...] = ()
    time: Any = None  # (S,), the step of each packed row
    row: Any = None  # (S,), the caller's row

    def part(self, rows: slice) -> Extra:
        """That of some packed rows."""
        inputs = tuple([each[rows] for each in self.inputs])
        if not self.step_key:
            return self._replace(inputs=inputs)
        return self._replace(inputs=inputs, time=self.time[rows], row=self.row[rows])


class ForwardPass(NamedTuple):
    """The forward pass of a direction."""

    weights: Weights  # in
    reverse: bool
    x: Array  # in: (S, I)
    ends: tuple[Array, ...]  # inout: (N, H) each, the initial states -> the final states
    packed: PackedWeights  # of the weights; inout: kernels add to it
    output: Array | None = None  # out, if given: (S, H), any row stride
    extra: Extra | None = None  # in


class BackwardPass(NamedTuple):
    """The backward pass of a direction."""

    weights: Weights  # in
    reverse: bool
    activations: Activations  # its gates and saved are overwritten
    doutput: Array | None  # in: (S, H), any row stride; None stands for zeros
    dstates: tuple[Array, ...]  # inout: (N, H) each, of the final states -> of the initial states
    dweights: Weights  # out, where an entry is not None
    dx: Array | None  # out, if given: (S, I)
    packed: PackedWeights  # of the weights; inout: kernels add to it
    norms: Array | None = None  # out, if given: (T,) norm of the gradient of each step's states
    extra: Extra | None = None  # in
