"""Layers of a stack in a wavefront on the emulator, compared with the reference layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.support.emulated_sequences import LaunchResult, check_result, run_forwards
from tests.support.emulator.sequence import DTYPES, Tiling
from tests.support.pointwise_cases import needs_dtype
from tests.support.sequence_cases import Case
from xprnn.core.passes import Activations

# warps, k-blocks, of these in registers, row tiles: all weights in registers, half of them in
# shared memory, more k-blocks than are polled at once, several tiles
TILINGS = ((4, 2, 2, 1), (4, 2, 1, 2), (2, 9, 0, 1), (2, 4, 4, 4))


def tiling_of(cell: str, work: str, kind: str, which: int = 0) -> Tiling:
    needs_dtype(DTYPES[kind])
    return Tiling(cell, work, kind, *TILINGS[which], wave=True)


def stack_of(
    cell: str, kind: str, H: int, lengths: tuple[int, ...], layers: int, **options: Any
) -> list[Case]:
    """Layers of different values; the upper ones add the product with the layer below to gx."""
    return [Case(cell, kind, H, lengths, seed=11 + layer, **options) for layer in range(layers)]


def plain(cases: Sequence[Case]) -> list[Activations]:
    """The activations of the reference in float64, lowest layer first."""
    traces: list[Activations] = []
    for case in cases:
        gx = case.wide("gx")
        if traces:
            output = case.layout.outputs(traces[-1].states[0], False)
            with np.errstate(all="ignore"):
                gx = gx + output @ case.wide("weight_ih").T
        full = replace(case, numbers={})
        full.numbers.update(case.numbers, gx=gx)
        traces.append(full.plain())
    return traces


def check_wavefront(cases: Sequence[Case], tiling: Tiling, **options: Any) -> None:
    """Fail unless the kernel ends and every layer agrees with the reference, within rounding."""
    results = run_forwards(cases, tiling, **options)
    for layer in range(len(cases)):
        check_layer(cases, layer, tiling, results[layer])


def check_layer(cases: Sequence[Case], layer: int, tiling: Tiling, result: LaunchResult) -> None:
    trace = plain(cases[: layer + 1])[-1]
    check_result(cases[layer], trace, tiling, result, f" of layer {layer}", layer + 1)
