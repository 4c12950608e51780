"""Layers of a stack in a wave, on the host's fibers, beside the plain loop layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from host_sequence import DTYPES, Tiling
from kernel_parts import needs_dtype
from sequence_cases import Case
from sequence_parts import Left, check_left, run_forwards

from xprnn.passes import Activations

# warps, chunks, held, tiles: all weights held, half of them in shared memory, more than are polled
# for at once, several tiles
TILINGS = ((4, 2, 2, 1), (4, 2, 1, 2), (2, 9, 0, 1), (2, 4, 4, 4))


def tiling_of(cell: str, work: str, kind: str, which: int = 0) -> Tiling:
    needs_dtype(DTYPES[kind])
    return Tiling(cell, work, kind, *TILINGS[which], wave=True)


def stack_of(
    cell: str, kind: str, H: int, lengths: tuple[int, ...], layers: int, **options: Any
) -> list[Case]:
    """Layers of different numbers; gx of the upper ones is what the product is added to."""
    return [Case(cell, kind, H, lengths, seed=11 + layer, **options) for layer in range(layers)]


def plain(cases: Sequence[Case]) -> list[Activations]:
    """The traces of the plain loop in float64, the lowest layer's first."""
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


def check_wave(cases: Sequence[Case], tiling: Tiling, **options: Any) -> None:
    """Fail unless the kernel ends and every layer agrees with the plain loop, within rounding."""
    found = run_forwards(cases, tiling, **options)
    for layer in range(len(cases)):
        check_layer(cases, layer, tiling, found[layer])


def check_layer(cases: Sequence[Case], layer: int, tiling: Tiling, left: Left) -> None:
    trace = plain(cases[: layer + 1])[-1]
    check_left(cases[layer], trace, tiling, left, f" of layer {layer}", layer + 1)
