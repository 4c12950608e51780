"""Kernels that run a whole sequence, their own source compiled by g++ and run on fibers.

`host/fibers.h` says how. A library has one kernel with one tiling, and with the fault that
a test plants in its source.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.support.emulator.build import OUTCOMES, Faults, behind_fibers, compiled
from xprnn.cells import CELLS
from xprnn.kernels.cuda import sequence
from xprnn.kernels.cuda.table import KERNELS, LAYERS

HEAD = 128  # HEAD of products.h
ITEMS = {"BF16": 32, "F16": 32, "TF32": 16, "TF32X3": 16}  # of a piece
DTYPES = {"BF16": "bfloat16", "F16": "float16", "TF32": "float32", "TF32X3": "float32"}
# v: by value, as CuPy passes a NumPy array; here by its address, and copied in front of each thread
C = {"v": ctypes.c_void_p, "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}


class Tiling(NamedTuple):
    """A kernel, by its cell and work, and the sizes that are compiled into it."""

    cell: str
    work: str  # "forward", "training" or "backward"
    kind: str  # BF16, F16, TF32 or TF32X3
    warps: int
    chunks: int
    held: int
    tiles: int
    cluster: int = 1
    wave: bool = False  # of layers

    @property
    def file(self) -> str:
        return KERNELS[self.cell, self.work].file

    @property
    def name(self) -> str:
        sizes = f"xprnn::{self.kind}, {self.warps}, {self.chunks}, {self.held}, {self.tiles}"
        return "xprnn::" + KERNELS[self.cell, self.work].template.format(sizes)

    @property
    def parameters(self) -> str:
        """The arrays of all directions, by value, then pointers, integers and unsigned ones."""
        return "vp" + "iiiiii" + "i" * (self.work == "backward") + "upu"

    @property
    def reduction(self) -> int:
        """The longest reduction that it takes."""
        return self.warps * self.chunks * ITEMS[self.kind] // (1 + self.wave)

    def shared(self, passes: int) -> int:
        """Bytes of shared memory, as the interface gives them."""
        cell, apart = CELLS[self.cell], self.warps * (self.chunks - self.held)
        head = HEAD + self.warps * self.stage
        if self.work == "backward":
            carried = 512 * len(cell.state_names) * self.tiles * passes
            return head + 1280 * self.warps * self.tiles + 1024 * apart + carried
        return head + cell.gates * (1280 * self.warps * self.tiles + 1024 * apart)

    @property
    def stage(self) -> int:
        """Bytes of shared memory in which a warp gets what the rest of the cluster polls for."""
        if self.cluster == 1:
            return 0
        parts = -(-self.chunks // (8 * self.cluster))
        own = self.chunks // parts // self.cluster
        pieces = own * (1 if parts > 1 else min(self.tiles, 8 // own))
        return 16 + (self.cluster - 1) * pieces * 512

    def grid(self, H: int, rows: int, passes: int, beside: int = 1) -> tuple[int, int, int]:
        """Blocks by units, in whole clusters, by rows, and by directions or layers."""
        slices = -(-H // (16 * self.cluster)) * self.cluster
        return slices, -(-rows // (8 * self.tiles * passes)), beside


class Run(NamedTuple):
    """How the fibers take their turns: by which seed (0: in order), how many blocks at once."""

    seed: int = 0
    resident: int = 0  # 0: all


def source_of(tiling: Tiling, faults: Faults = ()) -> str:
    """The source for g++; each fault must fit in exactly one place."""
    text = behind_fibers(sequence.parts(tiling.file), faults)
    types = {"v": "const Arg<0>*", "p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(tiling.parameters)])
    others = [f"static_cast<Arg<{i}>>(a{i})" for i in range(1, len(tiling.parameters))]
    passed = ", ".join(["*a0", *others])
    return f"""#define XP_CLUSTER {tiling.cluster}
#define XP_WAVE {int(tiling.wave)}
{text}
template <class F> struct Of;
template <class... P> struct Of<void (*)(P...)> {{ typedef std::tuple<P...> All; }};
constexpr auto kernel = {tiling.name};
typedef Of<std::remove_const_t<decltype(kernel)>>::All All;
template <int i> using Arg = std::tuple_element_t<i, All>;
extern "C" int bytes_by_value() {{ return sizeof(Arg<0>); }}
extern "C" int run({declared}, int x, int y, int z, int shared, unsigned seed, int resident) {{
  return fibers::launch({{x, y, z}}, {32 * tiling.warps}, shared, seed, resident,
                        [=] {{ kernel({passed}); }}, {tiling.cluster});
}}
"""


@cache
def library(tiling: Tiling, faults: Faults = ()) -> ctypes.CDLL:
    """The kernel as a loaded library, with one function `run`.

    :raises RuntimeError: g++ is missing, or does not accept the source.
    """
    return compiled(tiling.name, source_of(tiling, faults))


def launch(
    tiling: Tiling,
    arguments: list[Any],
    grid: tuple[int, int, int],
    passes: int,
    run: Run,
    faults: Faults = (),
) -> str:
    """Run a kernel on NumPy arrays and integers; what became of it, one of `OUTCOMES`.

    The first argument is `Beside` of exchange.h, with addresses of the host.
    """
    loaded = library(tiling, faults)
    assert arguments[0].nbytes == loaded.bytes_by_value()
    given = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(tiling.parameters, arguments, strict=True)
    ]
    shape = (*grid, tiling.shared(passes), run.seed, run.resident)
    return OUTCOMES[loaded.run(*given, *shape)]


def beside(tiling: Tiling, every: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`Beside` of exchange.h for those arrays of directions or layers that a kernel takes."""
    names = KERNELS[tiling.cell, tiling.work].arrays
    table = np.zeros((LAYERS if tiling.wave else 2, len(names)), np.uint64)
    for d, arrays in enumerate(every):
        for k, name in enumerate(names):
            table[d, k] = 0 if arrays[name] is None else arrays[name].ctypes.data
    return table
