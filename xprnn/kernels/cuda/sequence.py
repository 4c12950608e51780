"""Whole sequences: prepares and launches the kernels of the files *_forward.cu and *_backward.cu.

They replace the time loops of `xprnn/sequence.py`, work on the same arrays and leave in them
what the loops leave. A state is also a letter: other blocks wait for it to differ from `EMPTY`.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from ...arithmetic import Arithmetic
from ...backend import Array
from ...backend.cupy import CupyBackend
from ...backend.resident import Shape
from ...cells import CELLS, Weights
from ...layout import Layout
from ...scratch import Workspace
from .plan import Device, Plan, Problem, numbers_of, padded, plan
from .table import KERNELS

EMPTY = 0xFF  # in every byte: a NaN that no kernel writes
# Looks at a letter before a wait is given up, half a microsecond or so each: seconds, where a step
# takes microseconds.
SPINS = 1 << 23


class SequenceKernels:
    """The kernels that take all steps of one direction of a cell, on one device, in one launch."""

    from_input = False
    cost = "one launch takes all steps of a direction of a layer"

    def __init__(self, backend: CupyBackend, cell: str, arithmetic: Arithmetic) -> None:
        self._backend = backend
        self._cell = cell
        self._states = CELLS[cell].state_names
        self._numbers = numbers_of(arithmetic)
        self._device = Device.of(backend.xp, backend.device)

    def plan(self, work: str, N: int, H: int, T: int) -> Plan | str:
        """The launch for "forward", "training" or "backward", or the reason why there is none."""
        return plan(self._device, Problem(self._cell, work, self._numbers, N, H, T))

    def outdone(self, N: int, H: int, T: int) -> str:
        """No call that fits is served faster otherwise, as far as is known."""
        return ""

    def forward(
        self,
        chosen: Plan,
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
        """All steps: gates from gx, and every state.

        `weights` and `initial` (n_0, H) each are read; `gates` (S, G*H) is read, with `saved`
        then written; `saved` (S, H), None unless the call is recorded, and `states` (n_0 + S, H)
        each are written.
        """
        (h, *others), H, rows = states, states[0].shape[1], layout.running
        width, first = padded(H, self._numbers), _first(layout, reverse)
        mail = h if width == H else scratch.empty(rows + layout.total, width, dtype=h.dtype)
        mail.data.memset_async(EMPTY, mail.nbytes)
        xp = self._backend.xp
        # a NaN, but not `EMPTY`
        known = xp.where(initial[0] == initial[0], initial[0], xp.float32(np.nan))
        h[first] = known
        if width > H:
            mail[first, :H] = known
            mail[first, H:] = 0.0
        for state, start in zip(others, initial[1:], strict=True):
            state[first] = start
        arrays = dict(zip(self._states, states, strict=True))
        arrays |= {"gates": gates, "saved": saved, "mail": mail}
        self._launch(chosen, "forward", arrays, weights, layout, H, reverse)

    def backward(
        self,
        chosen: Plan,
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
        """Undo all steps: `gates` becomes dgh, `dstates` (n_0, H) each that of the first states.

        `weights`, `states` and `doutput` (S, H), whose rows may stand apart, are read. `saved`
        becomes what the cell's `backward` makes of it.
        """
        H = dstates[0].shape[1]
        width = gates.shape[1] // H * padded(H, self._numbers)
        mail = scratch.empty(layout.total, width, dtype=gates.dtype)
        mail.data.memset_async(EMPTY, mail.nbytes)
        apart = 0 if doutput is None else doutput.strides[0] // doutput.itemsize
        arrays = dict(zip(self._states, states, strict=True))
        arrays |= zip(["d" + name for name in self._states], dstates, strict=True)
        arrays |= {"doutput": doutput, "gates": gates, "saved": saved, "mail": mail}
        own = (np.int32(apart),)
        self._launch(chosen, "backward", arrays, weights, layout, H, reverse, own)

    def _launch(
        self,
        chosen: Plan,
        work: str,
        arrays: dict[str, Array | None],
        weights: Weights,
        layout: Layout,
        H: int,
        reverse: bool,
        own: tuple[Any, ...] = (),
    ) -> None:
        """Launch with those of the arrays that the kernel takes, and what all kernels take."""
        kernel = KERNELS[self._cell, work]
        arrays |= {"weight_hh": _readable(weights.weight_hh), "bias_hh": weights.bias_hh}
        counts = None if layout.ragged is None else layout.ragged.counts.astype(np.int32)
        sizes = layout.steps, layout.running, H, layout.total, chosen.passes, int(reverse)
        self._backend.resident.launch(
            f"{self._cell}_{work}",
            _kernel(self._backend.xp, kernel.file, chosen.name, chosen.cluster),
            Shape(chosen.grid, chosen.threads, chosen.shared, chosen.cluster),
            (
                *[arrays[name] for name in kernel.arrays],
                *(counts, *map(np.int32, sizes), *own, np.uint32(SPINS)),
            ),
        )


def _first(layout: Layout, reverse: bool) -> Any:
    """Where in the states a direction finds the initial one of each place."""
    if not reverse:
        return slice(layout.running)
    return slice(layout.total, None) if layout.ragged is None else layout.ragged.last


def _readable(weight: Array) -> Array:
    """A weight that starts on 16 bytes; a copy where it does not."""
    return weight.copy() if weight.data.ptr % 16 else weight


@cache
def _kernel(cupy: Any, name: str, instantiation: str, cluster: int) -> Any:
    """An instantiation; CuPy compiles it when it is first asked for on a device."""
    module = cupy.RawModule(
        code=source(name, cluster),
        options=("--std=c++17",),
        name_expressions=(instantiation,),
        enable_cooperative_groups=cluster == 1,  # see backend/resident.py
    )
    return module.get_function(instantiation)


def parts(name: str) -> tuple[str, ...]:
    """The files of a kernel, such as "gru_forward", and of all that it stands on, in order."""
    cell, _, way = name.rpartition("_")
    below = "device.h", "numbers.h", "exchange.h", "products.h", "staging.h", "units.h"
    return "common.h", f"{cell}.h", *below, f"{way}.h", f"{name}.cu"


@cache
def source(name: str, cluster: int = 1) -> str:
    """The text of a kernel for clusters of so many blocks, behind all that it stands on."""
    folder = resources.files(__package__)
    texts = [(folder / part).read_text("utf-8") for part in parts(name)]
    return "\n".join([f"#define XP_CLUSTER {cluster}", *texts])
