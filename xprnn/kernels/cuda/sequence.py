"""Whole sequences: prepares and launches the kernels of the files *_forward.cu and *_backward.cu.

They write what the step loop of `xprnn/engine/loop.py` writes. A state is also a message: other
blocks wait until it differs from `SENTINEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ...backend import Array
from ...backend.cooperative import LaunchShape
from ...backend.cupy import CupyBackend
from ...cells import CELLS
from ...core.packing import PackedBatch
from ...core.passes import Activations, BackwardPass, ForwardPass
from ...core.precision import PrecisionPolicy
from ...core.workspace import Workspace
from ..interface import CallContext, Pass, RunnerCosts, Sizes, Unsupported
from ..shared import allocate, input_projection, project, weight_gradients, write_results
from . import loading
from .plan import DeviceProperties, LaunchPlan, SequenceProblem, math_mode_of, padded, plan
from .table import KERNELS, LOWER_LAYER, MAX_WAVEFRONT_LAYERS

SENTINEL = 0xFF  # in every byte: a NaN that no kernel writes
# Polls of a message before a wait ends with an error, half a microsecond or so each: seconds, where
# a step takes microseconds.
MAX_POLLS = 1 << 23


class CudaRunner:
    """The kernels that run all steps of a cell in one launch, on one device.

    A launch runs a direction of a layer, or both, the reverse one second; or the layers of a stack,
    as a `Wavefront`. Input products and weight gradients are cuBLAS's.
    """

    unit = "launch"
    costs: RunnerCosts = RunnerCosts()

    def __init__(self, backend: CupyBackend, cell: str, precision: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell
        self._states = CELLS[cell].state_names
        self._compute_dtype = precision.compute_dtype
        self._xp = backend.module(precision.precision, precision.narrow)
        self._numbers = math_mode_of(precision)
        self._device = DeviceProperties.of(backend.xp, backend.device)

    # -- what is supported

    def plan(
        self, kind: Pass, N: int, H: int, T: int, directions: int, layers: int = 1
    ) -> LaunchPlan | Unsupported:
        """The launch of a pass."""
        problem = SequenceProblem(self._cell, str(kind), self._numbers, N, H, T, directions, layers)
        return plan(self._device, problem)

    def unsupported(self, kind: Pass, sizes: Sizes, directions: int) -> Unsupported | None:
        """Why a pass over so many directions of a layer cannot be launched."""
        found = self.plan(kind, sizes.N, sizes.H, sizes.T, directions)
        return found if isinstance(found, Unsupported) else None

    def not_profitable(self, sizes: Sizes) -> Unsupported | None:
        """None: no supported call is known to be faster otherwise."""
        return None

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Both directions of a layer together, where a launch of both is supported."""
        if directions > 1 and self.unsupported(kind, sizes, directions) is None:
            return [range(directions)]
        return [range(d, d + 1) for d in range(directions)]

    def wavefront(self, kind: Pass, sizes: Sizes, layers: int) -> Wavefront | Unsupported:
        """The launch of all layers of a stack, or why there is none."""
        found = self.plan(kind, sizes.N, sizes.H, sizes.T, 1, layers)
        return found if isinstance(found, Unsupported) else Wavefront(self)

    # -- a layer

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; outputs and final states are written."""
        cell, dtype = CELLS[self._cell], self._compute_dtype
        every = [allocate(cell, dtype, direction, call) for direction in passes]
        for direction, activations in zip(passes, every, strict=True):
            input_projection(self._xp, cell, direction, activations.gates)
        self.launch_forward(passes, every, call)
        for direction, activations in zip(passes, every, strict=True):
            write_results(direction, activations, call.batch)
        return every

    def launch_forward(
        self,
        passes: Sequence[ForwardPass],
        every: Sequence[Activations],
        call: CallContext,
        layers: int = 1,
    ) -> None:
        """All steps; of the activations gates are read as gx, and every state is written.

        In a recorded call gates and saved are written too, else saved is not touched. With `layers`
        there is a direction for each layer; the product with the layer below is added to gx of the
        upper ones.
        """
        batch = call.batch
        if not batch.total:
            return
        table: list[dict[str, Any]] = []
        for direction, activations in zip(passes, every, strict=True):
            arrays: dict[str, Any] = dict(zip(self._states, activations.states, strict=True))
            saved = activations.saved if call.record else None
            arrays |= {"gates": activations.gates, "saved": saved}
            arrays["exchange"] = self._initialised_exchange(
                direction, activations.states, batch, call.scratch
            )
            arrays |= dict.fromkeys(LOWER_LAYER)
            if layers > 1 and table:
                weight_ih = _readable(direction.weights.weight_ih)
                arrays |= zip(LOWER_LAYER, (weight_ih, table[-1]["exchange"]), strict=True)
            table.append(arrays)
        chosen = self._launch_of(call.forward_pass, passes, batch, layers)
        self._launch(chosen, "forward", passes, table, batch)

    def _launch_of(
        self,
        kind: Pass,
        passes: Sequence[ForwardPass | BackwardPass],
        batch: PackedBatch,
        layers: int = 1,
    ) -> LaunchPlan:
        """The launch of a pass that is supported; the planner remembers it."""
        directions = 1 if layers > 1 else len(passes)
        H = passes[0].weights.weight_hh.shape[1]
        found = self.plan(kind, batch.running, H, batch.steps, directions, layers)
        if isinstance(found, Unsupported):  # the planner's tables have changed since
            raise RuntimeError(found.reason)
        return found

    def _initialised_exchange(
        self,
        direction: ForwardPass,
        states: tuple[Array, ...],
        batch: PackedBatch,
        scratch: Workspace,
    ) -> Array:
        """The exchange buffer of a direction, with the initial states in it and in `states`."""
        (h, *others), n_0, xp = states, batch.running, self._backend.xp
        H, first = h.shape[1], _first(batch, direction.reverse)
        width = padded(H, self._numbers)
        exchange = h if width == H else scratch.empty(n_0 + batch.total, width, dtype=h.dtype)
        exchange.data.memset_async(SENTINEL, exchange.nbytes)
        initial = [end[:n_0] for end in direction.ends]
        # a NaN, but not `SENTINEL`
        known = xp.where(initial[0] == initial[0], initial[0], xp.float32(np.nan))
        h[first] = known
        if width > H:
            exchange[first, :H] = known
            exchange[first, H:] = 0.0
        for state, start in zip(others, initial[1:], strict=True):
            state[first] = start
        return exchange

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer; gates become dgx."""
        batch = call.batch
        if batch.total:
            self._launch_backward(passes, batch, call.scratch)
        for direction in passes:
            weight_gradients(self._xp, self._xp, CELLS[self._cell], direction, batch)

    def _launch_backward(
        self, passes: Sequence[BackwardPass], batch: PackedBatch, scratch: Workspace
    ) -> None:
        """All steps: gates become dgh; saved, what the cell's `backward` computes."""
        table = []
        for direction in passes:
            activations = direction.activations
            first = [dstate[: batch.running] for dstate in direction.dstates]
            H = first[0].shape[1]
            width = activations.gates.shape[1] // H * padded(H, self._numbers)
            exchange = scratch.empty(batch.total, width, dtype=activations.gates.dtype)
            exchange.data.memset_async(SENTINEL, exchange.nbytes)
            arrays: dict[str, Any] = dict(zip(self._states, activations.states, strict=True))
            arrays |= zip(["d" + name for name in self._states], first, strict=True)
            arrays |= {"gates": activations.gates, "saved": activations.saved, "exchange": exchange}
            table.append(arrays | {"doutput": direction.doutput})
        doutput = passes[0].doutput
        apart = 0 if doutput is None else doutput.strides[0] // doutput.itemsize
        chosen = self._launch_of(Pass.BACKWARD, passes, batch)
        self._launch(chosen, "backward", passes, table, batch, np.int32(apart))

    def _launch(
        self,
        chosen: LaunchPlan,
        work: str,
        passes: Sequence[ForwardPass | BackwardPass],
        table: list[dict[str, Array | None]],
        batch: PackedBatch,
        *own: Any,
    ) -> None:
        """Launch with those of the arrays that the kernel takes, and what all kernels take."""
        kernel = KERNELS[self._cell, work]
        for direction, arrays in zip(passes, table, strict=True):
            weights = direction.weights
            arrays |= {"weight_hh": _readable(weights.weight_hh), "bias_hh": weights.bias_hh}
        H, reverse = passes[0].weights.weight_hh.shape[1], passes[0].reverse
        counts = None if batch.ragged is None else batch.ragged.counts.astype(np.int32)
        sizes = batch.steps, batch.running, H, batch.total, chosen.passes, int(reverse)
        code = source(kernel.file, chosen.cluster, chosen.layers > 1)
        slots = MAX_WAVEFRONT_LAYERS if chosen.layers > 1 else 2
        addresses = grouped_arguments(
            [[arrays[name] for name in kernel.arrays] for arrays in table], slots
        )
        self._backend.cooperative.launch(
            f"{self._cell}_{work}",
            loading.kernel(self._backend.xp, code, chosen.name, chosen.cluster == 1),
            LaunchShape(chosen.grid, chosen.threads, chosen.shared, chosen.cluster),
            (addresses, counts, *map(np.int32, sizes), *own, np.uint32(MAX_POLLS)),
        )


class Wavefront:
    """All layers of a stack of one direction in one launch.

    A layer runs a step as soon as the layer below has. No GPU has run it yet.
    """

    def __init__(self, runner: CudaRunner) -> None:
        self._runner = runner

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run all layers, a pass each; x of the upper layers is the output of the one below.

        gx of the upper layers is their bias: the launch multiplies the states of the layer below.
        """
        runner, x = self._runner, passes[0].x
        cell, dtype, every = CELLS[runner._cell], runner._compute_dtype, []
        for layer, direction in enumerate(passes):
            activations = allocate(cell, dtype, direction._replace(x=x), call)
            bias = cell.input_bias(direction.weights, dtype)
            if layer:
                activations.gates[...] = 0.0 if bias is None else bias
            else:
                project(runner._xp, direction.weights, bias, x, activations.gates)
            every.append(activations)
            x = call.batch.outputs(activations.states[0], False)
        runner.launch_forward(passes, every, call, len(passes))
        for direction, activations in zip(passes, every, strict=True):
            write_results(direction, activations, call.batch)
        return every


def grouped_arguments(every: Sequence[Sequence[Array | None]], slots: int) -> np.ndarray:
    """`GroupedArguments` of exchange.h for arrays of directions or layers, with `slots` entries.

    CuPy passes a NumPy array of one element by value, whatever the element is.
    """
    table = np.zeros((slots, len(every[0])), np.uint64)
    for addresses, arrays in zip(table, every, strict=False):
        addresses[:] = [0 if array is None else int(array.data.ptr) for array in arrays]
    return table.reshape(-1).view([("slots", table.dtype, table.shape)])


def _first(batch: PackedBatch, reverse: bool) -> Any:
    """Where in the states a direction finds the initial state of each position."""
    if not reverse:
        return slice(batch.running)
    return slice(batch.total, None) if batch.ragged is None else batch.ragged.last


def _readable(weight: Array) -> Array:
    """A weight that starts on 16 bytes; a copy where it does not."""
    return weight.copy() if weight.data.ptr % 16 else weight


def parts(name: str) -> tuple[str, ...]:
    """The files of a kernel, such as "gru_forward", and of all that it includes, in order."""
    cell, _, way = name.rpartition("_")
    below = "device.h", "math_mode.h", "exchange.h", "products.h", "staging.h", "units.h"
    return "common.h", f"{cell}.h", *below, f"{way}.h", f"{name}.cu"


@cache
def source(name: str, cluster: int = 1, wave: bool = False) -> str:
    """The text of a kernel, after all that it includes.

    :param cluster: the blocks of a cluster.
    :param wave: for the layers of a stack in place of directions.
    """
    head = f"#define XP_CLUSTER {cluster}\n#define XP_WAVEFRONT {int(wave)}\n"
    return head + loading.text(*parts(name))
