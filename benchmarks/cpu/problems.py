"""Which calls the CPU report times, in which libraries, on how many threads."""

from __future__ import annotations

import os
from typing import NamedTuple

WORKS = FORWARD, BOTH, STEP = "forward", "forward+backward", "step"
CELLS = ("gru", "lstm", "rnn_tanh")
SHAPES = (  # T, N, I, H
    *((128, 1, 32, 32), (128, 1, 128, 128), (128, 1, 512, 512), (128, 8, 64, 64)),
    *((128, 32, 64, 128), (64, 32, 256, 256), (64, 64, 256, 512), (32, 128, 512, 1024)),
)
STEP_SHAPE = (1, 1, 128, 128)
# "products" is a lower bound: the layer's matrix products alone, computed by NumPy's BLAS
IMPLEMENTATIONS = ("numpy", "numba", "torch", "onnxruntime", "jax", "products")
NEEDS = {"numba": "numba", "torch": "torch", "onnxruntime": "onnxruntime", "jax": "jax"}


class Problem(NamedTuple):
    """One layer in float32, T steps of N rows from I inputs to H units."""

    cell: str  # a name of xprnn's table of cells
    T: int
    N: int
    I: int  # noqa: E741
    H: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The sizes in the order of the tables' columns."""
        return self.T, self.N, self.I, self.H

    def __str__(self) -> str:
        return f"{self.cell} T={self.T} N={self.N} I={self.I} H={self.H}"


def all_threads() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(implementation: str, threads: int) -> dict[str, str]:
    """Environment variables of a worker that runs one implementation on `threads` threads."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("XPRNN_")}
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        variables[f"{library}_NUM_THREADS"] = str(threads)
    variables["XPRNN_BACKEND"] = "numpy"
    if implementation == "numpy":
        variables["XPRNN_KERNELS"] = "reference"
    if implementation == "jax":
        variables["JAX_PLATFORMS"] = "cpu"
        single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        variables["XLA_FLAGS"] = single if threads == 1 else ""
    return variables
