"""An estimate of the memory of a layer's training step."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from ..core import dropout
from ..core.spec import StackSpec
from ..kernels import ExecutionPlan
from ..kernels.shared import activation_shapes


class Footprint(NamedTuple):
    """Bytes at the peak, the end of `backward`, of a call in which every row runs T steps."""

    saved: int  # from the call to `backward`
    workspace: int  # other memory of the module
    results: int  # output and final states, dx and the gradients of the initial states

    def __str__(self) -> str:
        """The total and its parts."""
        return (
            f"{sum(self):,} bytes: {self.saved:,} saved for backward, {self.workspace:,} of "
            f"workspace, {self.results:,} of results and gradients"
        )


def training_step(
    spec: StackSpec,
    plan: ExecutionPlan,
    sizes: tuple[int, int],
    batch_first: bool,
    k: int | None,
) -> Footprint:
    """The footprint of a layer with `recompute=k` that has run such a step before.

    :param sizes: T and N.
    """
    steps, rows = sizes
    S, D, width = steps * rows, spec.num_directions, spec.num_directions * spec.output_size
    A, C = plan.precision.dtype.itemsize, plan.precision.compute_dtype.itemsize
    all_states = spec.num_layers * D * rows * sum(spec.state_sizes) * A

    saved = S * (spec.input_size + (spec.num_layers - 1) * width) * C
    work = _constant_part(spec, plan, rows, k is not None)
    if k is None:
        saved += spec.num_layers * sum(_activations(spec, plan, steps, rows))
    else:
        saved += -(-steps // k) * all_states
        work += max(_activations(spec, plan, min(k, steps), rows))
    inner = (D - 1) * width if spec.num_layers > 1 else 0  # the second direction's dx
    work += S * max(inner, (D - 1 + batch_first) * spec.input_size) * A
    if spec.cell.masks:
        drawn = min(k or steps, steps) * rows
        work += len(spec.cell.masks) * drawn * spec.hidden_size * A
        if not plan.forward.costs.packs_weights:  # compiled code draws them element by element
            work += dropout.drawing_bytes(drawn, spec.hidden_size)
    work += S * min(spec.num_layers, 2) * width * A  # doutput, and that of the layer below
    if spec.dropout and spec.num_layers > 1:
        work += dropout.workspace_bytes(S, width)
    return Footprint(saved, work, S * (width + spec.input_size) * A + 2 * all_states)


def _activations(spec: StackSpec, plan: ExecutionPlan, steps: int, rows: int) -> list[int]:
    """The bytes that `steps` recorded steps of each direction save."""
    saved = []
    for cell in spec.cells:
        cell = cell.adding_up() if plan.forward.costs.adds_up else cell
        low, others = activation_shapes(
            cell, cell.gates * spec.hidden_size, rows, steps * rows, True
        )
        read = sum(prod(shape) for shape in low) * plan.precision.compute_dtype.itemsize
        saved.append(read + sum(prod(s) for s in others) * plan.precision.dtype.itemsize)
    return saved


def _constant_part(spec: StackSpec, plan: ExecutionPlan, rows: int, recomputes: bool) -> int:
    """The bytes that do not grow with T, roughly: a step's arrays, packed weights, gradients.

    The gradients of a call have a buffer besides `grads`, and those of a segment another one.
    """
    cell, H, costs = spec.cell, spec.hidden_size, plan.forward.costs
    weights = sum(prod(shape) for shape in spec.shapes().values())
    largest = cell.gates * H * (spec.widest_input + H)
    step = 2 * cell.gates * H + cell.saved_size(H) + 3 * sum(spec.state_sizes)
    scratch = [sum(map(sum, plan.cell.scratch_sizes(H, backward))) for backward in (False, True)]
    step += max(*scratch, H * costs.step_scratch)
    elements = weights + recomputes * largest + rows * step
    if costs.packs_weights:
        elements += sum(prod(s) * (1 + ("weight" in n)) for n, s in spec.shapes().items())
    if recomputes:  # for a segment's forward pass
        elements += costs.input_rows * (spec.widest_input + cell.gates * H)
    kept = costs.bytes_per_direction * spec.num_layers * spec.num_directions
    return (elements + costs.scratch) * plan.precision.dtype.itemsize + kept
