"""Whole sequences: prepares and launches the kernels of gru_forward.cu and gru_backward.cu.

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
from ...cells import Weights
from ...layout import Layout
from ...scratch import Workspace
from .plan import Device, Plan, Problem, numbers_of, padded, plan

EMPTY = 0xFF  # in every byte: a NaN that no kernel writes
# Looks at a letter before a wait is given up, half a microsecond or so each: seconds, where a step
# takes microseconds.
SPINS = 1 << 23
HEADERS = ("common.h", "gru.h", "device.h", "numbers.h", "exchange.h", "products.h")


class SequenceKernels:
    """The kernels that take all steps of one direction of a cell, on one device, in one launch."""

    from_input = False
    cost = "one launch takes all steps of a direction of a layer"

    def __init__(self, backend: CupyBackend, cell: str, arithmetic: Arithmetic) -> None:
        self._backend = backend
        self._cell = cell
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

        `weights` and `initial` (n_0, H) are read; `gates` (S, 3*H) is read, with `saved` then
        written; `saved` (S, H), None unless the call is recorded, and `states` (n_0 + S, H) are
        written.
        """
        (state,), (start,) = states, initial
        xp, H, rows = self._backend.xp, start.shape[1], layout.running
        width = padded(H, self._numbers)
        mail = state
        if width > H:
            mail = scratch.empty(rows + layout.total, width, dtype=state.dtype)
        mail.data.memset_async(EMPTY, mail.nbytes)
        known = xp.where(start == start, start, xp.float32(np.nan))  # a NaN, but not `EMPTY`
        first = _first(layout, reverse)
        state[first] = known
        if width > H:
            mail[first, :H] = known
            mail[first, H:] = 0.0
        weight_hh, bias_hh = _readable(weights.weight_hh), weights.bias_hh
        self._launch(
            *(chosen, "forward", layout, H, reverse),
            before=(weight_hh, bias_hh, gates, saved, state, mail),
        )

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
        """Undo all steps: `gates` becomes dgh, `saved` dgx_n, `dstates` (n_0, H) dh of the first.

        `weights`, `states` and `doutput` (S, H), whose rows may stand apart, are read.
        """
        (state,), (dstate,) = states, dstates
        H = dstate.shape[1]
        width = padded(H, self._numbers)
        mail = scratch.empty(layout.total, 3 * width, dtype=gates.dtype)
        mail.data.memset_async(EMPTY, mail.nbytes)
        apart = 0 if doutput is None else doutput.strides[0] // doutput.itemsize
        weight_hh = _readable(weights.weight_hh)
        self._launch(
            *(chosen, "backward", layout, H, reverse),
            before=(weight_hh, state, doutput, gates, saved, dstate, mail),
            after=(np.int32(apart),),
        )

    def _launch(
        self,
        chosen: Plan,
        name: str,
        layout: Layout,
        H: int,
        reverse: bool,
        before: tuple[Array | None, ...],
        after: tuple[Any, ...] = (),
    ) -> None:
        """Launch with the arguments that all sequence kernels have between and behind their own."""
        counts = None if layout.ragged is None else layout.ragged.counts.astype(np.int32)
        sizes = layout.steps, layout.running, H, layout.total, chosen.passes, int(reverse)
        name = f"{self._cell}_{name}"
        self._backend.resident.launch(
            name,
            _kernel(self._backend.xp, name, chosen.name),
            Shape(chosen.grid, chosen.threads, chosen.shared),
            (*before, counts, *map(np.int32, sizes), *after, np.uint32(SPINS)),
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
def _kernel(cupy: Any, name: str, instantiation: str) -> Any:
    """An instantiation; CuPy compiles it when it is first asked for on a device."""
    module = cupy.RawModule(
        code=source(name),
        options=("--std=c++17",),
        name_expressions=(instantiation,),
        enable_cooperative_groups=True,
    )
    return module.get_function(instantiation)


@cache
def source(name: str) -> str:
    """The text of a kernel, behind all that it stands on."""
    folder = resources.files(__package__)
    return "\n".join([(folder / part).read_text("utf-8") for part in (*HEADERS, f"{name}.cu")])
