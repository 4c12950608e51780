"""The step loop of one layer, in plain array code: the reference of every other runner.

A forward pass is one input product for all steps, then the steps; a backward pass is the steps in
reverse order, then one product for each weight. `core/packing.py` describes the layout of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..backend import Array
from ..cells import Buffers, Cell, Weights
from ..core.cell import ScratchSizes
from ..core.packing import StepRun
from ..core.passes import Activations, BackwardPass, ForwardPass
from ..core.workspace import Workspace
from ..kernels.interface import CallContext, Pass, RunnerCosts, Sizes
from ..kernels.shared import (
    allocate,
    extra_arrays,
    input_projection,
    project,
    weight_gradients,
    write_results,
)


class StepLoop:
    """Runs one step after another, with any array module and any cell."""

    costs: RunnerCosts = RunnerCosts()

    def __init__(self, xp: Any, cell: Cell, compute_dtype: Any) -> None:
        self.xp: Any = xp
        self.cell: Cell = cell
        self.compute_dtype: Any = compute_dtype

    def groups(self, kind: Pass, sizes: Sizes, directions: int) -> list[range]:
        """Each direction separately."""
        return [range(d, d + 1) for d in range(directions)]

    def forward(self, passes: Sequence[ForwardPass], call: CallContext) -> list[Activations]:
        """Run directions of one layer; writes outputs and final states."""
        results = []
        for direction in passes:
            activations = allocate(self.cell, self.compute_dtype, direction, call)
            input_projection(self.xp, self.cell, direction, activations.gates)
            extra = extra_arrays(self.xp, self.cell, direction)
            for run in call.batch.walk(direction.reverse):
                copy_initial_states(direction, activations, run)
                self.run_steps(direction, activations, run, call, extra)
            write_results(direction, activations, call.batch)
            results.append(activations)
        return results

    def run_steps(
        self,
        direction: ForwardPass,
        activations: Activations,
        run: StepRun,
        call: CallContext,
        extra: tuple[Array, ...] = (),
    ) -> None:
        """Run steps on views of the packed rows."""
        xp, cell, rows, scratch = self.xp, self.cell, run.rows, call.scratch
        gates, saved, record = activations.gates, activations.saved, call.record
        mark = scratch.mark()
        work = self._step_scratch(scratch, rows, cell.scratch_sizes(self._width(direction), False))
        # views are reused by the next step: CuPy takes microseconds to create one
        after = _block(activations.states, run.before[0], rows)
        for start, next_start in zip(run.gates, run.after, strict=True):
            before, after = after, _block(activations.states, next_start, rows)
            first = start if record else 0
            saved_t = saved[first : first + rows]
            extra_t = _block(extra, start, rows) if extra else ()
            step = Buffers(gates[start : start + rows], saved_t, before, after, (), work, extra_t)
            cell.forward(xp, direction.weights, step)
        scratch.rewind(mark)

    def backward(self, passes: Sequence[BackwardPass], call: CallContext) -> None:
        """Run the backward pass of directions of one layer."""
        for each in passes:
            direction = self._with_room(each, call.scratch)
            extra = extra_arrays(self.xp, self.cell, direction)
            for run in call.batch.walk(direction.reverse, backward=True):
                self.run_backward_steps(direction, run, call, extra)
            weight_gradients(self.xp, self.xp, self.cell, direction, call.batch)

    def run_backward_steps(
        self,
        direction: BackwardPass,
        run: StepRun,
        call: CallContext,
        extra: tuple[Array, ...] = (),
    ) -> None:
        """Run the backward pass of steps; overwrites gates with dgh, and `dstates`."""
        xp, cell, rows, scratch = self.xp, self.cell, run.rows, call.scratch
        activations, doutput, norms = direction.activations, direction.doutput, direction.norms
        mark = scratch.mark()
        dstates = _block(direction.dstates, 0, rows)
        work = self._step_scratch(scratch, rows, cell.scratch_sizes(self._width(direction), True))
        before = _block(activations.states, run.after[0], rows)
        for t, start, previous in zip(run.times, run.gates, run.before, strict=True):
            after, before = before, _block(activations.states, previous, rows)
            if doutput is not None:
                dh = dstates[0]
                dh += doutput[start : start + rows]
            if norms is not None:
                norms[t] = sum((dstate * dstate).sum() for dstate in dstates) ** 0.5
            gates_t = activations.gates[start : start + rows]
            saved_t = activations.saved[start : start + rows]
            extra_t = _block(extra, start, rows) if extra else ()
            step = Buffers(gates_t, saved_t, before, after, dstates, work, extra_t)
            cell.backward(xp, direction.weights, step)
        scratch.rewind(mark)

    def _with_room(self, direction: BackwardPass, scratch: Workspace) -> BackwardPass:
        """A pass with columns for gradients in `saved`, which a cell that adds up has not saved."""
        saved, size = direction.activations.saved, self.cell.saved_size(self._width(direction))
        if saved.shape[1] >= size:
            return direction
        wide = scratch.empty(len(saved), size, dtype=saved.dtype)
        wide[:, : saved.shape[1]] = saved
        return direction._replace(activations=direction.activations._replace(saved=wide))

    def _width(self, direction: ForwardPass | BackwardPass) -> int:
        """H."""
        rows: int = direction.weights.weight_ih.shape[0]
        return rows // len(self.cell.gate_names)

    def _step_scratch(
        self, workspace: Workspace, rows: int, sizes: ScratchSizes
    ) -> tuple[Array, ...]:
        """A step's scratch arrays, contiguous and uninitialised."""
        numbers = tuple([workspace.empty(rows, width) for width in sizes.numbers])
        if len(sizes.numbers) == sum(map(len, sizes)):
            return numbers
        conditions = [workspace.empty(rows, width) for width in sizes.conditions]
        dtype = self.compute_dtype
        operands = [workspace.empty(rows, width, dtype=dtype) for width in sizes.operands]
        return (*numbers, *as_bools(conditions), *operands)


def layer_step(
    xp: Any, cell: Cell, weights: Weights, bias: Array | None, x: Array, step: Buffers
) -> None:
    """One step of one direction of one layer, from x (N, I).

    `bias` is the cell's `input_bias`, (G*H,) or repeated for each row; the buffers are `Cell`'s.
    """
    project(xp, weights, bias, x, step.gates)
    cell.forward(xp, weights, step)


def copy_initial_states(direction: ForwardPass, activations: Activations, run: StepRun) -> None:
    """Copy the initial states of the rows that begin at the first of these steps."""
    if run.rows > run.joined:
        begin = slice(run.joined, run.rows)
        for k, end in enumerate(direction.ends):  # `zip` takes longer
            activations.states[k][run.before[0] :][begin] = end[begin]


def _block(arrays: tuple[Array, ...], start: int, rows: int) -> tuple[Array, ...]:
    """The same rows of each array, as views."""
    # from a list, as in other files: tuple(generator) leaves an entry in CPython's free list at
    # each call, which looks like a leak
    return tuple([array[start : start + rows] for array in arrays])


def as_bools(arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Memory of arrays (N, width), whose rows or columns are contiguous, as bools."""
    result = []
    for array in arrays:
        rows = array if array.flags.c_contiguous else array.T
        bools = rows.reshape(-1).view(bool)[: array.size].reshape(rows.shape)
        result.append(bools if array.flags.c_contiguous else bools.T)
    return tuple(result)
