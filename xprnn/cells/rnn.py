"""The Elman cell: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990)."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..core.cell import Buffers, Cell


class RNN(Cell):
    """The Elman cell with tanh or relu, as torch's RNNCell defines it.

    forward::

        gx = x W_ih' + b_ih + b_hh
        gh = h W_hh'
        a = gx + gh
        h_next = tanh(a)   or   max(a, 0)

    backward::

        da = dh_next (1 - h_next^2)   or   dh_next [h_next > 0]
        dgx = dgh = da
        dh = da W_hh
    """

    gate_names: tuple[str, ...] = ("",)  # the only block, unnamed
    bias_folded_gates: int = 1
    forward_scratch: tuple[int, ...] = (1,)
    backward_scratch: tuple[int, ...] = ()
    backward_reads: tuple[str, ...] = ("h'",)

    def __init__(self, nonlinearity: str) -> None:
        self.name: str = f"rnn_{nonlinearity}"
        self.relu: bool = nonlinearity == "relu"
        self.has_kinks: bool = self.relu
        self.kernel_launches: tuple[int, int] | None = (3, 3) if self.relu else (3, 4)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """Compute h_next from gx and gh; see `Cell` for the buffers."""
        (h_next,) = step.next_states
        gh += step.gates
        if self.relu:
            xp.maximum(gh, 0.0, out=h_next)
        else:
            xp.tanh(gh, out=h_next)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """Compute dgh from dnext; see `Cell` for the buffers. `gates` is out: h_next suffices."""
        (h_next,), (dh,), gates = step.next_states, step.dstates, step.gates
        if self.relu:
            xp.sign(h_next, out=gates)
        else:
            xp.multiply(h_next, h_next, out=gates)
            xp.subtract(1.0, gates, out=gates)
        gates *= dh
