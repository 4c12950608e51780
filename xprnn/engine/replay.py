"""Captured array calls, replayed: on small arrays the time goes into Python, not into arithmetic.

`capture` runs a function once on arrays that note the array calls made on them, together with the
views they work on; nothing is computed. To replay the calls makes no view, no array and no
decision. It is for the CPU what a CUDA graph is for a GPU.

`ReplayLoop` runs the steps of the plain code that way. A step works on feature-major arrays of its
own: each gate is contiguous, on which an array function is several times as fast as on a part of
every row, and the product reads torch's weights without a copy. What a step reads is copied in,
what it computes is copied out to the packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
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
from ..kernels.shared import allocate, input_projection, weight_gradients, write_results
from .loop import StepLoop, admit_rows

Calls = list[partial[Any]]
Constants = dict[tuple[float, np.dtype[Any]], np.ndarray]  # numbers as arrays, one for each element
# An array of a step, packed rows, and where each step's block of these starts
Copy = tuple[Array, Array, Sequence[int]]

# `out` by position saves a third of a small call; for these two NumPy advises against it
BY_NAME = (np.minimum, np.maximum)

ENOUGH = 8  # steps for which replayed calls are faster: to set them up costs about as much
APART = 272  # elements, of 4 or 8 bytes, that keep the alignment to 64 bytes
WIDE = 16  # rows from which an input product a step costs no more than one for all steps
MOST = 64  # captures that are kept; with one more the oldest is dropped


def capture(
    function: Callable[..., None], *arguments: Any, constants: Constants | None = None
) -> Calls:
    """The calls that function(np, *arguments) makes, to be replayed on the same arrays.

    :param function: takes an array module and `arguments`. It works in place: ufuncs and products
        with `out=`, `+=` and the like, `a[...] = b`, slices, `.T`. A use of the values
        themselves cannot be captured and raises AttributeError or TypeError.
    :param arguments: NumPy arrays, in tuples or not, and anything else, which is passed as it is.
    :param constants: inout: arrays that captures share; None: this one has its own.

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
    """For each call an endless iterator that makes it whenever the next item is taken.

    `zip` over them makes all calls in turn, without running Python code between them.
    """
    found: list[Iterator[Any]] = []
    for call in calls:
        function = partial(call.func, **call.keywords) if call.keywords else call.func
        found.append(map(function, *[repeat(operand) for operand in call.args]))
    return found


def _captured(item: Any, calls: Calls) -> Any:
    if isinstance(item, np.ndarray):
        return _Tracer(item, calls)
    if isinstance(item, tuple):
        parts = [_captured(part, calls) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


def _constant(item: float, target: np.ndarray, constants: Constants) -> np.ndarray:
    """A number for each element of `target`: the minimum with a scalar takes three times."""
    key = item, target.dtype
    flat = constants.get(key)
    if flat is None or flat.size < target.size:
        flat = constants[key] = np.full(target.size, item, target.dtype)
    order: Any = "F" if target.flags.f_contiguous else "C"
    return flat[: target.size].reshape(target.shape, order=order)


class _Module:
    """NumPy, as far as it writes into existing arrays."""

    def __init__(self, calls: Calls, constants: Constants) -> None:
        self._calls, self._constants = calls, constants

    def _operand(self, item: Any, target: np.ndarray, fully: bool) -> np.ndarray:
        """An operand of a call; a number would be converted to an array at each call.

        `fully`: to one with an element for each of the target's.
        """
        if isinstance(item, _Tracer):
            return item.array
        return _constant(item, target, self._constants) if fully else np.array(item, target.dtype)

    def __getattr__(self, name: str) -> Callable[..., None]:
        function: np.ufunc = getattr(np, name)

        def note(*operands: Any, out: _Tracer) -> None:
            target = out.array
            inner = [self._operand(item, target, function in BY_NAME) for item in operands]
            if function is np.matmul:
                left, right = inner
                if target.flags.f_contiguous:
                    # the same product, as BLAS takes it without a copy: (A B)' = B' A'
                    left, right, target = right.T, left.T, target.T
                self._calls += blas.calls(left, right, target)
            elif function in BY_NAME:
                self._calls.append(partial(function, *inner, out=target))
            else:
                self._calls.append(partial(function, *inner, target))

        return note


class _Tracer:
    """An array, or a view of one, that notes the calls that would write to it."""

    def __init__(self, array: np.ndarray, calls: Calls) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self._calls = calls

    @property
    def T(self) -> _Tracer:  # noqa: N802
        """As of an array."""
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
    """The captured calls of a step, and the arrays that they work on, feature-major."""

    weights: Weights  # that the calls read: a reference, so that its identity stays unique
    source: Array  # in: gx or x of a step forward, doutput backward
    gates: Array
    saved: Array
    states: tuple[Array, ...]
    next_states: tuple[Array, ...]
    dstates: tuple[Array, ...]
    biases: tuple[Array, Array]  # for each row; in: of the input product and of W_hh
    calls: list[Iterator[Any]]


class Captures:
    """The captured steps of one workspace, in one buffer that they share."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._buffer = workspace.aligned(0)
        self.by_key: dict[tuple[Any, ...], Captured] = {}
        self.constants: Constants = {}

    def add(self, key: tuple[Any, ...], captured: Captured) -> None:
        """Keep a captured step."""
        if len(self.by_key) >= MOST:
            del self.by_key[next(iter(self.by_key))]
        self.by_key[key] = captured

    def reserve(self, rows: int, *steps: Sequence[int]) -> None:
        """Make the buffer large enough for steps with arrays of these widths."""
        most = max(self._starts(rows, widths)[-1] for widths in steps)
        if most > self._buffer.size:
            self._buffer = self._workspace.aligned(most)
            self.by_key.clear()  # they work on the old one

    def arrays(self, rows: int, widths: Sequence[int]) -> list[Array]:
        """Arrays (rows, width) with contiguous columns, in the shared buffer."""
        return [
            self._buffer[start : start + rows * width].reshape(width, rows).T
            for start, width in zip(self._starts(rows, widths), widths, strict=False)
        ]

    def _starts(self, rows: int, widths: Sequence[int]) -> list[int]:
        """Where arrays begin in the buffer, and where the last one ends.

        Arrays a power of two apart would compete for the same places of the cache: one call took
        ten times as long. So `APART` elements are between them.
        """
        grain = ALIGNMENT // self._workspace.dtype.itemsize
        starts = [0]
        for width in widths:
            starts.append(starts[-1] - (-(rows * width + APART) // grain) * grain)
        return starts


class ReplayLoop:
    """Runs the steps of the plain code on NumPy by captured calls, where there are enough steps.

    What is captured is kept in the workspace of the call, and so between calls of a layer.
    """

    costs: RunnerCosts = RunnerCosts()

    def __init__(self, cell: Cell, dtype: np.dtype[Any]) -> None:
        self.cell: Cell = cell
        self.compute_dtype: Any = dtype
        self._loop = StepLoop(np, cell, dtype)  # for short runs

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Every direction by itself."""
        return self._loop.groups(kind, sizes, directions)

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; outputs and final states are written."""
        every, with_input = [], multiplies_input(call.batch)
        for direction in passes:
            activations = allocate(self.cell, self.compute_dtype, direction, call)
            if not with_input:
                input_projection(blas, self.cell, direction, activations.gates)
            for run in call.batch.walk(direction.reverse):
                admit_rows(direction, activations, run)
                if is_replayed(run):
                    self.replay_steps(direction, activations, run, call, with_input)
                else:
                    self._loop.run_steps(direction, activations, run, call)
            write_results(direction, activations, call.batch)
            every.append(activations)
        return every

    def replay_steps(
        self,
        direction: ForwardPass,
        activations: Activations,
        run: StepRun,
        call: CallContext,
        with_input: bool,
    ) -> None:
        """Run steps by captured calls; `with_input`: their input products too."""
        cell, weights, rows, after = self.cell, direction.weights, run.rows, run.after
        captures, largest = captures_of(call.scratch), weights.weight_hh.size
        if with_input:
            largest = max(largest, weights.weight_ih.size)
        # large products are computed by as many threads as there are
        threads = usable() if rows * largest > blas.SLICE else 0
        key = id(weights), rows, with_input, threads
        captured = captures.by_key.get(key)
        if captured is None:
            captured = self._capture_forward(captures, weights, rows, with_input)
            captures.add(key, captured)
        for state, packed in zip(captured.states, activations.states, strict=True):
            state[...] = packed[run.before[0] :][:rows]
        input_bias, bias_hh = captured.biases
        if input_bias.size:
            input_bias[...] = cell.input_bias(weights, input_bias.dtype)
        if bias_hh.size:
            bias_hh[...] = weights.bias_hh
        source = activations.x if with_input else activations.gates
        first, *others = zip(captured.states, activations.states, strict=True)
        results: list[Copy] = [(*first, after)]
        if call.record:
            results += [(state, packed, after) for state, packed in others]
            results.append((captured.saved, activations.saved, run.gates))
            if "gates" in cell.backward_reads:
                results.append((captured.gates, activations.gates, run.gates))
        replay(captured.calls, [(captured.source, source, run.gates)], results, run)
        for state, packed in others:
            packed[after[-1] :][:rows] = state

    def _capture_forward(
        self, captures: Captures, weights: Weights, rows: int, with_input: bool
    ) -> Captured:
        cell, states = self.cell, len(self.cell.state_names)
        biased, widths = weights.bias_hh is not None, self._forward_widths(weights, with_input)
        captures.reserve(rows, widths, self._backward_widths(weights, True))
        gates, saved, *arrays = captures.arrays(rows, widths)
        own, (x, input_bias, bias_hh, *scratch) = tuple(arrays[:states]), arrays[states:]
        calls: Calls = []
        if with_input:
            calls += blas.calls(weights.weight_ih, x.T, gates.T)
            if biased:
                calls.append(partial(np.add, gates, input_bias, gates))
        step = Buffers(gates, saved, own, own, (), tuple(scratch))
        # `_replace` would leave an entry in CPython's free list at each call, and seem to grow
        read = Weights(
            weights.weight_ih, weights.weight_hh, weights.bias_ih, bias_hh if biased else None
        )
        calls += capture(cell.forward, read, step, constants=captures.constants)
        source = x if with_input else gates
        biases = input_bias, bias_hh
        return Captured(weights, source, gates, saved, own, own, (), biases, repeating(calls))

    def _forward_widths(self, weights: Weights, with_input: bool) -> list[int]:
        cell, (width, H) = self.cell, weights.weight_hh.shape
        biased = weights.bias_hh is not None
        widths = [width, cell.saved * H, *[H] * len(cell.state_names)]
        # a bias that there is for each row needs no buffer of NumPy's own
        widths += [weights.weight_ih.shape[1] * with_input, width * (with_input and biased)]
        return [*widths, width * biased, *[w * H for w in cell.forward_scratch]]

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""
        for direction in passes:
            for run in call.batch.walk(direction.reverse, backward=True):
                if is_replayed(run):
                    self.replay_backward_steps(direction, run, call)
                else:
                    self._loop.run_backward_steps(direction, run, call)
            weight_gradients(np, blas, self.cell, direction, call.batch)

    def replay_backward_steps(
        self, direction: BackwardPass, run: StepRun, call: CallContext
    ) -> None:
        """Run the backward pass of steps by captured calls."""
        cell, weights, rows = self.cell, direction.weights, run.rows
        activations, doutput = direction.activations, direction.doutput
        captures, with_doutput = captures_of(call.scratch), doutput is not None
        threads = usable() if rows * weights.weight_hh.size > blas.SLICE else 0
        key = id(weights), rows, with_doutput, threads, "backward"
        captured = captures.by_key.get(key)
        if captured is None:
            captured = self._capture_backward(captures, weights, rows, with_doutput)
            captures.add(key, captured)
        for own, dstate in zip(captured.dstates, direction.dstates, strict=True):
            own[...] = dstate[:rows]
        copies: dict[str, Copy] = {
            "gates": (captured.gates, activations.gates, run.gates),
            "saved": (captured.saved, activations.saved, run.gates),
        }
        for k, name in enumerate(cell.state_names):
            copies[name] = captured.states[k], activations.states[k], run.before
            copies[f"{name}'"] = captured.next_states[k], activations.states[k], run.after
        inputs = [copies[name] for name in cell.backward_reads]
        if doutput is not None:
            inputs.append((captured.source, doutput, run.gates))
        replay(captured.calls, inputs, [copies[name] for name in cell.backward_writes], run)
        for own, dstate in zip(captured.dstates, direction.dstates, strict=True):
            dstate[:rows] = own

    def _capture_backward(
        self, captures: Captures, weights: Weights, rows: int, with_doutput: bool
    ) -> Captured:
        cell, n = self.cell, len(self.cell.state_names)
        widths = self._backward_widths(weights, with_doutput)
        captures.reserve(rows, widths)
        gates, saved, *arrays, doutput = captures.arrays(rows, widths)
        states, next_states, dstates = (tuple(arrays[k * n : (k + 1) * n]) for k in range(3))
        step = Buffers(gates, saved, states, next_states, dstates, tuple(arrays[3 * n :]))
        calls = capture(cell.backward, weights, step, constants=captures.constants)
        if with_doutput:
            calls.insert(0, partial(np.add, dstates[0], doutput, dstates[0]))
        biases = gates[:0], gates[:0]
        found = weights, doutput, gates, saved, states, next_states, dstates, biases
        return Captured(*found, repeating(calls))

    def _backward_widths(self, weights: Weights, with_doutput: bool) -> list[int]:
        cell, (width, H) = self.cell, weights.weight_hh.shape
        widths = [width, cell.saved * H, *[H] * (3 * len(cell.state_names))]
        return [*widths, *[w * H for w in cell.backward_scratch], H * with_doutput]


def is_replayed(run: StepRun) -> bool:
    """Whether captured calls are faster for these steps."""
    return run.rows > 0 and len(run.times) >= ENOUGH


def multiplies_input(batch: PackedBatch) -> bool:
    """Whether each step computes its gx, rather than one product for all steps."""
    if batch.ragged is not None or batch.running < WIDE:
        return False
    return all(is_replayed(run) for run in batch.walk(reverse=False))


def captures_of(workspace: Workspace) -> Captures:
    """What is captured in a workspace."""
    if workspace.captures is None:
        workspace.captures = Captures(workspace)
    found: Captures = workspace.captures
    return found


def replay(
    calls: list[Iterator[Any]], inputs: Sequence[Copy], results: Sequence[Copy], run: StepRun
) -> None:
    """Make the calls once for each step, between copies of its inputs and of its results."""
    set_block: Any = setitem
    turns: list[Iterable[Any]] = [range(len(run.times))]
    for array, packed, starts in inputs:
        if array.size:
            blocks = _blocks(packed, starts, run.rows)
            turns.append(map(set_block, repeat(array), repeat(...), blocks))
    turns += calls
    for array, packed, starts in results:
        if array.size:
            blocks = _blocks(packed, starts, run.rows)
            turns.append(map(set_block, blocks, repeat(...), repeat(array)))
    for _ in zip(*turns, strict=False):
        pass  # `zip` makes the calls


def _blocks(packed: Array, starts: Sequence[int], rows: int) -> Iterable[Array]:
    """Blocks of packed rows one after the other, as views."""
    low, high = sorted([starts[0], starts[-1]])
    if high - low != rows * (len(starts) - 1):  # the lengths differ, and a block is elsewhere
        return [packed[start : start + rows] for start in starts]
    even = packed[low : high + rows].reshape(len(starts), rows, packed.shape[1])
    blocks: Iterable[Array] = even if low == starts[0] else even[::-1]
    return blocks
