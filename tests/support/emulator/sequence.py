"""Sequence kernels, from their CUDA source, compiled by g++ and run on the emulator.

See `host/emulator.h`. A library contains one kernel with one tiling, with the faults that a test
injects into its source.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.support.emulator.build import OUTCOMES, Faults, compiled, emulator_source
from xprnn.cells import CELLS
from xprnn.kernels.cuda import sequence
from xprnn.kernels.cuda.table import KERNELS, MAX_WAVEFRONT_LAYERS

SHARED_HEADER = 128  # SHARED_HEADER of products.h
K_BLOCK_ELEMENTS = {"BF16": 32, "F16": 32, "TF32": 16, "TF32X3": 16}  # of a k-block
DTYPES = {"BF16": "bfloat16", "F16": "float16", "TF32": "float32", "TF32X3": "float32"}
# v: by value, as CuPy passes a NumPy array; the emulator gets its address and copies it per thread
C = {"v": ctypes.c_void_p, "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}


class Tiling(NamedTuple):
    """A kernel, given by its cell and work, and the sizes that are compiled into it."""

    cell: str
    work: str  # "forward", "training" or "backward"
    kind: str  # BF16, F16, TF32 or TF32X3
    warps: int
    k_blocks: int
    in_registers: int
    row_tiles: int
    cluster: int = 1
    wave: bool = False  # whether it is a wavefront

    @property
    def file(self) -> str:
        return KERNELS[self.cell, self.work].file

    @property
    def name(self) -> str:
        numbers = self.warps, self.k_blocks, self.in_registers, self.row_tiles
        sizes = ", ".join([f"xprnn::{self.kind}", *map(str, numbers)])
        return "xprnn::" + KERNELS[self.cell, self.work].template.format(sizes)

    @property
    def parameters(self) -> str:
        """The kinds of the kernel's parameters, as in `C`."""
        return "vp" + "iiiiii" + "i" * (self.work == "backward") + "upu"

    @property
    def reduction(self) -> int:
        """The longest reduction that the tiling covers."""
        return self.warps * self.k_blocks * K_BLOCK_ELEMENTS[self.kind] // (1 + self.wave)

    def shared(self, passes: int) -> int:
        """Bytes of shared memory of a block."""
        cell, apart = CELLS[self.cell], self.warps * (self.k_blocks - self.in_registers)
        head = SHARED_HEADER + self.warps * self.stage
        if self.work == "backward":
            carried = 512 * len(cell.state_names) * self.row_tiles * passes
            return head + 1280 * self.warps * self.row_tiles + 1024 * apart + carried
        return head + cell.gates * (1280 * self.warps * self.row_tiles + 1024 * apart)

    @property
    def stage(self) -> int:
        """Bytes of shared memory of a warp for data received from its cluster."""
        if self.cluster == 1:
            return 0
        parts = -(-self.k_blocks // (8 * self.cluster))
        own = self.k_blocks // parts // self.cluster
        pieces = own * (1 if parts > 1 else min(self.row_tiles, 8 // own))
        return 16 + (self.cluster - 1) * pieces * 512

    def grid(self, H: int, rows: int, passes: int, slots: int = 1) -> tuple[int, int, int]:
        """Blocks by units, in complete clusters, by rows, and by directions or layers."""
        slices = -(-H // (16 * self.cluster)) * self.cluster
        return slices, -(-rows // (8 * self.row_tiles * passes)), slots


class Run(NamedTuple):
    """The order of the emulator's threads: a seed (0: in order), and resident blocks."""

    seed: int = 0
    resident: int = 0  # 0: all


def source_of(tiling: Tiling, faults: Faults = ()) -> str:
    """The source for g++; the text of each fault must occur exactly once."""
    text = emulator_source(sequence.parts(tiling.file), faults)
    types = {"v": "const Arg<0>*", "p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(tiling.parameters)])
    others = [f"static_cast<Arg<{i}>>(a{i})" for i in range(1, len(tiling.parameters))]
    passed = ", ".join(["*a0", *others])
    return f"""#define XP_CLUSTER {tiling.cluster}
#define XP_WAVEFRONT {int(tiling.wave)}
{text}
template <class F> struct Of;
template <class... P> struct Of<void (*)(P...)> {{ typedef std::tuple<P...> All; }};
constexpr auto kernel = {tiling.name};
typedef Of<std::remove_const_t<decltype(kernel)>>::All All;
template <int i> using Arg = std::tuple_element_t<i, All>;
extern "C" int bytes_by_value() {{ return sizeof(Arg<0>); }}
extern "C" int run({declared}, int x, int y, int z, int shared, unsigned seed, int resident) {{
  return emulator::launch({{x, y, z}}, {32 * tiling.warps}, shared, seed, resident,
                        [=] {{ kernel({passed}); }}, {tiling.cluster});
}}
"""


@cache
def library(tiling: Tiling, faults: Faults = ()) -> ctypes.CDLL:
    """The kernel as a loaded library with a function `run`.

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
    """Run a kernel on NumPy arrays and integers; returns one of `OUTCOMES`.

    The first argument is `GroupedArguments` of exchange.h, with host addresses.
    """
    loaded = library(tiling, faults)
    assert arguments[0].nbytes == loaded.bytes_by_value()
    values = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(tiling.parameters, arguments, strict=True)
    ]
    shape = (*grid, tiling.shared(passes), run.seed, run.resident)
    return OUTCOMES[loaded.run(*values, *shape)]


def grouped_arguments(tiling: Tiling, every: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`GroupedArguments` of exchange.h for the arrays of directions or layers."""
    names = KERNELS[tiling.cell, tiling.work].arrays
    table = np.zeros((MAX_WAVEFRONT_LAYERS if tiling.wave else 2, len(names)), np.uint64)
    for d, arrays in enumerate(every):
        for k, name in enumerate(names):
            table[d, k] = 0 if arrays[name] is None else arrays[name].ctypes.data
    return table
