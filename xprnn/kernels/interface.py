"""The interfaces of implementations: runners, plans made of them, and kernel packages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..backend import Array, Backend
from ..cells import Cell
from ..core.packing import PackedBatch
from ..core.passes import Activations, BackwardPass, ForwardPass
from ..core.precision import PrecisionPolicy
from ..core.workspace import Workspace


class Pass(Enum):
    """The passes over a layer; "training" is a forward pass that saves its activations."""

    FORWARD = "forward"
    TRAINING = "training"
    BACKWARD = "backward"

    def __str__(self) -> str:
        """The name in messages."""
        return str(self.value)


@dataclass(frozen=True)
class Unsupported:
    """Why an implementation cannot be used, or is not selected."""

    reason: str

    def __str__(self) -> str:
        """The reason."""
        return self.reason


class Sizes(NamedTuple):
    """The sizes of a call that decide which implementation runs it."""

    N: int
    I: int  # noqa: E741 - the largest of all layers
    H: int
    T: int


class RunnerCosts(NamedTuple):
    """The memory that a runner allocates besides the activations, in elements."""

    packs_weights: bool = False  # whether it caches a copy of the weights for each pass
    scratch: int = 0
    input_rows: int = 0  # rows of x and gx in scratch memory
    step_scratch: int = 0  # of each row, in units of H
    adds_up: bool = False  # whether the cell is its `adding_up`
    bytes_per_direction: int = 0  # of Python objects that are kept between calls


class CallContext(NamedTuple):
    """The arguments that all functions of a call share."""

    plan: ExecutionPlan
    batch: PackedBatch
    saved: Workspace  # activations: in use until the backward pass
    scratch: Workspace  # in use until the end of the call
    record: bool  # whether activations are saved for a backward pass

    @property
    def forward_pass(self) -> Pass:
        """The kind of a forward pass in this call."""
        return Pass.TRAINING if self.record else Pass.FORWARD


class LayerRunner(Protocol):
    """Runs all steps of a layer's directions: input product, time loop, weight gradients."""

    costs: RunnerCosts

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """The directions of a layer that one `forward` or `backward` runs together."""


class KernelRunner(LayerRunner, Protocol):
    """A runner of sequence kernels, which support some sizes only."""

    unit: str  # "call" or "launch", for the text of `explain`

    def unsupported(self, kind: Pass, sizes: Sizes, directions: int) -> Unsupported | None:
        """Why a pass over this number of directions of a layer cannot be run."""

    def not_profitable(self, sizes: Sizes) -> Unsupported | None:
        """Why "auto" does not select this runner for a call that it supports."""


class WavefrontRunner(Protocol):
    """Runs all layers of a stack of one direction at the same time."""

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run a pass over each layer; x of the upper layers is the output of the one below."""


@dataclass(frozen=True)
class StepPlan:
    """How a step of all layers is run: the implementation and the types."""

    implementation: str
    reason: str  # for the selection
    missing: tuple[tuple[str, Unsupported], ...]  # each faster implementation, and why not
    backend: Backend
    xp: Any  # the backend's array module, with products of the requested precision
    cell: Cell
    precision: PrecisionPolicy

    @cached_property
    def is_mixed(self) -> bool:
        """Whether operands of products have a lower precision than the layer's dtype."""
        return self.precision.is_mixed

    @property
    def replays(self) -> bool:
        """Whether the plain code runs on NumPy itself, so that its calls can be captured."""
        plain = self.xp is np and self.implementation == "reference"
        return plain and self.cell.is_captured

    @property
    def is_fused(self) -> bool:
        """Whether one launch or call runs all steps, or a step of all layers."""
        return self.implementation == "sequence"


@dataclass(frozen=True)
class ExecutionPlan(StepPlan):
    """How a call is run: the runners, and the directions of a layer that run together."""

    forward: LayerRunner
    backward: LayerRunner
    kernels: KernelRunner | None  # sequence kernels, if they are selected
    forward_groups: tuple[range, ...]  # of directions
    backward_groups: tuple[range, ...]
    # all layers in one launch, or why they run one after the other
    wavefront: WavefrontRunner | Unsupported


class FusedStep(Protocol):
    """One step of all layers in one launch or call."""

    def launch(
        self, x: Array, now: tuple[Array, ...], after: tuple[Array, ...], out: Array
    ) -> None:
        """Run one step.

        :param x: in: (N, I).
        :param now: in: the states before the step, (L, N, H) each.
        :param after: out: the states after it, likewise.
        :param out: out: (N, H), the last layer's h.
        """


class KernelPackage(Protocol):
    """The kernels for one kind of processor: the modules cuda/package.py and numba/package.py."""

    def unsupported(self, precision: PrecisionPolicy) -> Unsupported | None:
        """Why no kernel can be used with this precision on this machine."""

    def identity(self, backend: Backend) -> dict[str, str]:
        """What a qualification depends on: the device, versions, and a digest of the sources."""

    def fused_cell(self, cell: Cell, precision: PrecisionPolicy, record: bool) -> Cell | None:
        """The same cell with fused pointwise ops, if there is one.

        :param record: whether backward steps follow, and masks are drawn.
        """

    def prepare(
        self, implementation: str, cell: Cell, precision: PrecisionPolicy, record: bool
    ) -> bool:
        """Compile the kernels of a call; False if that failed: `unsupported` then gives the reason.

        :param implementation: "pointwise", "sequence", or "step" for a step of all layers.
        """

    def has_sequence_kernels(self, cell: Cell) -> bool:
        """Whether there are sequence kernels for a cell, for any sizes."""

    def layer_runner(
        self, cell: Cell, backend: Backend, precision: PrecisionPolicy
    ) -> KernelRunner:
        """The runner of a cell, for a supported precision."""
