"""Layers of a stack in a wave: whether one launch takes all of them, or why it does not.

In a wave a layer takes a step as soon as the one below has. No GPU has run one: it has to be asked
for by `XPRNN_KERNELS=wave`, which for everything else means `sequence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from . import ENVIRONMENT_VARIABLE, WAVE, ExecutionPlan, KernelUnavailableError, asked

if TYPE_CHECKING:
    from .cuda.plan import Plan
    from .cuda.sequence import SequenceKernels

UNASKED = f"not yet run on a GPU; {ENVIRONMENT_VARIABLE}={WAVE} forces it"


class Layers(NamedTuple):
    """What of a stack decides whether it goes in a wave."""

    layers: int  # L
    directions: int  # D
    dropout: float  # between layers, in this call
    segments: bool  # whether its steps are to be recomputed


def together(
    engine: ExecutionPlan, work: str, N: int, H: int, T: int, net: Layers
) -> tuple[SequenceKernels, Plan] | str:
    """Who takes all layers of a call in one launch, and how, or why they take turns.

    :param work: "forward" or "training" (forward, recorded); layers are undone one by one.
    :raises KernelUnavailableError: a wave is forced, and cannot be had.
    """
    if net.layers == 1:
        return "there is one layer"
    found, forced = _fitted(engine, work, N, H, T, net), asked() == WAVE
    if isinstance(found, str) and forced:
        raise KernelUnavailableError(f"{ENVIRONMENT_VARIABLE}={WAVE}: {found}")
    if not isinstance(found, str) and not forced:
        return UNASKED
    return found if N and T else "there is nothing to launch"


def _fitted(
    engine: ExecutionPlan, work: str, N: int, H: int, T: int, net: Layers
) -> tuple[SequenceKernels, Plan] | str:
    """The kernels and the launch, whoever asks, or the reason why there is none."""
    if engine.backend.kernels != "cuda":
        return f"no kernel for it on backend '{engine.backend.name}' in this version"
    from .cuda.sequence import SequenceKernels

    if not isinstance(engine.sequences, SequenceKernels):
        return "sequence kernels do not serve"
    if net.directions > 1:
        return "a layer above would wait for the end of a reverse direction"
    if net.dropout:
        return f"dropout={net.dropout} acts between layers"
    if net.segments:
        return "segments of a layer that are to be recomputed take turns"
    chosen = engine.sequences.wave(work, max(N, 1), H, max(T, 1), net.layers)
    return chosen if isinstance(chosen, str) else (engine.sequences, chosen)
