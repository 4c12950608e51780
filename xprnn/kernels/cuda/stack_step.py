"""One step of all layers in one launch: prepares and launches the kernel of stack_step.cu.

It replaces the calls of `loop.layer_step` for one layer after the other, in `xprnn/engine/step.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...backend import Array
from ...backend.cooperative import LaunchShape
from ...backend.cupy import CupyBackend
from ...cells import Weights
from ...core.precision import PrecisionPolicy
from ..interface import Unsupported
from . import loading
from .plan import DeviceProperties
from .sequence import MAX_POLLS, SENTINEL

UNITS = {  # of the cells
    "rnn_tanh": "RnnUnit<false>",
    "rnn_relu": "RnnUnit<true>",
    "gru": "GruUnit",
    "lstm": "LstmUnit",
}
KINDS = {"float32": "TF32X3", "bfloat16": "BF16", "float16": "F16"}  # math modes, by operand dtype
ROWS = (1, 4, 8)  # maximum of each instantiation; for more rows products are faster
WARPS = 4  # STEP_WARPS of the kernel
PARTS = (  # files of its source
    *("common.h", "gru.h", "lstm.h", "rnn.h", "device.h", "lanes.h", "math_mode.h"),
    "stack_step.cu",
)


class StepSizes(NamedTuple):
    """The sizes of a stack and the number of its streams."""

    L: int
    N: int
    I: int  # noqa: E741
    H: int

    @property
    def rows(self) -> int:
        """The maximum rows of the instantiation for N rows."""
        return next(rows for rows in ROWS if rows >= self.N)

    @property
    def shared(self) -> int:
        """Bytes per block: the rows of a state and of an input, padded to eight floats."""
        widths = self.H, max(self.I, self.H)
        return 4 * self.rows * sum(-(-width // 8) * 8 for width in widths)


def unsupported(
    backend: CupyBackend, cell: str, precision: PrecisionPolicy, sizes: StepSizes
) -> Unsupported | None:
    """Why the kernel cannot run the steps of a stack."""
    why = _why_not(DeviceProperties.of(backend.xp, backend.device), cell, precision, sizes)
    return Unsupported(why) if why else None


def _why_not(
    device: DeviceProperties, cell: str, precision: PrecisionPolicy, sizes: StepSizes
) -> str:
    if cell not in UNITS:
        return f"cell {cell!r} needs two exchanges per step and layer, the step kernel has one"
    if precision.compute_dtype.name not in KINDS:
        return "float64: the step kernel exchanges words of 32 bits"
    if ROWS[-1] < sizes.N:
        return f"N={sizes.N}: the step kernel supports at most {ROWS[-1]} rows"
    if device.capability < (8, 0) or not device.cooperative:
        return "the step kernel needs compute capability 8.0 and cooperative launches"
    if sizes.shared > device.shared_block:
        return (
            f"a block needs {sizes.shared:,} bytes of shared memory, the device has "
            f"{device.shared_block:,}"
        )
    return ""


class FusedStep:
    """The launches of one stepper.

    :param weights: of each layer, matrices in the compute dtype; they are not moved or copied.
    """

    def __init__(
        self,
        backend: Any,
        cell: str,
        precision: PrecisionPolicy,
        sizes: StepSizes,
        weights: list[Weights],
    ) -> None:
        self._backend, self._sizes, self._weights = backend, sizes, weights
        name = instantiation(UNITS[cell], KINDS[precision.compute_dtype.name], sizes.rows)
        self._kernel = loading.kernel(backend.xp, source(), name)
        processors = DeviceProperties.of(backend.xp, backend.device).processors
        self._blocks = min(processors, -(-sizes.H // WARPS))
        addresses = [[0 if w is None else int(w.data.ptr) for w in layer] for layer in weights]
        self._addresses = backend.from_host(np.array(addresses, np.uint64))
        shape = max(sizes.L - 1, 1), sizes.N, sizes.H
        self._exchange = [backend.xp.empty(shape, np.float32) for _ in range(2)]
        for exchange in self._exchange:
            exchange.data.memset_async(SENTINEL, exchange.nbytes)

    def launch(
        self, x: Array, now: tuple[Array, ...], after: tuple[Array, ...], out: Array
    ) -> None:
        """Run one step; in: x (N, I) and the states `now`, (L, N, H) each.

        out: `after` and `out` (N, H), the last layer's h. All are C-contiguous.
        """
        c, c_next = (states[1] if len(states) > 1 else None for states in (now, after))
        exchange, other = self._exchange
        sizes = self._blocks, self._sizes.L, self._sizes.N, self._sizes.I, self._sizes.H
        arrays = self._addresses, x, now[0], c, after[0], c_next, out, exchange, other
        self._backend.cooperative.launch(
            "stack_step",
            self._kernel,
            LaunchShape((1, self._blocks), 32 * WARPS, self._sizes.shared),
            (*arrays, *map(np.int32, sizes), np.uint32(MAX_POLLS)),
        )
        self._exchange.reverse()  # this launch has filled the other one with `SENTINEL`


def instantiation(unit: str, kind: str, rows: int) -> str:
    """The kernel's name in C++ for one of `UNITS`, one of `KINDS` and one of `ROWS`."""
    return f"xprnn::stack_step<xprnn::{unit}, xprnn::{kind}, {rows}>"


def source() -> str:
    """The source of the kernel with all that it includes."""
    return loading.text(*PARTS)
