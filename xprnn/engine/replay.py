"""Captured array calls, replayed: on small arrays Python's overhead exceeds the arithmetic.

`capture` runs a function once on tracers, which capture the array calls made on them with the views
that they operate on; nothing is computed. Replaying the calls creates neither views nor arrays and
evaluates no conditions, like a CUDA graph on a GPU.

`ReplayLoop` runs the steps of the plain code in this way. A step uses feature-major arrays: each
gate is contiguous, for which an array function is several times as fast as for a part of every row,
and the product reads torch's weights without a copy. A step's inputs are copied from the packed
rows, and its results are copied to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, repeat
from operator import setitem
from typing import Any, NamedTuple

import numpy as np

from ..backend import ALIGNMENT, Array, blas
from ..backend.processors import usable
from ..cells import Buffers, Cell, Weights
from ..core.packing import PackedBatch, StepRun
from ..core.passes import Activations, BackwardPass, ForwardPass
from ..core.workspace import Workspace
from ..kernels.interface import CallContext, Pass, RunnerCosts, Sizes
from ..kernels.shared import (
    allocate,
    extra_arrays,
    input_projection,
    weight_gradients,
    write_results,
)
from .loop import StepLoop, as_bools, copy_initial_states

Calls = list[partial[Any]]
Constants = dict[tuple[float, np.dtype[Any]], np.ndarray]  # numbers as arrays, one for each element
Groups = list[list[int]]  # widths of arrays
# An array of a step, packed rows, and the first packed row of each step
Copy = tuple[Array, Array, Sequence[int]]

# `out` by position saves a third of a small call; for these two NumPy warns about it
OUT_BY_NAME = (np.minimum, np.maximum)

MIN_STEPS = 8  # from which replaying is faster: the setup costs about as much
GAP = 272  # elements, of 4 or 8 bytes, between arrays; a multiple of 64 bytes
MIN_INPUT_ROWS = 16  # from which an input product per step costs no more than one for all steps
MAX_CAPTURES = 64  # per workspace; then the oldest is dropped
CAPTURED_BYTES = 16 << 10  # of the captured calls of a direction, roughly


def capture(
    function: Callable[..., None], *arguments: Any, constants: Constants | None = None
) -> Calls:
    """The calls that function(np, *arguments) makes, to be replayed on the same arrays.

    :param function: takes an array module and `arguments`. It works in place: ufuncs and products
        with `out=`, `+=` and the like, `a[...] = b`, slices, `.T`. A use of the values
        themselves cannot be captured, and raises AttributeError or TypeError.
    :param arguments: NumPy arrays, in tuples or not, and anything else, which is passed unchanged.
    :param constants: inout: arrays that captures share; None: they are not shared.

    >>> a = np.ones(2)
    >>> def twice(xp, a):
    ...     a += a
    >>> calls = capture(twice, a)
    >>> a.tolist()
    [1.0, 1.0]
    >>> for call in calls + calls:
    ...     _ = call()
    >>> a.tolist()
    [4.0, 4.0]
    """
    calls: Calls = []
    module = _Module(calls, {} if constants is None else constants)
    function(module, *[_captured(argument, calls) for argument in arguments])
    return calls


def repeating(calls: Calls) -> list[Iterator[Any]]:
    """For each call an endless iterator that makes it at each `next`.

    `zip` over them makes all calls in order, without running Python code between them.
    """
    iterators: list[Iterator[Any]] = []
    for call in calls:
        function = partial(call.func, **call.keywords) if call.keywords else call.func
        iterators.append(map(function, *[repeat(operand) for operand in call.args]))
    return iterators


def _captured(item: Any, calls: Calls) -> Any:
    if isinstance(item, np.ndarray):
        return _Tracer(item, calls)
    if isinstance(item, tuple):
        parts = [_captured(part, calls) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


def _constant(item: float, target: np.ndarray, constants: Constants) -> np.ndarray:
    """An array like `target` of one number: the minimum with a scalar takes three times as long."""
    key = item, target.dtype
    flat = constants.get(key)
    if flat is None or flat.size < target.size:
        flat = constants[key] = np.full(target.size, item, target.dtype)
    order: Any = "F" if target.flags.f_contiguous else "C"
    return flat[: target.size].reshape(target.shape, order=order)


class _Module:
    """NumPy's functions that write to `out`: they capture a call instead of making it."""

    def __init__(self, calls: Calls, constants: Constants) -> None:
        self._calls, self._constants = calls, constants

    def _number(self, item: float, target: np.ndarray, operands: tuple[Any, ...]) -> np.ndarray:
        """A number as an array: NumPy would convert it at each call."""
        dtype = target.dtype
        if dtype.kind == "b":  # a comparison
            dtype = next(each.dtype for each in operands if isinstance(each, _Tracer))
        return np.array(item, dtype)

    def _repeated(self, item: float, target: np.ndarray, _: tuple[Any, ...]) -> np.ndarray:
        """A number as an array with as many elements as the target."""
        return _constant(item, target, self._constants)

    def copyto(self, out: _Tracer, item: Any, where: _Tracer | None = None) -> None:
        """Capture an assignment, or of the elements for which a condition holds."""
        source = item.array if isinstance(item, _Tracer) else np.array(item, out.dtype)
        call = partial(np.copyto, out.array, source)
        self._calls.append(call if where is None else partial(call, "same_kind", where.array))

    def sum(self, item: _Tracer, axis: int, out: _Tracer, keepdims: bool) -> None:
        """Capture a sum over rows or columns."""
        self._calls.append(partial(np.add.reduce, item.array, axis, None, out.array, keepdims))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function: np.ufunc = getattr(np, name)
        number = self._repeated if function in OUT_BY_NAME else self._number

        def capture_call(*operands: Any, out: _Tracer) -> None:
            target = out.array
            inner = [
                item.array if isinstance(item, _Tracer) else number(item, target, operands)
                for item in operands
            ]
            if function is np.matmul:
                left, right = inner
                if target.flags.f_contiguous:
                    # the same product in the layout that BLAS reads without a copy: (A B)' = B' A'
                    left, right, target = right.T, left.T, target.T
                self._calls += blas.calls(left, right, target)
            elif function in OUT_BY_NAME:
                self._calls.append(partial(function, *inner, out=target))
            else:
                self._calls.append(partial(function, *inner, target))

        return capture_call


class _Tracer:
    """An array, or a view of one, that captures the calls that would write to it."""

    def __init__(self, array: np.ndarray, calls: Calls) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self._calls = calls

    @property
    def T(self) -> _Tracer:  # noqa: N802
        """The transposed view."""
        return _Tracer(self.array.T, self._calls)

    def __getitem__(self, key: Any) -> _Tracer:
        view = self.array[key]
        if view.size and not np.may_share_memory(view, self.array):
            raise TypeError(f"capture: expected a view, got a copy by index {key!r}")
        return _Tracer(view, self._calls)

    def __setitem__(self, key: Any, value: _Tracer) -> None:
        self._calls.append(partial(np.copyto, self[key].array, value.array))

    def _in_place(self, name: str, other: Any) -> _Tracer:
        getattr(_Module(self._calls, {}), name)(self, other, out=self)
        return self

    def __iadd__(self, other: Any) -> _Tracer:
        return self._in_place("add", other)

    def __isub__(self, other: Any) -> _Tracer:
        return self._in_place("subtract", other)

    def __imul__(self, other: Any) -> _Tracer:
        return self._in_place("multiply", other)


# -- the runner


class Captured(NamedTuple):
    """The captured calls of a step, and the feature-major arrays that they operate on."""

    weights: Weights  # read by the calls; the reference keeps its id unique
    source: Array  # in: gx or x of a forward step, doutput of a backward step
    gates: Array
    saved: Array
    states: tuple[Array, ...]
    next_states: tuple[Array, ...]
    dstates: tuple[Array, ...]
    extra: tuple[Array, ...]  # in
    input_bias: Array  # in: repeated for each row, as the vectors
    vectors: Mapping[str, Array]  # in: of the weights, by name
    calls: list[Iterator[Any]]


class Captures:
    """The captured steps of one workspace; their arrays share one buffer."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._buffer = workspace.aligned(0)
        self.by_key: dict[tuple[Any, ...], Captured] = {}
        self.constants: Constants = {}

    def add(self, key: tuple[Any, ...], captured: Captured) -> None:
        """Store a captured step."""
        if len(self.by_key) >= MAX_CAPTURES:
            del self.by_key[next(iter(self.by_key))]
        self.by_key[key] = captured

    def reserve(self, rows: int, groups: Groups) -> None:
        """Make the buffer large enough for steps with arrays of these widths."""
        size = self._starts(rows, [*chain(*groups)])[-1]
        if size > self._buffer.size:
            self._buffer = self._workspace.aligned(size)
            self.by_key.clear()  # they use the old buffer

    def arrays(self, rows: int, groups: Groups) -> list[list[Array]]:
        """Arrays (rows, width) with contiguous columns, in the shared buffer."""
        widths = [*chain(*groups)]
        arrays = iter(
            [
                self._buffer[start : start + rows * width].reshape(width, rows).T
                for start, width in zip(self._starts(rows, widths), widths, strict=False)
            ]
        )
        return [[*islice(arrays, len(group))] for group in groups]

    def _starts(self, rows: int, widths: Sequence[int]) -> list[int]:
        """The start of each array in the buffer, and the end of the last one.

        Arrays that are a power of two apart compete for the same cache sets: one call took ten
        times as long. Therefore `GAP` elements separate them.
        """
        grain = ALIGNMENT // self._workspace.dtype.itemsize
        starts = [0]
        for width in widths:
            starts.append(starts[-1] - (-(rows * width + GAP) // grain) * grain)
        return starts


class ReplayLoop:
    """Runs the plain code's steps on NumPy by replaying captured calls, if there are enough steps.

    Captured calls are stored in the workspace of a call, so that later calls of a layer use them.
    """

    costs: RunnerCosts = RunnerCosts(bytes_per_direction=CAPTURED_BYTES)

    def __init__(self, cell: Cell, dtype: np.dtype[Any]) -> None:
        self.cell: Cell = cell
        self.compute_dtype: Any = dtype
        self._loop = StepLoop(np, cell, dtype)  # for short runs

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Each direction separately."""
        return self._loop.groups(kind, sizes, directions)

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""
        result, with_input = [], multiplies_input(call.batch)
        for direction in passes:
            activations = allocate(self.cell, self.compute_dtype, direction, call)
            extra = extra_arrays(np, self._loop.cell, direction)
            if not with_input:
                input_projection(blas, self.cell, direction, activations.gates)
            for run in call.batch.walk(direction.reverse):
                copy_initial_states(direction, activations, run)
                if is_replayed(run):
                    self.replay_steps(direction, activations, run, call, extra, with_input)
                else:
                    self._loop.run_steps(direction, activations, run, call, extra)
            write_results(direction, activations, call.batch)
            result.append(activations)
        return result

    def replay_steps(
        self,
        direction: ForwardPass,
        activations: Activations,
        run: StepRun,
        call: CallContext,
        extra: tuple[Array, ...],
        with_input: bool,
    ) -> None:
        """Replay steps; `with_input`: including their input products."""
        cell, weights, rows, after = self.cell, direction.weights, run.rows, run.after
        captures, states = captures_of(call.scratch), activations.states
        largest = weights.weight_hh.size if type(weights) is Weights else _largest(weights)
        if with_input:
            largest = max(largest, weights.weight_ih.size)
        # calls of large products are captured for a number of threads
        threads = usable() if rows * largest > blas.SLICE else 0
        key = id(weights), rows, with_input, threads, cell.records
        captured = captures.by_key.get(key)
        if captured is None:
            vectors = vectors_of(weights)
            groups = self._forward_widths(weights, with_input, vectors, extra)
            captures.reserve(rows, groups)
            if call.record:  # growing later would drop what is captured now
                captures.reserve(rows, self._backward_widths(weights, True, extra))
            arrays = captures.arrays(rows, groups)
            captured = self._capture_forward(weights, vectors, arrays, captures)
            captures.add(key, captured)
        for k, state in enumerate(captured.states):  # `zip` takes longer
            state[...] = states[k][run.before[0] :][:rows]
        input_bias = captured.input_bias
        if input_bias.size:
            input_bias[...] = cell.input_bias(weights, input_bias.dtype)
        for name, vector in captured.vectors.items():
            vector[...] = getattr(weights, name)
        source = activations.x if with_input else activations.gates
        inputs: list[Copy] = [(captured.source, source, run.gates)]
        if extra:
            pairs = zip(captured.extra, extra, strict=True)
            inputs += [(array, packed, run.gates) for array, packed in pairs]
        results: list[Copy] = [(captured.states[0], states[0], after)]
        others = range(1, len(states))
        if call.record:
            results += [(captured.states[k], states[k], after) for k in others]
            results.append((captured.saved, activations.saved, run.gates))
            if "gates" in cell.backward_reads:
                results.append((captured.gates, activations.gates, run.gates))
        replay(captured.calls, inputs, results, run)
        for k in others:
            states[k][after[-1] :][:rows] = captured.states[k]

    def _forward_widths(
        self,
        weights: Weights,
        with_input: bool,
        vectors: Mapping[str, Array],
        extra: tuple[Array, ...],
    ) -> Groups:
        """The widths of the arrays of `_capture_forward`."""
        cell, (width, features) = self.cell, weights.weight_ih.shape
        H = width // len(cell.gate_names)
        numbers, conditions, _ = cell.scratch_sizes(H, False)
        has_bias = with_input and weights.bias_ih is not None
        return [
            [width, cell.saved_size(H), features * with_input, width * has_bias],
            [*cell.state_sizes(H)],
            # NumPy adds a bias that is repeated for each row without a temporary buffer
            [len(vector) for vector in vectors.values()],
            [each.shape[1] for each in extra],
            [*numbers],
            [*conditions],
        ]

    def _capture_forward(
        self,
        weights: Weights,
        names: Iterable[str],
        arrays: list[list[Array]],
        captures: Captures,
    ) -> Captured:
        (gates, saved, x, input_bias), states, vectors, extra, numbers, conditions = arrays
        calls: Calls = []
        if x.size:
            calls += blas.calls(weights.weight_ih, x.T, gates.T)
            if input_bias.size:
                calls.append(partial(np.add, gates, input_bias, gates))
        scratch = (*numbers, *(as_bools(conditions) if conditions else ()))
        both = tuple(states), tuple(states)
        step = Buffers(gates, saved, *both, (), scratch, tuple(extra))
        repeated = dict(zip(names, vectors, strict=True))
        read = _replaced(weights, repeated)
        calls += capture(self.cell.forward, read, step, constants=captures.constants)
        source = x if x.size else gates
        buffers = weights, source, gates, saved, *both, (), tuple(extra)
        return Captured(*buffers, input_bias, repeated, repeating(calls))

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""
        for direction in passes:
            extra = extra_arrays(np, self._loop.cell, direction)
            for run in call.batch.walk(direction.reverse, backward=True):
                if is_replayed(run):
                    self.replay_backward_steps(direction, run, call, extra)
                else:
                    self._loop.run_backward_steps(direction, run, call, extra)
            weight_gradients(np, blas, self.cell, direction, call.batch)

    def replay_backward_steps(
        self,
        direction: BackwardPass,
        run: StepRun,
        call: CallContext,
        extra: tuple[Array, ...],
    ) -> None:
        """Replay the backward pass of steps."""
        cell, weights, rows = self.cell, direction.weights, run.rows
        activations, doutput = direction.activations, direction.doutput
        captures, with_doutput = captures_of(call.scratch), doutput is not None
        largest = weights.weight_hh.size if type(weights) is Weights else _largest(weights)
        threads = usable() if rows * largest > blas.SLICE else 0
        key = id(weights), rows, with_doutput, threads, "backward"
        captured = captures.by_key.get(key)
        if captured is None:
            groups = self._backward_widths(weights, with_doutput, extra)
            captures.reserve(rows, groups)
            captured = self._capture_backward(weights, captures.arrays(rows, groups), captures)
            captures.add(key, captured)
        for k, array in enumerate(captured.dstates):  # `zip` takes longer
            array[...] = direction.dstates[k][:rows]
        for name, vector in captured.vectors.items():
            vector[...] = getattr(weights, name)
        copies: dict[str, Copy] = {
            "gates": (captured.gates, activations.gates, run.gates),
            "saved": (captured.saved, activations.saved, run.gates),
        }
        for k, name in enumerate(cell.state_names):
            copies[name] = captured.states[k], activations.states[k], run.before
            copies[f"{name}'"] = captured.next_states[k], activations.states[k], run.after
        inputs = [copies[name] for name in cell.backward_reads]
        if extra:
            pairs = zip(captured.extra, extra, strict=True)
            inputs += [(array, packed, run.gates) for array, packed in pairs]
        if doutput is not None:
            inputs.append((captured.source, doutput, run.gates))
        replay(captured.calls, inputs, [copies[name] for name in cell.backward_writes], run)
        for k, array in enumerate(captured.dstates):
            direction.dstates[k][:rows] = array

    def _backward_widths(
        self, weights: Weights, with_doutput: bool, extra: tuple[Array, ...]
    ) -> Groups:
        """The widths of the arrays of `_capture_backward`."""
        cell, width = self.cell, weights.weight_ih.shape[0]
        H = width // len(cell.gate_names)
        numbers, conditions, _ = cell.scratch_sizes(H, True)
        states = [*cell.state_sizes(H)]
        return [
            [width, cell.saved_size(H), states[0] * with_doutput],
            *[states] * 3,
            [len(vector) for vector in _own_vectors(weights).values()],
            [each.shape[1] for each in extra],
            [*numbers],
            [*conditions],
        ]

    def _capture_backward(
        self, weights: Weights, arrays: list[list[Array]], captures: Captures
    ) -> Captured:
        (gates, saved, doutput), *states, vectors, extra, numbers, conditions = arrays
        before, after, dstates = map(tuple, states)
        scratch = (*numbers, *as_bools(conditions))
        step = Buffers(gates, saved, before, after, dstates, scratch, tuple(extra))
        repeated = dict(zip(_own_vectors(weights), vectors, strict=True))
        read = _replaced(weights, repeated)
        calls = capture(self.cell.backward, read, step, constants=captures.constants)
        if doutput.size:
            calls.insert(0, partial(np.add, dstates[0], doutput, dstates[0]))
        buffers = weights, doutput, gates, saved, before, after, dstates, tuple(extra)
        return Captured(*buffers, gates[:0], repeated, repeating(calls))


def vectors_of(weights: Weights) -> dict[str, Array]:
    """The vectors that a forward step reads, by name: all but the bias of the input side."""
    names = weights._fields[3:]  # bias_hh and those of a definition
    return {name: v for name in names if (v := getattr(weights, name)) is not None and v.ndim == 1}


def _own_vectors(weights: Weights) -> dict[str, Array]:
    """The vectors that a backward step may read, by name: those of a definition."""
    return {} if type(weights) is Weights else vectors_of(weights)


def _replaced(weights: Weights, arrays: Mapping[str, Array]) -> Weights:
    """Weights with other arrays."""
    # `_replace` leaves an entry in CPython's free list at each call, which looks like a leak
    names = weights._fields
    return type(weights)(*[arrays.get(name, w) for name, w in zip(names, weights, strict=True)])


def _largest(weights: Weights) -> int:
    """The number of elements of the largest matrix that a step of a definition reads."""
    sizes = [
        w.size for name, w in weights._asdict().items() if name != "weight_ih" and w is not None
    ]
    return max(sizes, default=0)


def is_replayed(run: StepRun) -> bool:
    """Whether replaying is faster for these steps."""
    return run.rows > 0 and len(run.times) >= MIN_STEPS


def multiplies_input(batch: PackedBatch) -> bool:
    """Whether each step computes its gx, instead of one product for all steps."""
    if batch.ragged is not None or batch.running < MIN_INPUT_ROWS:
        return False
    return all(is_replayed(run) for run in batch.walk(reverse=False))


def captures_of(workspace: Workspace) -> Captures:
    """The captured steps of a workspace."""
    if workspace.captures is None:
        workspace.captures = Captures(workspace)
    captures: Captures = workspace.captures
    return captures


def replay(
    calls: list[Iterator[Any]], inputs: Sequence[Copy], results: Sequence[Copy], run: StepRun
) -> None:
    """For each step copy its inputs, make the calls, and copy its results."""
    set_block: Any = setitem
    iterators: list[Iterable[Any]] = [range(len(run.times))]
    for array, packed, starts in inputs:
        if array.size:
            blocks = _blocks(packed, starts, run.rows)
            iterators.append(map(set_block, repeat(array), repeat(...), blocks))
    iterators += calls
    for array, packed, starts in results:
        if array.size:
            blocks = _blocks(packed, starts, run.rows)
            iterators.append(map(set_block, blocks, repeat(...), repeat(array)))
    for _ in zip(*iterators, strict=False):
        pass  # `zip` makes the calls


def _blocks(packed: Array, starts: Sequence[int], rows: int) -> Iterable[Array]:
    """Consecutive blocks of packed rows, as views."""
    low, high = sorted([starts[0], starts[-1]])
    if high - low != rows * (len(starts) - 1):  # with different lengths, blocks may be apart
        return [packed[start : start + rows] for start in starts]
    even = packed[low : high + rows].reshape(len(starts), rows, packed.shape[1])
    blocks: Iterable[Array] = even if low == starts[0] else even[::-1]
    return blocks
