"""The interface of a cell: its weights, its sizes and the buffers of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..backend import Array


class Weights(NamedTuple):
    """The weights of one direction of one layer, in torch's layout, or their gradients.

    A bias is None where the layer has none; in a set of gradients, None also marks a frozen
    parameter, whose gradient is not computed. The fields are Any for these two meanings of None.
    A cell with other parameters has a named tuple of its own, which begins with these.
    """

    weight_ih: Any  # (G*H, I)
    weight_hh: Any  # (G*H, H)
    bias_ih: Any  # (G*H,)
    bias_hh: Any  # (G*H,)


class Buffers(NamedTuple):
    """The arrays that one step of a direction works on; their contents are listed in `Cell`."""

    gates: Array
    saved: Array
    states: tuple[Array, ...]
    next_states: tuple[Array, ...]
    dstates: tuple[Array, ...]  # empty in a forward step
    scratch: tuple[Array, ...]
    extra: tuple[Array, ...] = ()  # (N, 1) or (N, H): inputs of the step, and in training its masks


class GradientTerm(NamedTuple):
    """Rows of the gradient of a matrix, d' inputs, and of a bias, the sum over rows of d."""

    d: Array | None  # in, (S, rows), any strides; None: the gradient is zero
    inputs: Array | None  # in, (S, K): what the matrix multiplied
    dweight: Array | None  # out, (rows, K), if given
    dbias: Array | None  # out, (rows,), if given


class ScratchSizes(NamedTuple):
    """The widths of the scratch arrays of a step, (N, width) each."""

    numbers: tuple[int, ...]
    conditions: tuple[int, ...] = ()  # of arrays of bools, which follow
    operands: tuple[int, ...] = ()  # of arrays in the compute dtype, which follow; not on NumPy


class Mask(NamedTuple):
    """A random mask of a cell's steps, 0 with probability `rate` and else 1."""

    rate: float
    per_sequence: bool  # whether all steps of a sequence have the same one


class Cell:
    """One step of a recurrent network and its gradient, in plain `xp`, on caller-owned arrays.

    A step maps a tuple of states, `(h,)` or `(h, c)`, each (N, H), to the next one; item 0
    is the output. `forward` and `backward` work on the same buffers:

    =============  ============  =====  =====================  ============================
    buffer         shape         dtype  forward                backward
    =============  ============  =====  =====================  ============================
    `gates`        (N, G*H)      C      inout: gx -> gates     inout: gates -> dgh
    `saved`        (N, saved*H)  C      out                    in; GRU inout: gh_n -> dgx_n
    `states`       (N, H) each   C, A   in                     in
    `next_states`  (N, H) each   C, A   out                    in
    `dstates`      (N, H) each   A      -                      inout: dnext -> dstates
    `scratch`      see below     A      workspace              workspace
    `extra`        (N, 1 or H)   A      in                     in
    =============  ============  =====  =====================  ============================

    gx is the input pre-activation x W_ih' + b_ih, with the recurrent bias of the first
    `bias_folded_gates` gates already added (for these the two biases only occur as a sum). dgh is
    the gradient of the recurrent pre-activation; `to_input_side` converts it in place to dgx, the
    gradient of the input pre-activation. dnext is the gradient of `next_states`.

    C is the compute dtype, that of the operands of matrix products: h and the gates. A is the
    accumulation dtype, that of everything else: the LSTM's c and all gradients that are carried
    from step to step. Both are float32 or both float64, unless the layer computes in low
    precision. Rows are contiguous.

    A defined cell (`cells/definition`) has states of other widths, and leaves dgx in `gates`; the
    gradients of its products and vectors are in `saved`, which `gradient_terms` reads. `extra`
    holds its inputs besides x and, in training, its masks.

    A step consists of a matrix product and pointwise ops before or after it: the methods named
    in `pointwise_ops`, which fused kernels replace. A cell with one product per step has the two
    ops below; other cells define their own.
    """

    name: str
    gate_names: tuple[str, ...]  # in the order of the weights' blocks
    bias_folded_gates: (
        int  # number of leading gates whose recurrent bias is added to the input side
    )
    saved: int = 0  # width of `saved`, in units of H
    state_names: tuple[str, ...] = ("h",)
    initial_values: tuple[float, ...] = (0.0,)  # with which the states begin
    forward_scratch: tuple[int, ...] = ()  # widths of the scratch arrays, in units of H
    backward_scratch: tuple[int, ...] = ()
    # the buffers that `backward` reads and writes; h' is the next h
    backward_reads: tuple[str, ...]
    backward_writes: tuple[str, ...] = ("gates",)
    pointwise_ops: tuple[str, ...] = ("forward_gates", "backward_gates")
    # array operations per step, forward and backward, each a launch on a GPU; None: not counted
    kernel_launches: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()  # lines of `explain`
    # whether a step's array calls, all of them with `out`, can be captured and replayed
    is_captured: bool = True
    records: bool = True  # whether `forward` writes what `backward` reads
    weights_type: type[Any] = Weights
    has_kinks: bool = False  # whether gradients jump where a value passes a number
    sums_size: int = 0  # width of what backward steps add up, if they do
    extra_inputs: tuple[str, ...] = ()  # numbers of each step and row that a call passes
    masks: tuple[Mask, ...] = ()

    @property
    def gates(self) -> int:
        """G, the number of gates."""
        return len(self.gate_names)

    @property
    def recurrent_blocks(self) -> tuple[str, ...]:
        """The gates with a block in W_hh, in order."""
        return self.gate_names

    def state_sizes(self, H: int) -> tuple[int, ...]:
        """The widths of the states; the first one is that of the output."""
        return (H,) * len(self.state_names)

    def saved_size(self, H: int) -> int:
        """The width of `saved`."""
        return self.saved * H

    def adding_up(self) -> Cell:
        """The same cell, whose backward steps add up the gradients of vectors, if it has any."""
        return self

    def scratch_sizes(self, H: int, backward: bool) -> ScratchSizes:
        """The widths of a step's scratch arrays."""
        units = self.backward_scratch if backward else self.forward_scratch
        return ScratchSizes(tuple([unit * H for unit in units]))

    def weight_shapes(self, I: int, H: int, bias: bool) -> Mapping[str, tuple[int, ...]]:  # noqa: E741
        """The parameters of a direction that reads I features, in torch's order."""
        rows = self.gates * H
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, I), "weight_hh": (rows, H)}
        return shapes | {"bias_ih": (rows,), "bias_hh": (rows,)} if bias else shapes

    def input_bias(self, weights: Weights, dtype: Any) -> Array | None:
        """b_ih, plus b_hh for the gates in which the two only occur as a sum; new array (G*H,)."""
        if weights.bias_ih is None or weights.bias_hh is None:
            return None
        bias = weights.bias_ih.copy()
        width = self.bias_folded_gates * weights.weight_hh.shape[1]
        bias[:width] += weights.bias_hh[:width]
        return bias.astype(dtype, copy=False)

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute one step; see the table of buffers above."""
        gh = step.scratch[0]
        xp.matmul(step.states[0], weights.weight_hh.T, out=gh)
        self.forward_gates(xp, weights.bias_hh, gh, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute the gradient of the step; see the table of buffers above."""
        self.backward_gates(xp, step)
        xp.matmul(step.gates, weights.weight_hh, out=step.dstates[0])

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """Compute the gates and the next states from gx and gh.

        :param bias_hh: in, (G*H,), or in plain code (N, G*H).
        :param gh: inout, (N, G*H); its contents are lost.
        """
        raise NotImplementedError

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """Compute dgh, and the terms of `dstates` that bypass the product, from dnext.

        Where dh has no such term, its contents are lost.
        """
        raise NotImplementedError

    def to_input_side(self, dgates: Array, saved: Array) -> None:
        """Convert dgh to dgx in place, for all steps at once; most cells have one for both.

        :param dgates: inout, (S, G*H), dgh -> dgx.
        :param saved: in, (S, saved*H).
        """

    def gradient_terms(
        self,
        states: tuple[Callable[[int], Array], Callable[[int], Array]],
        dgh: Array,
        saved: Array,
        dweights: Weights,
    ) -> list[GradientTerm]:
        """What the gradients of the parameters that steps read consist of, over all steps.

        :param states: functions that return state k, (S, H), as each step read or wrote it.
        :param dgh: in, (S, G*H), the `gates` after `backward`.
        :param saved: in, (S, saved*H), likewise.
        :param dweights: out, where an entry is not None.
        """
        return [GradientTerm(dgh, states[0](0), dweights.weight_hh, dweights.bias_hh)]
