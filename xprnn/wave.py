"""All layers of a stack in one launch: what `sequence.forward` does for one layer, in a wave."""

from __future__ import annotations

from .backend import Array
from .cells import Weights
from .directions import Activations, ForwardPass, PackedWeights
from .kernels import ExecutionPlan
from .kernels.wave import Layers, together
from .layout import PackedBatch
from .scratch import Workspace
from .sequence import begin, input_side


def forward(
    engine: ExecutionPlan,
    net: Layers,
    weights: list[list[Weights]],
    x: Array,
    ends: tuple[Array, ...],
    layout: PackedBatch,
    kept: Workspace,
    scratch: Workspace,
    record: bool,
) -> tuple[list[list[Activations]], Array] | None:
    """Run all steps of all layers: the traces and the output (S, H); None: they take turns.

    As `sequence.forward`; `ends` (L, N, H) each has the initial states, read, then = the final
    ones. gx of the upper layers is their bias: the launch multiplies what the layer below gives.
    """
    work, H = "training" if record else "forward", ends[0].shape[2]
    how = together(engine, work, layout.running, H, layout.steps, net)
    if isinstance(how, str):
        return None
    layers, traces = [], []
    for layer, (own,) in enumerate(weights):
        direction = ForwardPass(own, False, tuple([end[layer] for end in ends]), PackedWeights())
        trace = begin(engine, direction, x, layout, kept, record)
        bias = engine.cell.input_bias(own, engine.compute_dtype)
        if layer:
            trace.gates[...] = 0.0 if bias is None else bias
        else:
            input_side(engine.xp, own, bias, x, trace.gates)
        layers.append(direction)
        traces.append(trace)
        x = layout.outputs(trace.states[0], False)
    kernels, chosen = how
    kernels.forward(chosen, layers, traces, layout, scratch, record)
    for direction, trace in zip(layers, traces, strict=True):
        for state, end in zip(trace.states, direction.ends, strict=True):
            end[: layout.running] = layout.final(state, False)
    return [[trace] for trace in traces], x
