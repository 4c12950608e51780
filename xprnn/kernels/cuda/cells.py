"""The cells with their parts fused: the same steps, each part of them one kernel.

The equations, and which buffer is read and which written, are those of the plain cells.
"""

from __future__ import annotations

from typing import Any

from ...backend import Array
from ...cells import Cell, Weights, gru, lstm, rnn
from .pointwise import launch


class RNN(rnn.RNN):
    """`cells.RNN` with its parts fused; gates are read in `forward_gates`, not written."""

    def __init__(self, nonlinearity: str) -> None:
        super().__init__(nonlinearity)
        self.launches = (2, 2)

    def forward_gates(
        self,
        xp: Any,
        bias_hh: Array | None,
        gates: Array,
        gh: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (h_next,) = next_states
        launch(xp, f"{self.name}_forward_gates", h_next.shape, gates, gh, h_next)

    def backward_gates(
        self,
        xp: Any,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (h_next,), (dh,) = next_states, dstates
        launch(xp, f"{self.name}_backward_gates", dh.shape, h_next, dh, gates)


class GRU(gru.GRU):
    """`cells.GRU` with its parts fused."""

    backward_scratch = ()
    launches = (2, 2)

    def forward_gates(
        self,
        xp: Any,
        bias_hh: Array | None,
        gates: Array,
        gh: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (h,), (h_next,) = states, next_states
        written = gates, saved, h_next
        if bias_hh is None:
            launch(xp, "gru_forward_gates", h.shape, gh, h, *written)
        else:
            launch(xp, "gru_forward_gates_bias", h.shape, gh, h, bias_hh, *written)

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
        """See `Cell`; the product is added to dh in place."""
        self.backward_gates(xp, gates, saved, states, next_states, dstates, scratch)
        xp.add_matmul(gates, weights.weight_hh, dstates[0])

    def backward_gates(
        self,
        xp: Any,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (h,), (dh,) = states, dstates
        launch(xp, "gru_backward_gates", h.shape, h, gates, saved, dh)


class GRUResetBefore(gru.GRUResetBefore):
    """`cells.GRUResetBefore` with its parts fused."""

    backward_scratch = (1,)
    launches = (4, 4)

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
        """See `Cell`; the second product is added to dh in place."""
        (dh,), (dq,) = dstates, scratch
        H = dh.shape[1]
        self.backward_candidate(xp, gates, states, dstates, scratch)
        xp.matmul(gates[:, 2 * H :], weights.weight_hh[2 * H :], out=dq)
        self.backward_reset(xp, gates, dq, states, dstates, scratch)
        xp.add_matmul(gates[:, : 2 * H], weights.weight_hh[: 2 * H], dh)

    def forward_reset(
        self, xp: Any, gates: Array, gh_rz: Array, saved: Array, states: tuple[Array, ...]
    ) -> None:
        """See `cells.GRUResetBefore`."""
        (h,) = states
        launch(xp, "gru_forward_reset", h.shape, gh_rz, h, gates, saved)

    def forward_candidate(
        self,
        xp: Any,
        gates: Array,
        gh_n: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
    ) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (h_next,) = states, next_states
        launch(xp, "gru_forward_candidate", h.shape, gh_n, h, gates, h_next)

    def backward_candidate(
        self,
        xp: Any,
        gates: Array,
        states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = states, dstates
        launch(xp, "gru_backward_candidate", h.shape, h, gates, dh)

    def backward_reset(
        self,
        xp: Any,
        gates: Array,
        dq: Array,
        states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = states, dstates
        launch(xp, "gru_backward_reset", h.shape, dq, h, gates, dh)


class LSTM(lstm.LSTM):
    """`cells.LSTM` with its parts fused."""

    backward_scratch = ()
    launches = (2, 2)

    def forward_gates(
        self,
        xp: Any,
        bias_hh: Array | None,
        gates: Array,
        gh: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (_, c), (h_next, c_next) = states, next_states
        launch(xp, "lstm_forward_gates", c.shape, gh, c, gates, saved, h_next, c_next)

    def backward_gates(
        self,
        xp: Any,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        next_states: tuple[Array, ...],
        dstates: tuple[Array, ...],
        scratch: tuple[Array, ...],
    ) -> None:
        """See `Cell`."""
        (_, c), (dh, dc) = states, dstates
        launch(xp, "lstm_backward_gates", c.shape, saved, c, dh, gates, dc)


POINTWISE: dict[str, Cell] = {
    cell.name: cell for cell in (RNN("tanh"), RNN("relu"), GRU(), GRUResetBefore(), LSTM())
}
