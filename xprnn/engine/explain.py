"""The texts of `explain`: which implementation runs a call or a step, why, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..core.spec import StackSpec
from ..kernels import ExecutionPlan, Pass, StepPlan, Unsupported
from ..kernels.interface import KernelRunner, Sizes


def explain(
    kind: str,
    spec: StackSpec,
    plan: ExecutionPlan,
    sizes: tuple[int, int],
    training: bool,
    memory: Sequence[str],
) -> str:
    """The text for a layer of class `kind`.

    :param sizes: T and N of the call.
    :param memory: lines about the memory of a training step.
    """
    steps, batch = sizes
    forward, backward = moved(spec, plan, batch)
    lines = [
        f"{kind}({spec.input_size}, {spec.hidden_size}) on {plan.backend.name}, "
        f"{plan.precision}, T={steps} N={batch}: {plan.implementation}",
        f"  reason: {plan.reason}",
        f"  a step moves at least {forward:,} bytes forward, {backward:,} backward",
        *(f"  {line}" for line in (*memory, *_notes(spec))),
    ]
    launches = plan.cell.kernel_launches
    if plan.kernels is not None:
        lines += _fused(spec, plan.kernels, sizes, training)
        lines += _wavefront(spec, plan, training)
    elif plan.backend.on_gpu and launches:
        lines.append(
            f"  a step takes {launches[0]} launches forward, {launches[1]} backward and one more "
            "where its output has a gradient"
        )
    elif plan.backend.on_gpu and plan.is_mixed:
        lines.append("  the launches of the plain code in low precision are not counted")
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in plan.missing)])


def _notes(spec: StackSpec) -> list[str]:
    """Those of the cell, or of each direction's."""
    if spec.reverse_cell is None:
        return [*spec.cell.notes]
    return [
        f"{name}, {note}"
        for name, cell in zip(("forward", "reverse"), spec.cells, strict=True)
        for note in cell.notes
    ]


def _fused(
    spec: StackSpec, runner: KernelRunner, sizes: tuple[int, int], training: bool
) -> list[str]:
    """What one launch or call runs: a line, or one for each pass where they may differ."""
    subject = f"one {runner.unit} runs all steps of a"
    one_direction = f"{subject} direction of a layer"
    if spec.num_directions == 1:
        return [f"  {one_direction}"]
    T, N = sizes
    nonempty = Sizes(max(N, 1), spec.widest_input, spec.hidden_size, max(T, 1))
    lines = []
    for kind in (Pass.TRAINING, Pass.BACKWARD) if training else (Pass.FORWARD,):
        why_not = runner.unsupported(kind, nonempty, spec.num_directions)
        if why_not is None:
            lines.append(f"  {kind}: {subject} layer, both directions")
        elif runner.unsupported(kind, nonempty, 1) is None:
            lines.append(f"  {kind}: {one_direction}; both: {why_not}")
    return lines


def _wavefront(spec: StackSpec, plan: ExecutionPlan, training: bool) -> list[str]:
    """Whether one launch runs all layers, or why not; empty where none could."""
    if spec.num_layers == 1 or plan.backend.kernels != "cuda":
        return []
    text = "one launch runs all steps of all layers"
    if isinstance(plan.wavefront, Unsupported):
        text = plan.wavefront.reason
    return [f"  {Pass.TRAINING if training else Pass.FORWARD}, layers in a wavefront: {text}"]


def explain_step(kind: str, spec: StackSpec, plan: StepPlan, batch: int) -> str:
    """The text for a step of a layer or cell of class `kind`."""
    lines = [
        f"{kind}({spec.input_size}, {spec.hidden_size}) on {plan.backend.name}, "
        f"{plan.precision}, L={spec.num_layers} N={batch}, one step: {plan.implementation}",
        f"  reason: {plan.reason}",
    ]
    more = f"{1 + len(spec.cell.state_names)} more where streams wait"
    if plan.replays:
        lines.append("  its array calls are captured and replayed")
    elif plan.is_fused and not plan.backend.on_gpu:
        lines.append("  one call runs a step of all layers, on weights packed for it")
    elif plan.is_fused:
        lines.append(f"  one launch runs a step of all layers, and {more}")
    elif plan.backend.kernels and plan.cell.kernel_launches is not None:
        each = 1 + spec.bias + plan.cell.kernel_launches[0]
        lines.append(f"  a step takes {spec.num_layers * each + 2} launches, and {more}")
    elif plan.is_mixed:
        lines.append("  the launches of the plain code in low precision are not counted")
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in plan.missing)])


def moved(spec: StackSpec, plan: StepPlan, batch: int) -> tuple[int, int]:
    """The bytes that one step of one direction must read and write, forward and backward.

    W_hh counts once, and each buffer of `Cell`'s table as often as it is accessed: gh and the gates
    are written and read, dgh is read once more by the product that follows.
    """
    cell, H = spec.cell, spec.hidden_size
    C, A = plan.precision.compute_dtype.itemsize, plan.precision.dtype.itemsize
    shapes = cell.weight_shapes(spec.input_size, H, False)
    weights = C * sum(prod(s) for name, s in shapes.items() if name != "weight_ih" and len(s) == 2)
    gates, saved, (h, *others) = cell.gates * H, cell.saved_size(H), spec.state_sizes
    states = h * C + sum(others) * A
    forward = 2 * gates * A + (2 * gates + saved) * C + 2 * states
    backward = (3 * gates + 2 * saved) * C + states + 2 * (h + sum(others)) * A
    return weights + batch * forward, weights + batch * backward
