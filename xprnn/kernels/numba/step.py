"""One step of all layers in one call, with packed weights: for steppers and short calls.

It replaces the calls of `loop.layer_step` for one layer after the other, in `xprnn/engine/step.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import prod
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ...backend import Array, Backend
from ...backend.processors import usable
from ...cells import CELLS, Cell, Weights
from ...core.passes import PackedWeights
from ..interface import Pass, Unsupported
from . import generated
from .control import FLUSHES, flush_subnormals, restore
from .jit import INLINED, compile_for, number_of, read, written
from .loops import copy_leading
from .product import pack_transposed, panels_of, product, width_of
from .table import STEP

# Multiply-adds of a layer above which the BLAS's threads are faster than this one thread
MAX_MULTIPLY_ADDS = 4_000_000
# Rows for which a BLAS takes as long to pack as to multiply: up to four of its threads are slower
PACKING_ROWS = range(2, 17)


def not_profitable(cell: Cell, sizes: tuple[int, int, int, int]) -> Unsupported | None:
    """Why "auto" uses NumPy's BLAS for the steps of a stack (L, N, I, H)."""
    L, N, I, H = sizes  # noqa: E741
    width, threads = max(I, H) if L > 1 else I, usable()
    work = N * (width + H) * H * cell.gates
    if work > MAX_MULTIPLY_ADDS and threads > (4 if N in PACKING_ROWS else 1):
        return Unsupported(
            f"N={N} I={width} H={H}: the products are faster on the BLAS's {threads} threads"
        )
    return None


def step_of(name: str, layer_step: Any) -> Callable[..., None]:
    """The function that runs a step of all layers; `layer_step` is made by `generated.py`."""

    def step(
        panels_in: Any,  # in, (panels, I, width): of the first layer's input
        panels_up: Any,  # in, (L-1, panels, outputs, width): of the other layers' inputs
        bias: Any,  # in, (L, panels, width): of the input side
        weights: Any,  # in, (L, panels, K, width) each: the matrices of a step's products
        vectors: Any,  # in, (L, size) each: the vectors that a step reads
        columns: Any,  # in: the columns that a step reads and writes
        row: Any,  # workspace, (N, I): x, contiguous
        gx: Any,  # workspace, (N, panels * width)
        scratch: Any,  # workspace, (N, width) each
        extra: Any,  # in, (N, 1) each
        x: Any,  # in, (N, I)
        states: Any,  # in, (L, N, width) each
        next_states: Any,  # out, (L, N, width) each
        out: Any,  # out, (N, width), written last: it may share memory with x
    ) -> None:
        control = flush_subnormals()
        copy_leading(x, row)
        layers = states[0].shape[0]
        for k in range(layers):
            below = row if k == 0 else next_states[0][k - 1]
            panels = panels_in if k == 0 else panels_up[k - 1]
            product(below, panels, bias[k], gx)
            before, after = _items(states, k), _items(next_states, k)
            layer_step(
                _items(weights, k), _items(vectors, k), columns, scratch, gx, gx, before, after,
                before, extra, gx,
            )  # fmt: skip
        copy_leading(next_states[0][layers - 1], out)
        restore(control)

    step.__name__ = f"{name}_step"
    return step


def _items(arrays: Any, k: Any) -> Any:
    """Item k of each array."""


@overload(_items, jit_options=INLINED)
def _items_by_count(arrays, k):  # type: ignore[no-untyped-def]
    if len(arrays) == 0:
        return lambda arrays, k: ()
    if len(arrays) == 1:
        return lambda arrays, k: (arrays[0][k],)
    return lambda arrays, k: (arrays[0][k],) + _items(arrays[1:], k)  # noqa: RUF005


class FusedStep:
    """The compiled step of a stack, with its packed weights and workspace.

    :param weights: of each layer; `refresh` reads their current values.
    :param batch: N, which `resize` changes.
    """

    flushes = FLUSHES  # whether it sets the control bits for subnormal numbers itself

    def __init__(
        self,
        backend: Backend,
        cell: Cell,
        dtype: np.dtype[Any],
        weights: Sequence[Weights],
        batch: int,
    ) -> None:
        self._weights, self._backend, self._dtype = weights, backend, dtype
        GH, I = weights[0].weight_ih.shape  # noqa: E741
        self._loops = generated.loops_of(cell, GH // cell.gates, dtype)
        source = self._source = self._loops.source(Pass.FORWARD, masked=False)
        self._step, self._pack = _step(source.name, source.text, dtype, source.counts), _pack(dtype)
        self._columns = np.array(source.columns, np.intp)
        self._widths = I, panels_of(GH, dtype) * width_of(dtype), *self._source.scratch
        self._max_batch = -1
        self.resize(batch)

    def resize(self, batch: int) -> None:
        """Continue with steps of `batch` rows, in the memory of the largest batch so far."""
        if batch > self._max_batch:
            self._max_batch = batch
            self._scratch = [self._zeros(batch, width) for width in self._widths]
            self._inputs = [self._zeros(batch, 1) for _ in self._loops.cell.extra_inputs]
        row, gx, *scratch = (array[:batch] for array in self._scratch)
        self._extra = tuple([array[:batch] for array in self._inputs])
        self._rows = row, gx, tuple(scratch), self._extra

    def refresh(self, packed: PackedWeights) -> None:
        """Use the current values of the weights; executors share the packed ones."""
        self._arrays = packed.get("step", self._packed)

    def _packed(self, old: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """The weights and biases of all layers in the step's layout."""
        loops = self._loops
        panels_in, panels_up, bias, matrices, vectors = arrays = old or self._zeroed()
        for k, weights in enumerate(self._weights):
            self._pack(weights.weight_ih, panels_up[k - 1] if k else panels_in)
            for each, target in zip(self._source.products, matrices, strict=True):
                self._pack(loops.matrix(weights, each), target[k])
            for name, values in zip(loops.vectors, vectors, strict=True):
                values[k] = loops.vector(weights, name)
            both = loops.cell.input_bias(weights, self._dtype)
            if both is not None:
                bias[k].reshape(-1)[: both.size] = both
        return arrays

    def _zeroed(self) -> tuple[Any, ...]:
        """New arrays for `_packed`, zeroed."""
        L, first, dtype = len(self._weights), self._weights[0], self._dtype
        (GH, I), width = first.weight_ih.shape, width_of(dtype)  # noqa: E741
        count = panels_of(GH, dtype)
        matrices = [self._loops.matrix(first, each) for each in self._source.products]
        vectors = [self._loops.vector(first, name) for name in self._loops.vectors]
        below = self._weights[-1].weight_ih.shape[1] if L > 1 else 0
        return (
            self._zeros(count, I, width),
            self._zeros(L - 1, count, below, width),
            self._zeros(L, count, width),
            tuple([self._zeros(L, panels_of(len(m), dtype), m.shape[1], width) for m in matrices]),
            tuple([self._zeros(L, vector.size) for vector in vectors]),
        )

    def _zeros(self, *shape: int) -> Array:
        return self._backend.zeros_aligned(prod(shape), self._dtype).reshape(shape)

    def launch(
        self,
        x: Array,
        now: tuple[Array, ...],
        after: tuple[Array, ...],
        out: Array,
        inputs: tuple[Array, ...] = (),
    ) -> None:
        """Run one step; in: x (N, I), `inputs`, N numbers each, and the states `now`.

        out: `after`, (L, N, width) each as `now`, and `out` (N, width), the last layer's output; x
        and `out` may have any strides.
        """
        for array, value in zip(self._extra, inputs, strict=True):
            array[...] = value.reshape(array.shape)
        self._step(*self._arrays, self._columns, *self._rows, x, now, after, out)


@cache
def _step(name: str, text: str, dtype: np.dtype[Any], counts: generated.Counts) -> Any:
    """The compiled step of a cell."""
    number = number_of(dtype)
    matrix, cube = written(number, 2), written(number, 3)
    states = types.UniTuple(cube, counts.states)
    x = types.Array(number, 2, "A", readonly=True, aligned=False)
    out = types.Array(number, 2, "A", aligned=False)
    packed = (
        *(cube, written(number, 4), cube),
        types.UniTuple(written(number, 4), counts.products),
        types.UniTuple(matrix, counts.vectors),
        types.Array(types.intp, 1, "C"),
    )
    scratch = types.UniTuple(matrix, counts.scratch), types.UniTuple(matrix, counts.extra)
    module = generated.module_of(name, text)
    function = step_of(module.__name__.rpartition(".")[2], module.step)
    return compile_for(function, (*packed, matrix, matrix, *scratch, x, states, states, out))


@cache
def _pack(dtype: np.dtype[Any]) -> Any:
    number = number_of(dtype)
    return compile_for(_pack_one, (read(number, 2), written(number, 3)))


def _pack_one(matrix: Any, panels: Any) -> None:
    pack_transposed(matrix, panels)


def needed(cell: Cell, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """Functions that compile the step of a cell; steps are never recorded."""
    loops = generated.loops_of(cell, generated.size_of(cell), dtype)
    source = loops.source(Pass.FORWARD, masked=False)
    compiled = partial(_step, source.name, source.text, dtype, source.counts)
    return [compiled, partial(_pack, dtype)]


def compilations() -> list[Callable[[], Any]]:
    """Functions that each compile a step for one dtype."""
    dtypes = [np.dtype(name) for name in ("float32", "float64")]
    return [each for dtype in dtypes for name in STEP for each in needed(CELLS[name], dtype, False)]
