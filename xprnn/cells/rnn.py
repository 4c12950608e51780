"""The Elman cell: J. L. Elman, "Finding structure in time", Cognitive Science 14 (1990)."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from .base import Cell, Weights


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

    gate_names = ("",)  # its one block has no name
    folded = 1
    forward_scratch = (1,)
    backward_scratch = ()

    def __init__(self, nonlinearity: str) -> None:
        self.name = f"rnn_{nonlinearity}"
        self.relu = nonlinearity == "relu"

    def forward(
        self,
        xp: Any,
        weights: Weights,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """Take one step; see `Cell` for the buffers."""
        (h,), (h_next,), (gh,) = states, next_states, scratch
        xp.matmul(h, weights.weight_hh.T, out=gh)
        gates += gh
        if self.relu:
            xp.maximum(gates, 0.0, out=h_next)
        else:
            xp.tanh(gates, out=h_next)

    def backward(
        self,
        xp: Any,
        weights: Weights,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """Invert one step; see `Cell` for the buffers. `gates` is not read: h' says all."""
        (h_next,), (dh,) = next_states, dstates
        if self.relu:
            xp.sign(h_next, out=gates)
        else:
            xp.multiply(h_next, h_next, out=gates)
            xp.subtract(1.0, gates, out=gates)
        gates *= dh
        xp.matmul(gates, weights.weight_hh, out=dh)
