"""What `explain` says: who serves a call or a step of a stepper, why, and what a step costs."""

from __future__ import annotations

from collections.abc import Sequence

from .kernels import ExecutionPlan
from .kernels.family import LayerRunner
from .kernels.wave import Layers, together
from .network import StackSpec


def explain(
    kind: str,
    net: StackSpec,
    engine: ExecutionPlan,
    steps: int,
    batch: int,
    training: bool,
    memory: Sequence[str],
    segments: bool,
) -> str:
    """The text for a layer of class `kind` and a call with T steps and N rows.

    `memory` is what there is to be said of a training step's; `segments`: its steps are recomputed.
    """
    forward, backward = moved(net, engine, batch)
    lines = [
        f"{kind}({net.input_size}, {net.hidden_size}) on {engine.backend.name}, "
        f"{engine.arithmetic}, T={steps} N={batch}: {engine.implementation}",
        f"  reason: {engine.reason}",
        f"  a step moves at least {forward:,} bytes forward, {backward:,} backward",
        *(f"  {line}" for line in memory),
    ]
    launches = engine.cell.launches
    if engine.sequences is not None:
        lines += _sequences(net, engine.sequences, steps, batch, training)
        lines += _wave(net, engine, steps, batch, training, segments)
    elif engine.backend.on_gpu and launches is None:
        lines.append("  the launches of the plain code in narrow types are not counted")
    elif engine.backend.on_gpu and launches:
        there, back = launches
        lines.append(
            f"  a step takes {there} launches forward, {back} backward and one more "
            "where its output has a gradient"
        )
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in engine.missing)])


def _sequences(
    net: StackSpec, kernels: LayerRunner, steps: int, batch: int, training: bool
) -> list[str]:
    """What one launch or call takes, a line for each pass where that may differ."""
    takes = f"one {kernels.unit} takes all steps of a"
    alone = f"{takes} direction of a layer"
    if net.num_directions == 1:
        return [f"  {alone}"]
    lines = []
    for work in ("training", "backward") if training else ("forward",):
        sizes = work, max(batch, 1), net.hidden_size, max(steps, 1)
        reason = kernels.plan(*sizes, net.num_directions)
        if not isinstance(reason, str):
            lines.append(f"  {work}: {takes} layer, both directions")
        elif not isinstance(kernels.plan(*sizes, 1), str):
            lines.append(f"  {work}: {alone}; both: {reason}")
    return lines


def _wave(
    net: StackSpec, engine: ExecutionPlan, steps: int, batch: int, training: bool, segments: bool
) -> list[str]:
    """Whether one launch takes all layers, where there could be one."""
    if net.num_layers == 1 or engine.backend.kernels != "cuda":
        return []
    dropped = net.dropout if training else 0.0
    layers = Layers(net.num_layers, net.num_directions, dropped, training and segments)
    work = "training" if training else "forward"
    reason = together(engine, work, batch, net.hidden_size, steps, layers)
    takes = reason if isinstance(reason, str) else "one launch takes all steps of all layers"
    return [f"  {work}, layers in a wave: {takes}"]


def explain_step(kind: str, net: StackSpec, engine: ExecutionPlan, batch: int) -> str:
    """The text for a stepper of a layer of class `kind`, or for a cell that takes its steps."""
    lines = [
        f"{kind}({net.input_size}, {net.hidden_size}) on {engine.backend.name}, "
        f"{engine.arithmetic}, L={net.num_layers} N={batch}, one step: {engine.implementation}",
        f"  reason: {engine.reason}",
    ]
    more = f"{1 + len(net.cell.state_names)} more where streams wait"
    if engine.repeats:
        lines.append("  its array calls are recorded and repeated")
    elif engine.implementation == "sequence" and not engine.backend.on_gpu:
        lines.append("  one call takes a step of all layers, on weights packed for it")
    elif engine.implementation == "sequence":
        lines.append(f"  one launch takes a step of all layers, and {more}")
    elif engine.backend.kernels and engine.cell.launches is not None:
        each = 1 + net.bias + engine.cell.launches[0]
        lines.append(f"  a step takes {net.num_layers * each + 2} launches, and {more}")
    elif engine.backend.kernels:
        lines.append("  the launches of the plain code in narrow types are not counted")
    return "\n".join([*lines, *(f"  {name}: {why}" for name, why in engine.missing)])


def moved(net: StackSpec, engine: ExecutionPlan, batch: int) -> tuple[int, int]:
    """The bytes that one step of one direction has to read and write, forward and backward.

    W_hh once and every buffer of `Cell`'s table as often as a step needs it: gh and the gates
    are written and read, dgh is read once more by the product behind it.
    """
    cell, H = net.cell, net.hidden_size
    T, A = engine.compute_dtype.itemsize, engine.dtype.itemsize
    G, others = cell.gates, len(cell.state_names) - 1
    weights, states = G * H * H * T, T + others * A
    forward = 2 * G * A + (2 * G + cell.saved) * T + 2 * states
    backward = (3 * G + 2 * cell.saved) * T + states + 2 * (1 + others) * A
    return weights + batch * H * forward, weights + batch * H * backward
