"""What a folder of kernels has to offer: its `__init__` is a `Family`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..arithmetic import Arithmetic
from ..backend import Array, Backend
from ..cells import Cell, Weights
from ..layout import Layout
from ..scratch import Workspace


class Sequences(Protocol):
    """Kernels that take all steps of one direction of a layer: see the loops of `sequence.py`."""

    cost: str  # for `explain`: what a call takes
    from_input: bool  # whether `forward` computes gx itself, from x

    def plan(self, work: str, N: int, H: int, T: int) -> Any:
        """How a call's steps are taken, or as text why none of these kernels fits it.

        :param work: "forward", "training" (forward, recorded) or "backward".
        """

    def outdone(self, N: int, H: int, T: int) -> str:
        """Why "auto" leaves a call that fits to the parts of the steps; "" where it does not."""

    def forward(
        self,
        chosen: Any,
        weights: Weights,
        bias: Array | None,
        x: Array,
        gates: Array,
        saved: Array | None,
        states: tuple[Array, ...],
        initial: tuple[Array, ...],
        layout: Layout,
        reverse: bool,
        scratch: Workspace,
    ) -> None:
        """All steps, in place of `_take_steps`; `chosen` is what `plan` gave.

        `weights`, `bias` (G*H,), that of the input side, x (S, I) and `initial` (n_0, H) each are
        read; `gates` (S, G*H) is read as gx unless `from_input`, with `saved` then written; `saved`
        (S, saved*H), None unless the call is recorded, and `states` (n_0 + S, H) each are written.
        """

    def backward(
        self,
        chosen: Any,
        weights: Weights,
        gates: Array,
        saved: Array,
        states: tuple[Array, ...],
        doutput: Array | None,
        dstates: tuple[Array, ...],
        layout: Layout,
        reverse: bool,
        scratch: Workspace,
    ) -> None:
        """Undo all steps, in place of `_undo_steps`: see there for what is left in the arrays.

        `weights`, `states` and `doutput` (S, H), whose rows may stand apart, are read; `gates`,
        `saved` and `dstates` (n_0, H) each are read and overwritten.
        """


class Family(Protocol):
    """The kernels for one kind of processor."""

    def refusal(self, arithmetic: Arithmetic) -> str:
        """Why none of them serves in these types on this machine; "" where they do."""

    def fused_cells(self) -> Mapping[str, Cell]:
        """The cells whose parts are fused, by name."""

    def has_sequences(self, cell: str) -> bool:
        """Whether there are sequence kernels for a cell, whatever they fit."""

    def sequences(self, cell: str, backend: Backend, arithmetic: Arithmetic) -> Sequences:
        """Those for a cell, in types that `refusal` lets pass."""
