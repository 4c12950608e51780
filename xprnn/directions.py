"""What a direction of a layer works on in a call: the work of `sequence.py` and its kernels."""

from __future__ import annotations

from dataclasses import dataclass

from .backend import Array
from .cells import Weights


@dataclass(frozen=True, slots=True)
class Trace:
    """What the steps of one direction of one layer leave behind for `backward`.

    All are of the compute dtype but the states after the first, which no product reads.
    """

    x: Array  # (S, I) the layer's input
    gates: Array  # (S, G*H)
    saved: Array  # (S, saved*H)
    states: tuple[Array, ...]  # (n_0 + S, H) each


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction that is to be run."""

    weights: Weights  # read
    reverse: bool
    ends: tuple[Array, ...]  # (N, H) each: the initial states, read, then = the final ones


@dataclass(frozen=True, slots=True)
class Undoing:
    """A direction that is to be undone."""

    weights: Weights  # read
    reverse: bool
    trace: Trace  # used up: its gates and saved are overwritten
    doutput: Array | None  # (S, H) read; None stands for zeros
    dstates: tuple[Array, ...]  # (N, H) each: of the final states, read, then = of the initial ones
    dweights: Weights  # every entry that is not None is written
    dx: Array | None  # (S, I), if given, is written
    flow: Array | None = None  # (T,), if given, = the norm of what reaches the state after a step
