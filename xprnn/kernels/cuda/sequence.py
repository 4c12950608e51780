"""Sequence kernels: prepares and launches those of the files *_forward.cu and *_backward.cu.

The contents of the arrays are those of the step loop of `xprnn/engine/loop.py`. Blocks exchange
states through memory: a block polls a state until it differs from `SENTINEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ...backend import Array
from ...backend.cooperative import LaunchShape
from ...backend.cupy import CupyBackend
from ...cells import CELLS, Cell
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
# Polls of a state before a wait times out, about half a microsecond each: seconds in all, whereas
# a step takes microseconds
MAX_POLLS = 1 << 23


class CudaRunner:
    """The kernels that run all steps of a cell in one launch, on one device.

    A launch runs a direction of a layer, or both, the reverse one second; or the layers of a stack,
    as a `Wavefront`. Input products and weight gradients use cuBLAS.
    """

    unit = "launch"
    costs: RunnerCosts = RunnerCosts()

    def __init__(self, backend: CupyBackend, cell: Cell, precision: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell.name
        self._states = cell.state_names
        self._compute_dtype = precision.compute_dtype
        self._xp = backend.module(precision.precision, precision.is_mixed)
        self._math_mode = math_mode_of(precision)
        self._device = DeviceProperties.of(backend.xp, backend.device)

    # -- what is supported

    def plan(
        self, kind: Pass, N: int, H: int, T: int, directions: int, layers: int = 1
    ) -> LaunchPlan | Unsupported:
        """The launch of a pass."""
        problem = SequenceProblem(
            self._cell, str(kind), self._math_mode, N, H, T, directions, layers
        )
        return plan(self._device, problem)

    def unsupported(self, kind: Pass, sizes: Sizes, directions: int) -> Unsupported | None:
        """Why a pass over this number of directions of a layer cannot be launched."""
        launch = self.plan(kind, sizes.N, sizes.H, sizes.T, directions)
        return launch if isinstance(launch, Unsupported) else None

    def not_profitable(self, sizes: Sizes) -> Unsupported | None:
        """None: for no supported call is another implementation known to be faster."""
        return None

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Both directions of a layer together, if one launch of both is supported."""
        if directions > 1 and self.unsupported(kind, sizes, directions) is None:
            return [range(directions)]
        return [range(d, d + 1) for d in range(directions)]

    def wavefront(self, kind: Pass, sizes: Sizes, layers: int) -> Wavefront | Unsupported:
        """The launch of all layers of a stack, or why there is none."""
        launch = self.plan(kind, sizes.N, sizes.H, sizes.T, 1, layers)
        return launch if isinstance(launch, Unsupported) else Wavefront(self)

    # -- a layer

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""
        cell, dtype = CELLS[self._cell], self._compute_dtype
        results = [allocate(cell, dtype, direction, call) for direction in passes]
        for direction, activations in zip(passes, results, strict=True):
            input_projection(self._xp, cell, direction, activations.gates)
        self.launch_forward(passes, results, call)
        for direction, activations in zip(passes, results, strict=True):
            write_results(direction, activations, call.batch)
        return results

    def launch_forward(
        self,
        passes: Sequence[ForwardPass],
        results: Sequence[Activations],
        call: CallContext,
        layers: int = 1,
    ) -> None:
        """Run all steps; in the activations, in: gates, gx; out: all states.

        In a recorded call gates are inout and saved is out; otherwise saved is not accessed. With
        `layers` there is a pass for each layer; the product with the layer below is added to gx of
        the upper ones.
        """
        batch = call.batch
        if not batch.total:
            return
        table: list[dict[str, Any]] = []
        for direction, activations in zip(passes, results, strict=True):
            arrays: dict[str, Any] = dict(zip(self._states, activations.states, strict=True))
            saved = activations.saved if call.record else None
            arrays |= {"gates": activations.gates, "saved": saved}
            arrays["exchange"] = self._initialised_exchange(
                direction, activations.states, batch, call.scratch
            )
            arrays |= dict.fromkeys(LOWER_LAYER)
            if layers > 1 and table:
                weight_ih = _aligned(direction.weights.weight_ih)
                arrays |= zip(LOWER_LAYER, (weight_ih, table[-1]["exchange"]), strict=True)
            table.append(arrays)
        launch_plan = self._launch_of(call.forward_pass, passes, batch, layers)
        self._launch(launch_plan, "forward", passes, table, batch)

    def _launch_of(
        self,
        kind: Pass,
        passes: Sequence[ForwardPass | BackwardPass],
        batch: PackedBatch,
        layers: int = 1,
    ) -> LaunchPlan:
        """The launch of a supported pass, from the planner's cache."""
        directions = 1 if layers > 1 else len(passes)
        H = passes[0].weights.weight_hh.shape[1]
        launch = self.plan(kind, batch.running, H, batch.steps, directions, layers)
        if isinstance(launch, Unsupported):  # the planner's tables have changed since
            raise RuntimeError(launch.reason)
        return launch

    def _initialised_exchange(
        self,
        direction: ForwardPass,
        states: tuple[Array, ...],
        batch: PackedBatch,
        scratch: Workspace,
    ) -> Array:
        """The exchange buffer of a direction, with the initial states in it and in `states`."""
        (h, *others), n_0, xp = states, batch.running, self._backend.xp
        H, first = h.shape[1], _initial_rows(batch, direction.reverse)
        width = padded(H, self._math_mode)
        exchange = h if width == H else scratch.empty(n_0 + batch.total, width, dtype=h.dtype)
        exchange.data.memset_async(SENTINEL, exchange.nbytes)
        initial = [end[:n_0] for end in direction.ends]
        # a NaN in the caller's array could have the bits of `SENTINEL`
        canonical = xp.where(initial[0] == initial[0], initial[0], xp.float32(np.nan))
        h[first] = canonical
        if width > H:
            exchange[first, :H] = canonical
            exchange[first, H:] = 0.0
        for state, start in zip(others, initial[1:], strict=True):
            state[first] = start
        return exchange

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer; overwrites the gates with dgx."""
        batch = call.batch
        if batch.total:
            self._launch_backward(passes, batch, call.scratch)
        for direction in passes:
            weight_gradients(self._xp, self._xp, CELLS[self._cell], direction, batch)

    def _launch_backward(
        self, passes: Sequence[BackwardPass], batch: PackedBatch, scratch: Workspace
    ) -> None:
        """Run all steps; inout: gates -> dgh, and saved as in the cell's `backward`."""
        table = []
        for direction in passes:
            activations = direction.activations
            dstates = [dstate[: batch.running] for dstate in direction.dstates]
            H = dstates[0].shape[1]
            width = activations.gates.shape[1] // H * padded(H, self._math_mode)
            exchange = scratch.empty(batch.total, width, dtype=activations.gates.dtype)
            exchange.data.memset_async(SENTINEL, exchange.nbytes)
            arrays: dict[str, Any] = dict(zip(self._states, activations.states, strict=True))
            arrays |= zip(["d" + name for name in self._states], dstates, strict=True)
            arrays |= {"gates": activations.gates, "saved": activations.saved, "exchange": exchange}
            table.append(arrays | {"doutput": direction.doutput})
        doutput = passes[0].doutput
        row_stride = 0 if doutput is None else doutput.strides[0] // doutput.itemsize
        launch_plan = self._launch_of(Pass.BACKWARD, passes, batch)
        self._launch(launch_plan, "backward", passes, table, batch, np.int32(row_stride))

    def _launch(
        self,
        launch_plan: LaunchPlan,
        work: str,
        passes: Sequence[ForwardPass | BackwardPass],
        table: list[dict[str, Array | None]],
        batch: PackedBatch,
        *more: Any,
    ) -> None:
        """Launch with the arrays that the kernel takes, and the arguments of all kernels."""
        kernel = KERNELS[self._cell, work]
        for direction, arrays in zip(passes, table, strict=True):
            weights = direction.weights
            arrays |= {"weight_hh": _aligned(weights.weight_hh), "bias_hh": weights.bias_hh}
        H, reverse = passes[0].weights.weight_hh.shape[1], passes[0].reverse
        counts = None if batch.ragged is None else batch.ragged.counts.astype(np.int32)
        sizes = batch.steps, batch.running, H, batch.total, launch_plan.passes, int(reverse)
        code = source(kernel.file, launch_plan.cluster, launch_plan.layers > 1)
        slots = MAX_WAVEFRONT_LAYERS if launch_plan.layers > 1 else 2
        addresses = grouped_arguments(
            [[arrays[name] for name in kernel.arrays] for arrays in table], slots
        )
        self._backend.cooperative.launch(
            f"{self._cell}_{work}",
            loading.kernel(self._backend.xp, code, launch_plan.name, launch_plan.cluster == 1),
            LaunchShape(
                launch_plan.grid, launch_plan.threads, launch_plan.shared, launch_plan.cluster
            ),
            (addresses, counts, *map(np.int32, sizes), *more, np.uint32(MAX_POLLS)),
        )


class Wavefront:
    """All layers of a stack of one direction in one launch.

    A layer runs a step as soon as the layer below has. It has not been run on a GPU yet.
    """

    def __init__(self, runner: CudaRunner) -> None:
        self._runner = runner

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run all layers, a pass each; x of the upper layers is the output of the one below.

        gx of the upper layers is only their bias: the launch adds the product with the layer below.
        """
        runner, x = self._runner, passes[0].x
        cell, dtype, results = CELLS[runner._cell], runner._compute_dtype, []
        for layer, direction in enumerate(passes):
            activations = allocate(cell, dtype, direction._replace(x=x), call)
            bias = cell.input_bias(direction.weights, dtype)
            if layer:
                activations.gates[...] = 0.0 if bias is None else bias
            else:
                project(runner._xp, direction.weights, bias, x, activations.gates)
            results.append(activations)
            x = call.batch.outputs(activations.states[0], False)
        runner.launch_forward(passes, results, call, len(passes))
        for direction, activations in zip(passes, results, strict=True):
            write_results(direction, activations, call.batch)
        return results


def grouped_arguments(groups: Sequence[Sequence[Array | None]], slots: int) -> np.ndarray:
    """`GroupedArguments` of exchange.h for arrays of directions or layers, with `slots` entries.

    CuPy passes a NumPy array of one element by value, whatever its dtype.
    """
    table = np.zeros((slots, len(groups[0])), np.uint64)
    for addresses, arrays in zip(table, groups, strict=False):
        addresses[:] = [0 if array is None else int(array.data.ptr) for array in arrays]
    return table.reshape(-1).view([("slots", table.dtype, table.shape)])


def _initial_rows(batch: PackedBatch, reverse: bool) -> Any:
    """The rows of a direction's states that hold the initial state of each position."""
    if not reverse:
        return slice(batch.running)
    return slice(batch.total, None) if batch.ragged is None else batch.ragged.last


def _aligned(weight: Array) -> Array:
    """A weight that is aligned to 16 bytes: itself or a copy."""
    return weight.copy() if weight.data.ptr % 16 else weight


def parts(name: str) -> tuple[str, ...]:
    """The files of a kernel, such as "gru_forward", after those that it includes."""
    cell, _, direction = name.rpartition("_")
    shared = "device.h", "math_mode.h", "exchange.h", "products.h", "staging.h", "units.h"
    return "common.h", f"{cell}.h", *shared, f"{direction}.h", f"{name}.cu"


@cache
def source(name: str, cluster: int = 1, wave: bool = False) -> str:
    """The source of a kernel with all that it includes.

    :param cluster: the blocks of a cluster.
    :param wave: whether a launch runs the layers of a stack instead of directions.
    """
    head = f"#define XP_CLUSTER {cluster}\n#define XP_WAVEFRONT {int(wave)}\n"
    return head + loading.text(*parts(name))
