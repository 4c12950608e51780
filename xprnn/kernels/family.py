"""What a folder of kernels has to offer: its `__init__` is a `KernelPackage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..arithmetic import PrecisionPolicy
from ..backend import Backend
from ..cells import Cell
from ..directions import Activations, BackwardPass, ForwardPass
from ..layout import PackedBatch
from ..scratch import Workspace


class LayerRunner(Protocol):
    """Kernels that take all steps of directions of a layer: see the loops of `sequence.py`."""

    unit: str  # for `explain`: what takes the steps, a launch or a call
    from_input: bool  # whether `forward` computes gx itself, from x
    to_weights: bool  # whether `backward` goes on to the gradients of weights and input itself
    room: int  # numbers in which it then packs some rows at a time, whatever the sizes
    packs: bool  # whether it keeps the weights in orders of its own, one for each pass
    ahead: int  # rows of x for which it then computes it at a time, in memory to work in

    def plan(self, work: str, N: int, H: int, T: int, directions: int) -> Any:
        """How a call's steps are taken, or as text why none of these kernels fits it.

        :param work: "forward", "training" (forward, recorded) or "backward".
        :param directions: of a layer, all of which it takes.
        """

    def outdone(self, N: int, width: int, H: int, T: int) -> str:
        """Why "auto" leaves a call that fits to the parts of the steps; "" where it does not.

        :param width: I of the layer with the widest input.
        """

    def forward(
        self,
        chosen: Any,
        directions: Sequence[ForwardPass],
        traces: Sequence[Activations],
        layout: PackedBatch,
        scratch: Workspace,
        record: bool,
    ) -> None:
        """All steps, in place of `_take_steps`; `chosen` is what `plan` gave.

        Of the directions weights and ends are read, and of the traces x; gates are read as gx
        unless `from_input`, and every state is written. With `record` gates and saved are
        written too, else neither is of use afterwards; with `from_input` they then have no rows.
        """

    def backward(
        self,
        chosen: Any,
        directions: Sequence[BackwardPass],
        layout: PackedBatch,
        scratch: Workspace,
    ) -> None:
        """Undo all steps, in place of `_undo_steps`: see there for what is left in the arrays.

        The traces' states and `doutput`, whose rows may stand apart, are read; the traces' gates
        and saved and the first rows of `dstates` are read and overwritten. `to_weights` it does
        what `_gradients` does as well: dweights and dx are written, gates end as dgx.
        """


class KernelPackage(Protocol):
    """The kernels for one kind of processor."""

    def refusal(self, arithmetic: PrecisionPolicy) -> str:
        """Why none of them serves in these types on this machine; "" where they do."""

    def fused_cells(self) -> Mapping[str, Cell]:
        """The cells whose parts are fused, by name."""

    def prepare(
        self, implementation: str, cell: str, arithmetic: PrecisionPolicy, record: bool
    ) -> bool:
        """Make what a call needs; False where that failed: then `refusal` says why.

        :param implementation: "pointwise", "sequence", or "step" for a step of all layers.
        """

    def has_sequences(self, cell: str) -> bool:
        """Whether there are sequence kernels for a cell, whatever they fit."""

    def sequences(self, cell: str, backend: Backend, arithmetic: PrecisionPolicy) -> LayerRunner:
        """Those for a cell, in types that `refusal` lets pass."""
