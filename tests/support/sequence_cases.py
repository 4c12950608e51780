"""Directions of a layer for the sequence kernels, and the reference loop in float64.

The layer's input product is left out: W_ih is the identity, so that x is gx, and the reference
receives the same values as the kernel, converted to float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tests.support.emulator.sequence import DTYPES
from tests.support.pointwise_cases import dtype_of
from xprnn.backend import get_backend
from xprnn.cells import CELLS, Cell, Weights
from xprnn.core.packing import PackedBatch, make_packed_batch
from xprnn.core.passes import Activations, BackwardPass, ForwardPass, PackedWeights
from xprnn.core.workspace import Workspace
from xprnn.engine.loop import StepLoop
from xprnn.kernels import CallContext


class Copying:
    """NumPy, but products with the transpose of one identity are copies: a NaN stays in place."""

    def __init__(self, identity: np.ndarray) -> None:
        self._identity = identity

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        if np.shares_memory(b, self._identity):
            out[...] = a
        else:
            np.matmul(a, b, out=out)


@dataclass(frozen=True)
class Case:
    """A direction of a layer with its arrays, in the dtypes that the kernels read."""

    name: str  # of the cell
    kind: str
    H: int
    lengths: tuple[int, ...]
    reverse: bool = False
    bias: bool = True
    upstream: bool = True  # whether there is a gradient of the outputs
    seed: int = 0
    special: tuple[tuple[str, tuple[int, ...], float], ...] = ()  # array, index, value
    numbers: dict[str, np.ndarray] = field(default_factory=dict, compare=False)

    @property
    def cell(self) -> Cell:
        return CELLS[self.name]

    @cached_property
    def layout(self) -> PackedBatch:
        lengths = np.array(self.lengths, np.intp)
        return make_packed_batch(
            get_backend("numpy"), max(self.lengths), len(self.lengths), lengths
        )

    @property
    def dtype(self) -> np.dtype[Any]:
        return dtype_of(DTYPES[self.kind])

    @property
    def padded(self) -> int:
        """The length of a row of the exchange buffer."""
        grain = 16 // self.dtype.itemsize
        return -(-self.H // grain) * grain

    def __post_init__(self) -> None:
        rng, H, S, N = (
            np.random.default_rng(self.seed),
            self.H,
            self.layout.total,
            len(self.lengths),
        )
        G, scale = self.cell.gates, 1 / np.sqrt(H)
        drawn = {
            "gx": rng.normal(0, 1, (S, G * H)),
            "weight_hh": rng.uniform(-scale, scale, (G * H, H)),
            "h0": rng.uniform(-1, 1, (N, H)),
        }
        for name, value in drawn.items():
            self.numbers[name] = value.astype(self.dtype)
        bias = rng.uniform(-1, 1, G * H).astype(np.float32)
        bias[: self.cell.bias_folded_gates * H] = (
            np.nan
        )  # in gx already: the kernel must not read it
        self.numbers["bias_hh"] = bias
        self.numbers["doutput"] = rng.normal(0, 1, (S, H)).astype(np.float32)
        self.numbers["c0"] = rng.uniform(-1, 1, (N, H)).astype(np.float32)
        for name in self.dstates:
            self.numbers[name] = rng.normal(0, 1, (N, H)).astype(np.float32)
        weight_ih = rng.uniform(-scale, scale, (G * H, H))  # of an upper layer of a wavefront
        self.numbers["weight_ih"] = weight_ih.astype(self.dtype)
        for name, index, value in self.special:
            self.numbers[name][index] = value

    @property
    def dstates(self) -> tuple[str, ...]:
        """The names of the state gradients."""
        return tuple([f"d{name}" for name in self.cell.state_names])

    def wide(self, name: str) -> np.ndarray:
        return self.numbers[name].astype(np.float64)

    @cached_property
    def weights(self) -> Weights:
        """In float64, with W_ih = 1; b_hh without the part that is already in gx."""
        identity = np.eye(self.cell.gates * self.H)
        if not self.bias:
            return Weights(identity, self.wide("weight_hh"), None, None)
        bias = self.wide("bias_hh")
        bias[: self.cell.bias_folded_gates * self.H] = 0
        return Weights(identity, self.wide("weight_hh"), np.zeros_like(bias), bias)

    @property
    def loop(self) -> StepLoop:
        """The reference loop in float64."""
        return StepLoop(Copying(self.weights.weight_ih), self.cell, np.dtype("float64"))

    def context(self) -> CallContext:
        """Of a recorded call."""
        return CallContext(None, self.layout, workspace(), workspace(), True)

    def plain(self) -> Activations:
        """The activations of the reference in float64."""
        initial = [self.layout.sort(self.wide(f"{name}0")) for name in self.cell.state_names]
        ends = tuple([state.copy() for state in initial])
        with np.errstate(all="ignore"):
            given = self.weights, self.reverse, self.wide("gx"), ends
            (trace,) = self.loop.forward([ForwardPass(*given, PackedWeights())], self.context())
        return trace

    def rounded_trace(self) -> Activations:
        """The activations as forward stores them: all but c in the compute dtype."""
        trace = self.plain()
        gates, saved, h = [
            a.astype(self.dtype) for a in (trace.gates, trace.saved, trace.states[0])
        ]
        others = [state.astype(np.float32) for state in trace.states[1:]]
        return Activations(self.numbers["gx"], gates, saved, (h, *others))

    def plain_backward(self, trace: Activations) -> dict[str, np.ndarray]:
        """The gradients of the reference in float64, from rounded activations."""
        wide = [a.astype(np.float64) for a in (trace.x, trace.gates, trace.saved)]
        states = tuple([state.astype(np.float64) for state in trace.states])
        dstates = [self.layout.sort(self.wide(name)).copy() for name in self.dstates]
        dweight_hh = np.empty_like(self.weights.weight_hh)
        doutput = self.wide("doutput") if self.upstream else None
        with np.errstate(all="ignore"):
            dweights = Weights(None, dweight_hh, None, None)
            trace = Activations(*wide, states)
            arguments = self.weights, self.reverse, trace, doutput, tuple(dstates)
            backward_pass = BackwardPass(*arguments, dweights, None, PackedWeights())
            self.loop.backward([backward_pass], self.context())
        results = {"dgx": wide[1], "saved": wide[2], "dweight_hh": dweight_hh}
        return results | dict(zip(self.dstates, dstates, strict=True))


def workspace() -> Workspace:
    return Workspace(get_backend("numpy"), np.dtype(np.float64))
