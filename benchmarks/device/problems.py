"""The calls that the device report compares with torch's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

FORWARD, BOTH = PASSES = ("forward", "forward+backward")
CELLS = ("gru", "lstm", "rnn_tanh")
DTYPES = ("float32", "tf32", "bfloat16", "float16")
GRID = (  # N, H, T
    *((1, 256, 512), (8, 512, 512), (32, 512, 512), (64, 1024, 256), (256, 1024, 128)),
    *((1, 1024, 1024), (16, 768, 1024)),
)
# Target: side by side 1 / 1.6 of the sequential time, which is twice the row of one direction
BOTH_DTYPES = ("float32", "bfloat16")
BOTH_GRID = ((1, 256, 512), (32, 512, 512), (1, 1024, 1024))
STEP = "step"
# without tf32: the launch for all layers computes in float32 then too
STEP_DTYPES = ("float32", "bfloat16", "float16")
STEP_GRID = ((1, 512), (8, 512))  # N, H
# Stacks forward: those for which the planner expects the wavefront to be faster
STACK_CELLS = ("gru", "lstm")
STACK_DTYPES = ("float32", "bfloat16")
STACK_GRID = GRID[:3]
STACK_LAYERS = (2, 3, 4)


class Problem(NamedTuple):
    """One layer, T steps of N rows from I = H inputs to H units."""

    cell: str  # a name of xprnn's table of cells
    dtype: str  # of the products' operands
    N: int
    H: int
    T: int
    directions: int = 1  # D

    layers = 1
    passes = PASSES

    @property
    def direction(self) -> str:
        """The value of a row's field."""
        return "both" if self.directions == 2 else "forward"

    def __str__(self) -> str:
        both = " both directions" * (self.directions == 2)
        return f"{self.cell} {self.dtype} N={self.N} H={self.H} T={self.T}{both}"


class StepProblem(NamedTuple):
    """One step of N streams through a stack from I = H inputs to H units."""

    cell: str
    dtype: str
    N: int
    H: int
    layers: int = 3
    T = 1
    directions = 1
    direction = "forward"
    passes = (STEP,)

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} N={self.N} H={self.H}, a step of {self.layers} layers"


class StackProblem(NamedTuple):
    """T steps of N rows through a stack from I = H inputs to H units, forward."""

    cell: str
    dtype: str
    N: int
    H: int
    T: int
    layers: int  # L
    directions = 1
    direction = "forward"
    passes = (FORWARD,)

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} N={self.N} H={self.H} T={self.T}, {self.layers} layers"


AnyProblem = Problem | StepProblem | StackProblem


def stack_problems(cells: Sequence[str], dtypes: Sequence[str]) -> list[StackProblem]:
    """All stacks of these cells and dtypes."""
    kinds = product(cells, dtypes, STACK_GRID, STACK_LAYERS)
    return [
        StackProblem(cell, dtype, *size, layers)
        for cell, dtype, size, layers in kinds
        if cell in STACK_CELLS and dtype in STACK_DTYPES
    ]


def step_problems(cells: Sequence[str], dtypes: Sequence[str]) -> list[StepProblem]:
    """All steps of these cells and dtypes."""
    dtypes = [dtype for dtype in dtypes if dtype in STEP_DTYPES]
    return [StepProblem(c, dtype, *size) for c in cells for dtype in dtypes for size in STEP_GRID]


def problems(
    cells: Sequence[str] = CELLS,
    dtypes: Sequence[str] = DTYPES,
    grid: Sequence[tuple[int, int, int]] = GRID,
) -> list[Problem]:
    """All layers, the most important cells first, then those with both directions."""
    single = [Problem(cell, dtype, *size) for cell in cells for dtype in dtypes for size in grid]
    return single + [
        problem._replace(directions=2)
        for problem in single
        if problem.dtype in BOTH_DTYPES and problem[2:5] in BOTH_GRID
    ]


def everything(
    cells: Sequence[str] = CELLS,
    dtypes: Sequence[str] = DTYPES,
    grid: Sequence[tuple[int, int, int]] = GRID,
) -> list[AnyProblem]:
    """All calls of the report in its order, the least important last."""
    layers, stacks = problems(cells, dtypes, grid), stack_problems(cells, dtypes)
    return [*layers, *step_problems(cells, dtypes), *stacks]
