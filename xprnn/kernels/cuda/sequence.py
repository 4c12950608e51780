"""Whole sequences: prepares and launches the kernels of the files *_forward.cu and *_backward.cu.

They replace the time loops of `xprnn/sequence.py`, work on the same arrays and leave in them
what the loops leave. A state is also a letter: other blocks wait for it to differ from `SENTINEL`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ...arithmetic import PrecisionPolicy
from ...backend import Array
from ...backend.cooperative import LaunchShape
from ...backend.cupy import CupyBackend
from ...cells import CELLS
from ...directions import Activations, BackwardPass, ForwardPass
from ...layout import PackedBatch
from ...scratch import Workspace
from . import loading
from .plan import DeviceProperties, LaunchPlan, SequenceProblem, math_mode_of, padded, plan
from .table import KERNELS, LOWER_LAYER, MAX_WAVEFRONT_LAYERS

SENTINEL = 0xFF  # in every byte: a NaN that no kernel writes
# Looks at a letter before a wait is given up, half a microsecond or so each: seconds, where a step
# takes microseconds.
MAX_POLLS = 1 << 23


class SequenceKernels:
    """The kernels that take all steps of a cell in one launch, on one device.

    A launch is one of a direction of a layer, or of both, the reverse one second; or of the layers
    of a stack, in a wave.
    """

    unit = "launch"
    from_input = False
    to_weights = False
    room = 0
    packs = False
    ahead = 0

    def __init__(self, backend: CupyBackend, cell: str, arithmetic: PrecisionPolicy) -> None:
        self._backend = backend
        self._cell = cell
        self._states = CELLS[cell].state_names
        self._numbers = math_mode_of(arithmetic)
        self._device = DeviceProperties.of(backend.xp, backend.device)

    def plan(self, work: str, N: int, H: int, T: int, directions: int) -> LaunchPlan | str:
        """The launch for "forward", "training" or "backward", or the reason why there is none."""
        problem = SequenceProblem(self._cell, work, self._numbers, N, H, T, directions)
        return plan(self._device, problem)

    def wave(self, work: str, N: int, H: int, T: int, layers: int) -> LaunchPlan | str:
        """As `plan`, for a launch of all layers of a stack, "forward" or "training"."""
        return plan(
            self._device, SequenceProblem(self._cell, work, self._numbers, N, H, T, 1, layers)
        )

    def outdone(self, N: int, width: int, H: int, T: int) -> str:
        """No call that fits is served faster otherwise, as far as is known."""
        return ""

    def forward(
        self,
        chosen: LaunchPlan,
        directions: Sequence[ForwardPass],
        traces: Sequence[Activations],
        layout: PackedBatch,
        scratch: Workspace,
        record: bool,
    ) -> None:
        """All steps: of the traces gates are read as gx, and every state is written.

        With `record` gates and saved are written too, else saved is not touched. In a wave there is
        a direction for each layer; to gx of the upper ones the product with the one below is added.
        """
        every: list[dict[str, Any]] = []
        for direction, trace in zip(directions, traces, strict=True):
            arrays: dict[str, Any] = dict(zip(self._states, trace.states, strict=True))
            arrays |= {"gates": trace.gates, "saved": trace.saved if record else None}
            arrays["exchange"] = self._initialised_exchange(
                direction, trace.states, layout, scratch
            )
            arrays |= dict.fromkeys(LOWER_LAYER)
            if chosen.layers > 1 and every:
                weight_ih = _readable(direction.weights.weight_ih)
                arrays |= zip(LOWER_LAYER, (weight_ih, every[-1]["exchange"]), strict=True)
            every.append(arrays)
        self._launch(chosen, "forward", directions, every, layout)

    def _initialised_exchange(
        self,
        direction: ForwardPass,
        states: tuple[Array, ...],
        layout: PackedBatch,
        scratch: Workspace,
    ) -> Array:
        """The exchange buffer of a direction, with the initial states in it and in `states`."""
        (h, *others), n_0, xp = states, layout.running, self._backend.xp
        H, first = h.shape[1], _first(layout, direction.reverse)
        width = padded(H, self._numbers)
        exchange = h if width == H else scratch.empty(n_0 + layout.total, width, dtype=h.dtype)
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

    def backward(
        self,
        chosen: LaunchPlan,
        directions: Sequence[BackwardPass],
        layout: PackedBatch,
        scratch: Workspace,
    ) -> None:
        """Undo all steps: of the traces gates become dgh; saved, what the cell's `backward` makes.

        `dstates` become those of the initial states. Rows of `doutput` may stand apart.
        """
        every = []
        for undoing in directions:
            trace, first = undoing.trace, [dstate[: layout.running] for dstate in undoing.dstates]
            H = first[0].shape[1]
            width = trace.gates.shape[1] // H * padded(H, self._numbers)
            exchange = scratch.empty(layout.total, width, dtype=trace.gates.dtype)
            exchange.data.memset_async(SENTINEL, exchange.nbytes)
            arrays: dict[str, Any] = dict(zip(self._states, trace.states, strict=True))
            arrays |= zip(["d" + name for name in self._states], first, strict=True)
            arrays |= {"gates": trace.gates, "saved": trace.saved, "exchange": exchange}
            every.append(arrays | {"doutput": undoing.doutput})
        doutput = directions[0].doutput
        apart = 0 if doutput is None else doutput.strides[0] // doutput.itemsize
        self._launch(chosen, "backward", directions, every, layout, np.int32(apart))

    def _launch(
        self,
        chosen: LaunchPlan,
        work: str,
        directions: Sequence[ForwardPass | BackwardPass],
        every: list[dict[str, Array | None]],
        layout: PackedBatch,
        *own: Any,
    ) -> None:
        """Launch with those of the arrays that the kernel takes, and what all kernels take."""
        kernel = KERNELS[self._cell, work]
        for direction, arrays in zip(directions, every, strict=True):
            weights = direction.weights
            arrays |= {"weight_hh": _readable(weights.weight_hh), "bias_hh": weights.bias_hh}
        H, reverse = directions[0].weights.weight_hh.shape[1], directions[0].reverse
        counts = None if layout.ragged is None else layout.ragged.counts.astype(np.int32)
        sizes = layout.steps, layout.running, H, layout.total, chosen.passes, int(reverse)
        code = source(kernel.file, chosen.cluster, chosen.layers > 1)
        slots = MAX_WAVEFRONT_LAYERS if chosen.layers > 1 else 2
        addresses = grouped_arguments(
            [[arrays[name] for name in kernel.arrays] for arrays in every], slots
        )
        self._backend.cooperative.launch(
            f"{self._cell}_{work}",
            loading.kernel(self._backend.xp, code, chosen.name, chosen.cluster == 1),
            LaunchShape(chosen.grid, chosen.threads, chosen.shared, chosen.cluster),
            (addresses, counts, *map(np.int32, sizes), *own, np.uint32(MAX_POLLS)),
        )


def grouped_arguments(every: Sequence[Sequence[Array | None]], slots: int) -> np.ndarray:
    """`GroupedArguments` of exchange.h for the arrays of directions or layers, in `slots` slots.

    CuPy passes a NumPy array of one element by value, whatever the element is.
    """
    table = np.zeros((slots, len(every[0])), np.uint64)
    for addresses, arrays in zip(table, every, strict=False):
        addresses[:] = [0 if array is None else int(array.data.ptr) for array in arrays]
    return table.reshape(-1).view([("slots", table.dtype, table.shape)])


def _first(layout: PackedBatch, reverse: bool) -> Any:
    """Where in the states a direction finds the initial one of each place."""
    if not reverse:
        return slice(layout.running)
    return slice(layout.total, None) if layout.ragged is None else layout.ragged.last


def _readable(weight: Array) -> Array:
    """A weight that starts on 16 bytes; a copy where it does not."""
    return weight.copy() if weight.data.ptr % 16 else weight


def parts(name: str) -> tuple[str, ...]:
    """The files of a kernel, such as "gru_forward", and of all that it stands on, in order."""
    cell, _, way = name.rpartition("_")
    below = "device.h", "math_mode.h", "exchange.h", "products.h", "staging.h", "units.h"
    return "common.h", f"{cell}.h", *below, f"{way}.h", f"{name}.cu"


@cache
def source(name: str, cluster: int = 1, wave: bool = False) -> str:
    """The text of a kernel, behind all that it stands on.

    :param cluster: the blocks of a cluster.
    :param wave: for the layers of a stack in place of directions.
    """
    head = f"#define XP_CLUSTER {cluster}\n#define XP_WAVEFRONT {int(wave)}\n"
    return head + loading.text(*parts(name))
