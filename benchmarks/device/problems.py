"""Which calls the device report holds beside torch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FORWARD, BOTH = PASSES = ("forward", "forward+backward")
CELLS = ("gru", "lstm", "rnn_tanh")
DTYPES = ("float32", "tf32", "bfloat16", "float16")
GRID = (  # N, H, T
    *((1, 256, 512), (8, 512, 512), (32, 512, 512), (64, 1024, 256), (256, 1024, 128)),
    *((1, 1024, 1024), (16, 768, 1024)),
)


class Problem(NamedTuple):
    """One direction of one layer, T steps of N rows from I = H inputs to H units."""

    cell: str  # a name of xprnn's table of cells
    dtype: str  # what products read
    N: int
    H: int
    T: int

    def __str__(self) -> str:
        return f"{self.cell} {self.dtype} N={self.N} H={self.H} T={self.T}"


def problems(
    cells: Sequence[str] = CELLS,
    dtypes: Sequence[str] = DTYPES,
    grid: Sequence[tuple[int, int, int]] = GRID,
) -> list[Problem]:
    """All of them, the cells first that matter most."""
    return [Problem(cell, dtype, *size) for cell in cells for dtype in dtypes for size in grid]
