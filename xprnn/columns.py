"""Steps of the plain code on NumPy, their array calls written down once and repeated.

A step works on arrays of its own that stand by column: each gate is one piece of memory, at which
an array function runs several times as fast as at a part of every row, and the product reads
torch's weights as they stand. What the step reads is copied in, what it leaves is copied out to
the packed rows, which is all that others see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat
from operator import setitem
from typing import Any

import numpy as np

from .backend import Array
from .blas import calls
from .cells import Buffers, Cell, Weights
from .directions import Activations, BackwardPass
from .kernels import ExecutionPlan
from .layout import PackedBatch, Run
from .program import Program, record, repeated
from .scratch import Workspace

ENOUGH = 8  # steps that repay taking down a step's calls, which costs about as much
APART = 272  # elements, of 4 or 8 bytes, that keep the alignment to 64 bytes
WIDE = 16  # rows from which a product a step for the input costs no more than one for all steps


def serves(engine: ExecutionPlan, run: Run) -> bool:
    """Whether a run is taken here: the plain code, which is to serve, on NumPy itself."""
    return engine.repeats and run.rows > 0 and len(run.times) >= ENOUGH


def takes_input(engine: ExecutionPlan, layout: PackedBatch) -> bool:
    """Whether the steps also compute gx, and nobody needs to before them."""
    if layout.ragged is not None or layout.running < WIDE:
        return False
    return all(serves(engine, run) for run in layout.walk(reverse=False))


def take(
    cell: Cell,
    weights: Weights,
    trace: Activations,
    run: Run,
    scratch: Workspace,
    recorded: bool,
    from_input: bool,
) -> None:
    """Take the steps of a run; of `trace` gates are read as gx, or x is read `from_input`.

    The states are written, and if `recorded` gates and saved.
    """
    H = trace.states[0].shape[1]
    empty = partial(_empty, scratch, run.rows)
    gates, saved = empty(cell.gates * H), empty(cell.saved * H)
    states = tuple([empty(H) for _ in trace.states])
    for state, kept in zip(states, trace.states, strict=True):
        state[...] = kept[run.before[0] :][: run.rows]
    program: Program = []
    source, given = trace.gates, gates
    if from_input:
        source, given = trace.x, empty(trace.x.shape[1])
        program = _input_side(cell, weights, given, gates, empty)
    # what bias there is for each row needs no buffer of NumPy's own
    bias = None if weights.bias_hh is None else empty(cell.gates * H)
    if bias is not None:
        bias[...] = weights.bias_hh
    work = tuple([empty(width * H) for width in cell.forward_scratch])
    here = Buffers(gates, saved, states, states, (), work)
    # `_replace` would leave an entry in CPython's free list at each call, and seem to grow
    mine = Weights(weights.weight_ih, weights.weight_hh, weights.bias_ih, bias)
    program += record(cell.forward, mine, here)

    left = [(states[0], trace.states[0], run.after)]
    others = list(zip(states[1:], trace.states[1:], strict=True))
    if recorded:
        left += [(state, kept, run.after) for state, kept in others]
        left += [(saved, trace.saved, run.gates)]
    if recorded and "gates" in cell.backward_reads:
        left += [(gates, trace.gates, run.gates)]
    _repeat(program, len(run.times), [(given, source, run.gates)], left, run.rows)
    for state, kept in others:
        kept[run.after[-1] :][: run.rows] = state


def undo(cell: Cell, undoing: BackwardPass, run: Run, scratch: Workspace) -> None:
    """Undo the steps of a run: the trace's gates become dgh, `dstates` are read and written."""
    trace, H = undoing.trace, undoing.dstates[0].shape[1]
    empty = partial(_empty, scratch, run.rows)
    gates, saved = empty(cell.gates * H), empty(cell.saved * H)
    states, next_states, dstates = (
        tuple([empty(H) for _ in trace.states]) for _ in ("before", "after", "gradient")
    )
    for dstate, kept in zip(dstates, undoing.dstates, strict=True):
        dstate[...] = kept[: run.rows]
    work = tuple([empty(width * H) for width in cell.backward_scratch])
    here = Buffers(gates, saved, states, next_states, dstates, work)
    program = record(cell.backward, undoing.weights, here)

    parts = {"gates": (gates, trace.gates, run.gates), "saved": (saved, trace.saved, run.gates)}
    for k, name in enumerate(cell.state_names):
        parts[name] = (states[k], trace.states[k], run.before)
        parts[f"{name}'"] = (next_states[k], trace.states[k], run.after)
    given = [parts[name] for name in cell.backward_reads]
    left = [parts[name] for name in cell.backward_writes]
    if undoing.doutput is not None:
        doutput = empty(H)
        given.append((doutput, undoing.doutput, run.gates))
        program.insert(0, partial(np.add, dstates[0], doutput, dstates[0]))
    _repeat(program, len(run.times), given, left, run.rows)
    for dstate, kept in zip(dstates, undoing.dstates, strict=True):
        kept[: run.rows] = dstate


def _input_side(
    cell: Cell, weights: Weights, x: Array, gates: Array, empty: Callable[[int], Array]
) -> Program:
    """The calls that write gx to `gates`: `sequence.input_side` by column."""
    program: Program = calls(weights.weight_ih, x.T, gates.T)
    given = cell.input_bias(weights, gates.dtype)
    if given is not None:
        bias = empty(given.shape[0])
        bias[...] = given
        program.append(partial(np.add, gates, bias, gates))
    return program


def _repeat(
    program: Program,
    steps: int,
    given: Sequence[tuple[Array, Array, Sequence[int]]],
    left: Sequence[tuple[Array, Array, Sequence[int]]],
    rows: int,
) -> None:
    """Make the calls for each step, between copies of what is `given` and what is `left`.

    Each is an array of the step, packed rows, and where in these each step's block starts.
    """
    copies_in, copies_out = (
        [(array, _blocks(packed, at, rows)) for array, packed, at in arrays if array.size]
        for arrays in (given, left)
    )
    write: Any = setitem
    turns = [
        range(steps),
        *[map(write, repeat(array), repeat(...), blocks) for array, blocks in copies_in],
        *repeated(program),
        *[map(write, blocks, repeat(...), repeat(array)) for array, blocks in copies_out],
    ]
    for _ in zip(*turns, strict=False):
        pass  # all is done between the turns, without a step of Python's


def _blocks(packed: Array, starts: Sequence[int], rows: int) -> Iterable[Array]:
    """Blocks of packed rows one after the other, as views."""
    low, high = sorted([starts[0], starts[-1]])
    if high - low != rows * (len(starts) - 1):  # lengths differ: one stands apart
        return [packed[start : start + rows] for start in starts]
    even = packed[low : high + rows].reshape(len(starts), rows, packed.shape[1])
    blocks: Iterable[Array] = even if low == starts[0] else even[::-1]
    return blocks


def _empty(scratch: Workspace, rows: int, width: int) -> Any:
    """An uninitialised array (rows, width) with contiguous columns.

    Arrays a power of two apart would meet in the same places of the cache: one call took ten times
    as long. So each begins a little further on than the one before it.
    """
    size = width * rows
    return scratch.empty(size + APART)[:size].reshape(width, rows).T
