"""The Elman cell: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990)."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from .base import Buffers, Cell


class RNN(Cell):
    """The Elman cell with tanh or relu, as torch's RNNCell defines it.

    forward::

        a  = gx + h W_hh'                     gx = x W_ih' + b_ih + b_hh
        h' = tanh(a)   or   max(a, 0)

    backward::

        da = dh' (1 - h'^2)   or   dh' [h' > 0]
        dgx = dgh = da
        dh = da W_hh
    """

    gate_names: tuple[str, ...] = ("",)  # its one block has no name
    folded: int = 1
    forward_scratch: tuple[int, ...] = (1,)
    backward_scratch: tuple[int, ...] = ()
    undoing_reads: tuple[str, ...] = ("h'",)

    def __init__(self, nonlinearity: str) -> None:
        self.name: str = f"rnn_{nonlinearity}"
        self.relu: bool = nonlinearity == "relu"
        self.launches: tuple[int, int] | None = (3, 3) if self.relu else (3, 4)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """From gx and gh to the gates and the next states; see `Cell` for the buffers."""
        (h_next,) = step.next_states
        gh += step.gates
        if self.relu:
            xp.maximum(gh, 0.0, out=h_next)
        else:
            xp.tanh(gh, out=h_next)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """From dnext to dgh; see `Cell` for the buffers. `gates` is not read: h' says all."""
        (h_next,), (dh,), gates = step.next_states, step.dstates, step.gates
        if self.relu:
            xp.sign(h_next, out=gates)
        else:
            xp.multiply(h_next, h_next, out=gates)
            xp.subtract(1.0, gates, out=gates)
        gates *= dh
