"""The calls that are qualified: cells, types, passes and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from ...kernels.qualification import PASSES, Shape


class Case(NamedTuple):
    """One kind of call at one shape, with I = H."""

    cell: str
    dtype: str  # a name of `verification.suite.PRECISIONS`
    kind: str  # one of `qualification.PASSES`
    shape: Shape


class Grid(NamedTuple):
    """The sizes of the calls; a step has T = 1, and other passes need two T: `qualification`."""

    dtypes: tuple[str, ...]  # those that do not apply to a backend are omitted
    N: tuple[int, ...]
    H: tuple[int, ...]
    T: tuple[int, ...]

    def cases(self, cells: Sequence[str], dtype: str) -> Iterator[Case]:
        """All calls in one type, those of a cell one after the other."""
        for cell, N, H, kind in product(cells, self.N, self.H, PASSES):
            for T in (1,) if kind == "step" else self.T:
                yield Case(cell, dtype, kind, Shape(N, H, T))


# In the order in which they are measured until the time is over: those in most use first
CELLS = ("gru", "lstm", "rnn_tanh", "gru_reset_before", "rnn_relu")
FLOATS, LOW = ("float32", "float64"), ("bfloat16", "float16", "tf32")
CPU = (
    Grid(FLOATS, (1, 8, 64), (64, 256), (2, 32)),
    Grid(("float32",), (1, 8, 64), (512,), (2, 32)),
)
CPU_QUICK = (Grid(("float32",), (1, 32), (64, 256), (2, 16)),)
GPU = (
    Grid(("float32", *LOW), (1, 16, 128), (128, 512), (2, 64)),
    Grid(("float32", *LOW), (1, 16, 128), (1024,), (2, 64)),
    Grid(("float64",), (1, 128), (128, 512), (2, 64)),
)
GPU_QUICK = (Grid(("float32", *LOW), (1, 128), (128, 512), (2, 64)),)
