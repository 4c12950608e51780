"""One step of all layers in one call, with packed weights: for steppers and short calls.

It replaces the calls of `loop.layer_step` for one layer after the other, in `xprnn/engine/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
from numba import types

from ...backend import Array, Backend
from ...backend.processors import usable
from ...cells import CELLS, Weights
from ...core.passes import PackedWeights
from ..interface import Unsupported
from . import gates as by_element
from . import reset_before
from .control import FLUSHES, flush_subnormals, restore
from .jit import compile_for, inlined, number_of, read, written
from .loops import copy_leading
from .product import pack_transposed, panels_of, product, width_of

# The step of a layer after its input product, by cell. in: `panels` of W_hh, `bias_hh`, h and c;
# inout: gx; workspace: `gh` (N, columns padded), `q` (N, H); out: h_next and c_next. For a cell
# without c, c and c_next are h and h_next.


@inlined
def _rnn_tanh(
    panels: Any, bias_hh: Any, gx: Any, gh: Any, q: Any, h: Any, c: Any, h_next: Any, c_next: Any
) -> None:
    product(h, panels, None, gh)
    by_element.rnn_tanh_forward(gx, gh, None, None, (h_next,), None)


@inlined
def _rnn_relu(
    panels: Any, bias_hh: Any, gx: Any, gh: Any, q: Any, h: Any, c: Any, h_next: Any, c_next: Any
) -> None:
    product(h, panels, None, gh)
    by_element.rnn_relu_forward(gx, gh, None, None, (h_next,), None)


@inlined
def _gru(
    panels: Any, bias_hh: Any, gx: Any, gh: Any, q: Any, h: Any, c: Any, h_next: Any, c_next: Any
) -> None:
    product(h, panels, None, gh)
    by_element.gru_forward(gx, gh, bias_hh, (h,), (h_next,), None)


@inlined
def _gru_reset_before(
    panels: Any, bias_hh: Any, gx: Any, gh: Any, q: Any, h: Any, c: Any, h_next: Any, c_next: Any
) -> None:
    width = panels.shape[2]
    gates = -(-2 * h.shape[1] // width)  # the panels of r and z
    product(h, panels[:gates], None, gh)
    reset_before.forward_reset(gx, gh, h, q)
    gh_n = gh[:, gates * width :]
    product(q, panels[gates:], None, gh_n)
    reset_before.forward_candidate(gx, gh_n, h, h_next)


@inlined
def _lstm(
    panels: Any, bias_hh: Any, gx: Any, gh: Any, q: Any, h: Any, c: Any, h_next: Any, c_next: Any
) -> None:
    product(h, panels, None, gh)
    by_element.lstm_forward(gx, gh, None, (h, c), (h_next, c_next), None)


RECURRENT = {
    "rnn_tanh": _rnn_tanh,
    "rnn_relu": _rnn_relu,
    "gru": _gru,
    "gru_reset_before": _gru_reset_before,
    "lstm": _lstm,
}


# Multiply-adds of a layer above which the BLAS's threads are faster than this one thread
MAX_MULTIPLY_ADDS = 4_000_000
# Rows for which a BLAS takes as long to pack as to multiply: up to four of its threads are slower
PACKING_ROWS = range(2, 17)


def not_profitable(cell: str, sizes: tuple[int, int, int, int]) -> Unsupported | None:
    """Why "auto" uses NumPy's BLAS for the steps of a stack (L, N, I, H)."""
    L, N, I, H = sizes  # noqa: E741
    width, threads = max(I, H) if L > 1 else I, usable()
    work = N * (width + H) * H * CELLS[cell].gates
    if work > MAX_MULTIPLY_ADDS and threads > (4 if N in PACKING_ROWS else 1):
        return Unsupported(
            f"N={N} I={width} H={H}: the products are faster on the BLAS's {threads} threads"
        )
    return None


def step_of(name: str, recurrent: Any) -> Callable[..., None]:
    """The function that runs a step of all layers; `recurrent` is an entry of RECURRENT."""

    def step(
        panels_in: Any,  # in, (panels, I, width): of the first layer's input
        panels_up: Any,  # in, (L-1, panels, H, width): of the other layers' inputs
        panels_hh: Any,  # in, (L, panels, H, width)
        bias: Any,  # in, (L, panels, width): of the input side
        bias_hh: Any,  # in, (L, G*H)
        row: Any,  # workspace, (N, I): x, contiguous
        gx: Any,  # workspace, (N, panels * width)
        gh: Any,  # workspace
        q: Any,  # workspace, (N, H)
        x: Any,  # in, (N, I)
        h: Any,  # in, (L, N, H), like c
        c: Any,
        h_next: Any,  # out, (L, N, H), like c_next
        c_next: Any,
        out: Any,  # out, (N, H), written last: it may share memory with x
    ) -> None:
        control = flush_subnormals()
        copy_leading(x, row)
        for k in range(h.shape[0]):
            below = row if k == 0 else h_next[k - 1]
            panels = panels_in if k == 0 else panels_up[k - 1]
            product(below, panels, bias[k], gx)
            recurrent(panels_hh[k], bias_hh[k], gx, gh, q, h[k], c[k], h_next[k], c_next[k])
        copy_leading(h_next[h.shape[0] - 1], out)
        restore(control)

    step.__name__ = f"{name}_step"
    return step


class FusedStep:
    """The compiled step of a stack, with its packed weights and workspace.

    :param weights: of each layer; `refresh` reads their current values.
    :param batch: N, which `resize` changes.
    """

    flushes = FLUSHES  # whether it sets the control bits for subnormal numbers itself

    def __init__(
        self, backend: Backend, cell: str, dtype: np.dtype[Any], weights: list[Weights], batch: int
    ) -> None:
        self._weights, self._cell = weights, CELLS[cell]
        self._backend, self._dtype = backend, dtype
        (GH, H), I = weights[0].weight_hh.shape, weights[0].weight_ih.shape[1]  # noqa: E741
        # the rows of W_hh of each dependent product
        self._parts = (
            (slice(0, 2 * H), slice(2 * H, GH)) if _has_two_products(cell) else (slice(0, GH),)
        )
        self._step, self._pack = _step(cell, dtype), _pack(dtype)
        self._recurrent = sum([panels_of(part.stop - part.start, dtype) for part in self._parts])
        widths = panels_of(GH, dtype) * width_of(dtype), self._recurrent * width_of(dtype)
        self._widths, self._max_batch = (I, *widths, H), -1
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Continue with steps of `batch` rows, in the memory of the largest batch so far."""
        if batch > self._max_batch:
            self._max_batch = batch
            self._scratch = [self._zeros(batch, width) for width in self._widths]
        self._rows = [array[:batch] for array in self._scratch]

    def refresh(self, packed: PackedWeights) -> None:
        """Use the current values of the weights; executors share the packed ones."""
        self._arrays = packed.get("step", self._packed)

    def _packed(self, old: tuple[Array, ...] | None) -> tuple[Array, ...]:
        """The weights and biases of all layers in the step's layout."""
        panels_in, panels_up, panels_hh, bias, bias_hh = arrays = old or self._zeroed()
        for k, weights in enumerate(self._weights):
            self._pack(weights.weight_ih, panels_up[k - 1] if k else panels_in)
            first = 0
            for part in self._parts:
                matrix = weights.weight_hh[part]
                count = panels_of(len(matrix), matrix.dtype)
                self._pack(matrix, panels_hh[k, first : first + count])
                first += count
            both = self._cell.input_bias(weights, self._dtype)
            if both is not None:
                bias[k].reshape(-1)[: both.size] = both
                bias_hh[k] = weights.bias_hh
        return arrays

    def _zeroed(self) -> tuple[Array, ...]:
        """New arrays for `_packed`, zeroed."""
        L, (GH, H) = len(self._weights), self._weights[0].weight_hh.shape
        I = self._weights[0].weight_ih.shape[1]  # noqa: E741
        count, width = panels_of(GH, self._dtype), width_of(self._dtype)
        panels = (count, I, width), (L - 1, count, H, width), (L, self._recurrent, H, width)
        return tuple([self._zeros(*shape) for shape in (*panels, (L, count, width), (L, GH))])

    def _zeros(self, *shape: int) -> Array:
        return self._backend.zeros_aligned(prod(shape), self._dtype).reshape(shape)

    def launch(
        self, x: Array, now: tuple[Array, ...], after: tuple[Array, ...], out: Array
    ) -> None:
        """Run one step; in: x (N, I) and the states `now`, (L, N, H) each.

        out: `after` and `out` (N, H), the last layer's h; x and `out` may have any strides.
        """
        self._step(*self._arrays, *self._rows, x, now[0], now[-1], after[0], after[-1], out)


def _has_two_products(cell: str) -> bool:
    return cell == "gru_reset_before"


@cache
def _step(cell: str, dtype: np.dtype[Any]) -> Any:
    """The compiled step of a cell."""
    number = number_of(dtype)
    matrix, states = written(number, 2), written(number, 3)
    x = types.Array(number, 2, "A", readonly=True, aligned=False)
    packed = written(number, 3), written(number, 4), written(number, 4), written(number, 3), matrix
    out = types.Array(number, 2, "A", aligned=False)
    function = step_of(cell, RECURRENT[cell])
    signature = *packed, *[matrix] * 4, x, *[states] * 4, out
    return compile_for(function, signature)


@cache
def _pack(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    return compile_for(_pack_one, (read(number, 2), written(number, 3)))


def _pack_one(matrix: Any, panels: Any) -> None:
    pack_transposed(matrix, panels)


def needed(cell: str, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """Functions that compile the step of a cell; steps are never recorded."""
    return [partial(_step, cell, dtype), partial(_pack, dtype)]


def compilations() -> list[Callable[[], Any]]:
    """Functions that each compile a step for one dtype."""
    dtypes = [np.dtype(name) for name in ("float32", "float64")]
    steps = [partial(_step, cell, dtype) for cell in RECURRENT for dtype in dtypes]
    return [*steps, *(partial(_pack, dtype) for dtype in dtypes)]
