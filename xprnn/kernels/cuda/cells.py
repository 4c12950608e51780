"""The cells with fused pointwise operations: each method between two products is one kernel.

The equations, and the use of each buffer, are those of the cells in `cells/`.
"""

from __future__ import annotations

from typing import Any

from ...backend import Array
from ...cells import Buffers, Cell, Weights, gru, lstm, rnn
from .pointwise import launch


class RNN(rnn.RNN):
    """`cells.RNN` with fused pointwise operations; `forward_gates` only reads gates."""

    def __init__(self, nonlinearity: str) -> None:
        super().__init__(nonlinearity)
        self.kernel_launches: tuple[int, int] | None = (2, 2)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (h_next,) = step.next_states
        launch(xp, f"{self.name}_forward_gates", h_next.shape, step.gates, gh, h_next)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (h_next,), (dh,) = step.next_states, step.dstates
        launch(xp, f"{self.name}_backward_gates", dh.shape, h_next, dh, step.gates)


class GRU(gru.GRU):
    """`cells.GRU` with fused pointwise operations."""

    backward_scratch: tuple[int, ...] = ()
    kernel_launches: tuple[int, int] | None = (2, 2)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (h,), (h_next,) = step.states, step.next_states
        outputs = step.gates, step.saved, h_next
        if bias_hh is None:
            launch(xp, "gru_forward_gates", h.shape, gh, h, *outputs)
        else:
            launch(xp, "gru_forward_gates_bias", h.shape, gh, h, bias_hh, *outputs)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """See `Cell`; the product is accumulated into dh."""
        self.backward_gates(xp, step)
        xp.add_matmul(step.gates, weights.weight_hh, step.dstates[0])

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (h,), (dh,) = step.states, step.dstates
        launch(xp, "gru_backward_gates", h.shape, h, step.gates, step.saved, dh)


class GRUResetBefore(gru.GRUResetBefore):
    """`cells.GRUResetBefore` with fused pointwise operations."""

    backward_scratch: tuple[int, ...] = (1,)
    kernel_launches: tuple[int, int] | None = (4, 4)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """See `Cell`; the second product is accumulated into dh."""
        (dh,), (dq,) = step.dstates, step.scratch
        gates, H = step.gates, dh.shape[1]
        self.backward_candidate(xp, step)
        xp.matmul(gates[:, 2 * H :], weights.weight_hh[2 * H :], out=dq)
        self.backward_reset(xp, dq, step)
        xp.add_matmul(gates[:, : 2 * H], weights.weight_hh[: 2 * H], dh)

    def forward_reset(self, xp: Any, gh_rz: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,) = step.states
        launch(xp, "gru_forward_reset", h.shape, gh_rz, h, step.gates, step.saved)

    def forward_candidate(self, xp: Any, gh_n: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (h_next,) = step.states, step.next_states
        launch(xp, "gru_forward_candidate", h.shape, gh_n, h, step.gates, h_next)

    def backward_candidate(self, xp: Any, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = step.states, step.dstates
        launch(xp, "gru_backward_candidate", h.shape, h, step.gates, dh)

    def backward_reset(self, xp: Any, dq: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = step.states, step.dstates
        launch(xp, "gru_backward_reset", h.shape, dq, h, step.gates, dh)


class LSTM(lstm.LSTM):
    """`cells.LSTM` with fused pointwise operations."""

    backward_scratch: tuple[int, ...] = ()
    kernel_launches: tuple[int, int] | None = (2, 2)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (_, c), (h_next, c_next) = step.states, step.next_states
        outputs = step.gates, step.saved, h_next, c_next
        launch(xp, "lstm_forward_gates", c.shape, gh, c, *outputs)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (_, c), (dh, dc) = step.states, step.dstates
        launch(xp, "lstm_backward_gates", c.shape, step.saved, c, dh, step.gates, dc)


POINTWISE: dict[str, Cell] = {
    cell.name: cell for cell in (RNN("tanh"), RNN("relu"), GRU(), GRUResetBefore(), LSTM())
}
