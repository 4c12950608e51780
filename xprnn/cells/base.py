"""What every cell has in common: its weights, its sizes, and the buffers of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..backend import Array


class Weights(NamedTuple):
    """The weights of one direction of one layer, in torch's layout, or their gradients.

    A bias is None where the layer has none; in a set of gradients None also stands for a
    frozen parameter, whose gradient nobody wants. For that the fields are Any.
    """

    weight_ih: Any  # (G*H, I)
    weight_hh: Any  # (G*H, H)
    bias_ih: Any  # (G*H,)
    bias_hh: Any  # (G*H,)


class Buffers(NamedTuple):
    """The arrays that one step of a direction works on; `Cell` says what they hold."""

    gates: Array
    saved: Array
    states: tuple[Array, ...]
    next_states: tuple[Array, ...]
    dstates: tuple[Array, ...]  # none in a forward step
    scratch: tuple[Array, ...]


class Cell:
    """One step of a recurrent network and its gradient, in plain `xp`, on caller-owned arrays.

    A step maps a tuple of states, `(h,)` or `(h, c)`, each (N, H), to the next one; item 0
    is the output. `forward` inverts into `backward`: both walk over the same four buffers.

    =============  ============  =====  ==========================  ===========================
    buffer         shape         dtype  forward                     backward
    =============  ============  =====  ==========================  ===========================
    `gates`        (N, G*H)      T      read as gx, then = gates    read, then = dgh
    `saved`        (N, saved*H)  T      =                           read, for GRU then = dgx_n
    `states`       (N, H) each   T, A   read                        read
    `next_states`  (N, H) each   T, A   =                           read
    `dstates`      (N, H) each   A      -                           read as dnext, then = dstates
    `scratch`      see below     A      =                           =
    =============  ============  =====  ==========================  ===========================

    gx, the input side x W_ih' + b_ih, arrives with the recurrent bias of the first `folded`
    gates already added (they only ever occur as a sum). dgh is the gradient of the recurrent
    side; `to_input_side` turns it into dgx, the gradient of the input side, in place.

    T is the type of what a matrix product reads, h and the gates, A that of everything else,
    the LSTM's c and all gradients that are carried on. They are one, float32 or float64,
    unless the layer computes in a narrow type. Rows are contiguous.

    A step is a product and, before or behind it, what is done element by element: the methods
    named in `parts`. They are the seam at which a fused kernel takes over; a cell with one
    product a step has the two below, another one its own.
    """

    name: str
    gate_names: tuple[str, ...]  # in the order of the weights' blocks
    folded: int  # leading gates whose recurrent bias may be added on the input side
    saved: int = 0  # width of `saved`, in units of H
    state_names: tuple[str, ...] = ("h",)
    forward_scratch: tuple[int, ...]  # widths of the scratch arrays, in units of H
    backward_scratch: tuple[int, ...]
    # what `backward` reads and writes of a trace; h' is the next h
    undoing_reads: tuple[str, ...]
    undoing_writes: tuple[str, ...] = ("gates",)
    parts: tuple[str, ...] = ("forward_gates", "backward_gates")
    # array operations of a step forward and backward, on a GPU a launch each; None: not counted
    launches: tuple[int, int] | None = None

    @property
    def gates(self) -> int:
        """G, the number of gates."""
        return len(self.gate_names)

    def input_bias(self, weights: Weights, dtype: Any) -> Array | None:
        """b_ih, and b_hh of the gates in which the two only occur as a sum; a new array (G*H,)."""
        if weights.bias_ih is None or weights.bias_hh is None:
            return None
        bias = weights.bias_ih.copy()
        folded = self.folded * weights.weight_hh.shape[1]
        bias[:folded] += weights.bias_hh[:folded]
        return bias.astype(dtype, copy=False)

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Take one step; the buffers are those of the class's table."""
        gh = step.scratch[0]
        xp.matmul(step.states[0], weights.weight_hh.T, out=gh)
        self.forward_gates(xp, weights.bias_hh, gh, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Invert the step that `forward` took; the buffers are those of the class's table."""
        self.backward_gates(xp, step)
        xp.matmul(step.gates, weights.weight_hh, out=step.dstates[0])

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """From gx and gh to the gates and the next states.

        `bias_hh` (G*H,), or in plain code (N, G*H), is read, `gh` (N, G*H) used up.
        """
        raise NotImplementedError

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """From dnext to dgh and the part of `dstates` that does not go through the product.

        A dh of which nothing is left is used up.
        """
        raise NotImplementedError

    def to_input_side(self, dgates: Array, saved: Array) -> None:
        """Turn dgh (S, G*H) into dgx in place, for all steps at once; most cells have one for both.

        `dgates` is read and overwritten, `saved` read.
        """

    def recurrent_gradient(
        self, xp: Any, dgh: Array, states: Array, saved: Array, dweight_hh: Array
    ) -> None:
        """The gradient of W_hh over all steps at once: dW_hh = dgh' h.

        `dgh` (S, G*H), `states` (S, H), the h that each step read, and `saved` are read;
        `dweight_hh` (G*H, H) is written.
        """
        xp.matmul(dgh.T, states, out=dweight_hh)
