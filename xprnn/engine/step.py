"""One step of all layers of a stack: two copies of the states, the weights, and the calls.

The plan determines how it runs: as captured calls of the plain code on NumPy, as products and
kernels layer by layer, or as one call or launch for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..backend import Array
from ..cells import Buffers, Weights
from ..core.passes import PackedWeightsCache
from ..core.spec import StackSpec
from ..kernels import StepPlan
from . import loop
from .replay import Calls, Constants, capture, vectors_of

if TYPE_CHECKING:
    from ..kernels.cuda.stack_step import FusedStep as LaunchedStep
    from ..kernels.numba.step import FusedStep as CompiledStep


MAX_SIZES = 64  # batch sizes whose captured calls are kept; then the oldest is dropped


class VersionedWeights(Protocol):
    """The parameters of a stack: a write increments `version` and invalidates packed weights."""

    @property
    def version(self) -> int:
        """The number of writes."""

    @property
    def packed_weights(self) -> PackedWeightsCache:
        """The weights of this version that kernels have packed."""


class _Captured(NamedTuple):
    """The arrays and calls of steps of one batch size."""

    sides: list[tuple[Array, ...]]
    # the other fields are only for steps of several calls
    x: Any = None  # (N, I)
    inputs: tuple[Array, ...] = ()  # the cell's extra inputs, (N, 1) each
    biases: tuple[tuple[Array, Array], ...] = ()  # (N, G*H) each, and the bias in each row
    calls: tuple[Calls, ...] = ()  # from side 0 to side 1, and back


class StepExecutor:
    """The steps of N rows through a stack of one direction.

    `sides` holds two copies of the states, (L, N, H) each: a step reads one and writes the other,
    so that a failed step changes nothing. h has the compute dtype, c the dtype of the layer.

    `resize` changes N. All sizes share the buffers of the largest one so far and the copies of the
    weights. The layout of a size does not depend on the others, nor do its results, bitwise.
    """

    def __init__(self, plan: StepPlan, spec: StackSpec, batch: int) -> None:
        self._plan, self._spec, self._backend = plan, spec, plan.backend
        self._max_batch = self.batch = batch
        self._memory: dict[str, Array] = {}  # by use, for `_max_batch` rows
        self._constants: Constants = {}
        self.sides = self._states(batch)

    def bind(self, arrays: Mapping[str, Array]) -> None:
        """Capture the steps from side 0 to side 1 and back, with these parameters."""
        plan = self._plan
        self._version = -1  # of the parameters that the steps read
        self._compiled: CompiledStep | None = None
        self._launched: LaunchedStep | None = None
        self._copies: list[tuple[Array, Array]] = []
        self._weights = [weights for (weights,) in self._spec.weights(arrays)]
        if not plan.is_fused or plan.backend.on_gpu:
            self._read = [self._copied(weights) for weights in self._weights]
        self._input_biases: list[Array] = []
        if not plan.is_fused:
            empty, C = plan.xp.empty, plan.precision.compute_dtype
            if self._spec.bias:
                self._input_biases = [empty(len(w.weight_ih), C) for w in self._weights]
        elif plan.backend.on_gpu:
            self._launched = self._launched_step()
        else:
            self._compiled = self._compiled_step()
        # whether a step sets the control bits of subnormal numbers itself
        self._flushes = self._compiled is not None and self._compiled.flushes
        self._captured: dict[int, _Captured] = {}
        self._select(self._capture(self.batch))

    def resize(self, batch: int) -> None:
        """Continue with steps of `batch` rows, whose states must be written first."""
        if batch > self._max_batch:
            self._max_batch, self._memory, self._constants, self._captured = batch, {}, {}, {}
        captured = self._captured.get(batch) or self._capture(batch)
        if self._compiled is not None:
            self._compiled.resize(batch)
        self.batch = batch
        self._select(captured)

    def follow(self, parameters: VersionedWeights) -> None:
        """Use the current values of the parameters; the caller excludes writes."""
        version = parameters.version
        if version != self._version:
            with self._backend.activate():
                self._refresh(parameters.packed_weights)
            self._version = version

    def _refresh(self, packed: PackedWeightsCache) -> None:
        """Copy the current values of the parameters, or use packed weights."""
        if self._compiled is not None:
            self._compiled.refresh(packed[0, 0])
        for copy, matrix in self._copies:
            copy[...] = matrix
        for bias, weights in zip(self._input_biases, self._weights, strict=False):
            bias[...] = self._spec.cell.input_bias(weights, bias.dtype)
        for rows, bias in self._biases:
            rows[...] = bias

    def _select(self, captured: _Captured) -> None:
        self.sides, self._x, self._inputs, self._biases, self._calls = captured
        for rows, bias in self._biases:  # in memory shared with other sizes
            rows[...] = bias

    def run(
        self,
        side: int,
        x: Array,
        waiting: Array | None,
        out: Array | None,
        inputs: tuple[Array, ...] = (),
    ) -> Array:
        """Run all layers from `side` to the other one; the last layer's h, in `out` if given.

        :param x: in: (N, I).
        :param inputs: in: the cell's extra inputs, N numbers each.
        :param waiting: in: (N, 1), bool: the rows that keep their states.
        """
        written: Any = None
        if self._flushes and self._compiled is not None and waiting is None:
            # entering the floating-point environment in Python would take a fifth of the time
            written = self._new_h() if out is None else out
            self._compiled.launch(x, self.sides[side], self.sides[1 - side], written, inputs)
            return written
        with self._backend.activate():
            before, after = self.sides[side], self.sides[1 - side]
            if self._compiled is not None:
                written = self._new_h() if out is None else out
                self._compiled.launch(x, before, after, written, inputs)
            elif self._launched is not None:
                xp = self._plan.xp
                # blocks write `out` while others still read x
                direct = (
                    out is not None and out.flags.c_contiguous and not xp.may_share_memory(x, out)
                )
                written = out if direct else self._new_h()
                self._launched.launch(xp.ascontiguousarray(x), before, after, written)
            else:
                if inputs:
                    for array, value in zip(self._inputs, inputs, strict=True):
                        array[...] = value.reshape(array.shape)
                self._run_calls(side, x, waiting)
            if waiting is None and written is not None and (out is None or out is written):
                return written
            if waiting is not None:
                for old, new in zip(before, after, strict=True):
                    self._plan.xp.copyto(bits(new), bits(old), "unsafe", waiting)
            h = after[0][-1]
            if out is None:
                return h.astype(self._plan.precision.dtype, order="C")
            out[...] = h
            return out

    def _new_h(self) -> Array:
        shape = self.batch, self._spec.output_size
        return self._plan.xp.empty(shape, self._plan.precision.dtype)

    def _run_calls(self, side: int, x: Array, waiting: Array | None) -> None:
        """Run all layers from `side` to the other one, call by call."""
        self._x[...] = x
        if waiting is not None:
            self._plan.xp.copyto(bits(self._x), 0, "unsafe", waiting)
        for call in self._calls[side]:
            call()

    def _capture(self, batch: int) -> _Captured:
        """The arrays and calls of steps of `batch` rows, which are stored."""
        if len(self._captured) >= MAX_SIZES:
            del self._captured[next(iter(self._captured))]
        sides = self._states(batch)
        captured = _Captured(sides) if self._plan.is_fused else self._calls_of(batch, sides)
        self._captured[batch] = captured
        return captured

    def _calls_of(self, batch: int, sides: list[tuple[Array, ...]]) -> _Captured:
        """The steps that consist of several calls.

        All layers share the arrays, except states, weights and biases. NumPy adds a bias that is
        repeated for each row without a temporary buffer.
        """
        plan, cell, H = self._plan, self._plan.cell, self._spec.hidden_size
        C, A = plan.precision.compute_dtype, plan.precision.dtype
        x = self._empty("x", batch, self._spec.input_size, C)
        gates = self._empty("gates", batch, cell.gates * H, C)
        saved = self._empty("saved", batch, cell.saved_size(H), C)
        inputs = tuple([self._empty(f"input_{n}", batch, 1, A) for n in cell.extra_inputs])
        sizes = cell.scratch_sizes(H, False)
        widths = enumerate(sizes.numbers + sizes.conditions)
        arrays = [self._empty(f"scratch{k}", batch, width, A) for k, width in widths]
        numbers = len(sizes.numbers)
        operands = [
            self._empty(f"operand{k}", batch, width, C) for k, width in enumerate(sizes.operands)
        ]
        scratch = (*arrays[:numbers], *loop.as_bools(arrays[numbers:]), *operands)
        read, biases = self._read, self._input_biases
        filled: list[tuple[Array, Array]] = []
        if plan.replays:

            def repeated(use: str, vector: Array) -> Array:
                rows = self._empty(use, batch, len(vector), C)
                filled.append((rows, vector))
                return rows

            biases = [repeated(f"b_ih{k}", bias) for k, bias in enumerate(biases)]
            read = [
                weights._replace(
                    **{n: repeated(f"{n}{k}", v) for n, v in vectors_of(weights).items()}
                )
                for k, weights in enumerate(read)
            ]
        both: list[Calls] = []
        for before, after in (sides, sides[::-1]):
            calls: Calls = []
            below = x
            for k, weights in enumerate(read):
                states, next_states = (tuple([s[k] for s in side]) for side in (before, after))
                step = Buffers(gates, saved, states, next_states, (), scratch, inputs)
                arguments = cell, weights, biases[k] if biases else None, below, step
                if plan.replays:
                    calls += capture(loop.layer_step, *arguments, constants=self._constants)
                else:
                    calls.append(partial(loop.layer_step, plan.xp, *arguments))
                below = next_states[0]
            both.append(calls)
        return _Captured(sides, x, inputs, tuple(filled), tuple(both))

    def _states(self, batch: int) -> list[tuple[Array, ...]]:
        """The states of `batch` rows, on both sides."""
        spec, plan = self._spec, self._plan
        names = plan.cell.state_names
        types = [plan.precision.compute_dtype, *[plan.precision.dtype] * (len(names) - 1)]
        return [
            tuple(
                [
                    self._empty(f"{name}{side}", batch, size, dtype, spec.num_layers)
                    for name, size, dtype in zip(names, spec.state_sizes, types, strict=True)
                ]
            )
            for side in range(2)
        ]

    def _empty(self, use: str, rows: int, width: int, dtype: Any, layers: int = 0) -> Array:
        """An array (rows, width), or (layers, rows, width), at the start of the buffer for a use.

        A new buffer is zeroed. Rows are contiguous or, in captured calls, columns: each gate is
        then contiguous, which saves more than half the time of a small call.
        """
        size = max(layers, 1) * width
        flat = self._memory.get(use)
        if flat is None:
            flat = self._backend.zeros_aligned(size * self._max_batch, dtype)
            self._memory[use] = flat
        outer = (layers,) if layers else ()
        if self._plan.replays:
            return flat[: size * rows].reshape(*outer, width, rows).swapaxes(-1, -2)
        return flat[: size * rows].reshape(*outer, rows, width)

    def _copied(self, weights: Weights) -> Weights:
        """A layer's weights as its step reads them.

        `_refresh` fills the copies: low-precision weights, and for captured calls all of them. BLAS
        on a CPU reads weights with contiguous columns up to twice as fast, even for one row.
        """
        C = self._plan.precision.compute_dtype
        copies: dict[str, Array] = {}
        for name, matrix in weights._asdict().items():
            if matrix is None or matrix.ndim != 2:
                continue
            rows, columns = matrix.shape
            if self._plan.replays:
                flat = self._backend.zeros_aligned(rows * columns, C)
                copies[name] = flat.reshape(columns, rows).T
            elif matrix.dtype != C:
                copies[name] = self._plan.xp.empty(matrix.shape, C)
        self._copies += [(copy, getattr(weights, name)) for name, copy in copies.items()]
        return weights._replace(**copies)

    def _compiled_step(self) -> CompiledStep:
        """The step of all layers in one call of compiled code."""
        from ..kernels.numba.step import FusedStep

        plan = self._plan
        return FusedStep(
            plan.backend, self._spec.cell, plan.precision.dtype, self._weights, self.batch
        )

    def _launched_step(self) -> LaunchedStep:
        """The step of all layers in one launch."""
        from ..kernels.cuda.stack_step import FusedStep, StepSizes

        spec, plan = self._spec, self._plan
        sizes = StepSizes(spec.num_layers, self.batch, spec.input_size, spec.hidden_size)
        return FusedStep(plan.backend, spec.cell.name, plan.precision, sizes, self._read)


def bits(array: Array) -> Array:
    """An array's memory as unsigned integers: any type can then be copied bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")
