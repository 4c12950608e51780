"""Kernels that run a whole sequence, their own source compiled by g++ and run on fibers.

`tests/host/fibers.h` says how. A library has one kernel with one tiling, and with the fault that
a test plants in its source; it is compiled once, for all processes and runs, and kept by content.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host_kernels import COMPILER
from host_kernels import FLAGS as COMMON

from xprnn.cells import CELLS
from xprnn.kernels.cuda import sequence
from xprnn.kernels.cuda.table import KERNELS

HOST = Path(__file__).parent / "host"
CUDA = Path(sequence.__file__).parent
OUTCOMES = (  # as `Outcome` of fibers.h
    *("fine", "deadlock", "shared memory overrun", "diverged warp", "unaligned vector"),
    *("sent to a block that has ended", "barrier misused", "cluster not whole"),
)
# _FORTIFY_SOURCE would refuse to change stacks. Most of the time goes into compiling, and with -O1
# that takes two thirds of what it takes with -O2
WARNINGS = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized")
FLAGS = (*COMMON, "-O1", *WARNINGS, "-U_FORTIFY_SOURCE")
HEAD = 128  # HEAD of products.h
ITEMS = {"BF16": 32, "F16": 32, "TF32": 16, "TF32X3": 16}  # of a piece
DTYPES = {"BF16": "bfloat16", "F16": "float16", "TF32": "float32", "TF32X3": "float32"}
# v: by value, as CuPy passes a NumPy array; here by its address, and copied in front of each thread
C = {"v": ctypes.c_void_p, "p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}
Faults = tuple[tuple[str, str], ...]  # what stands once in the source, and what in its place


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

    @property
    def file(self) -> str:
        return KERNELS[self.cell, self.work].file

    @property
    def name(self) -> str:
        sizes = f"xprnn::{self.kind}, {self.warps}, {self.chunks}, {self.held}, {self.tiles}"
        return "xprnn::" + KERNELS[self.cell, self.work].template.format(sizes)

    @property
    def parameters(self) -> str:
        """The arrays of both directions, by value, then pointers, integers and unsigned ones."""
        return "vp" + "iiiiii" + "i" * (self.work == "backward") + "upu"

    @property
    def reduction(self) -> int:
        """The longest reduction that it takes."""
        return self.warps * self.chunks * ITEMS[self.kind]

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

    def grid(self, H: int, rows: int, passes: int, directions: int = 1) -> tuple[int, int, int]:
        """Blocks by units, in whole clusters, and by rows and directions."""
        slices = -(-H // (16 * self.cluster)) * self.cluster
        return slices, -(-rows // (8 * self.tiles * passes)), directions


class Run(NamedTuple):
    """How the fibers take their turns: by which seed (0: in order), how many blocks at once."""

    seed: int = 0
    resident: int = 0  # 0: all


def source_of(tiling: Tiling, faults: Faults = ()) -> str:
    """The source for g++; each fault must fit in exactly one place."""
    stand_ins = {"device.h": HOST / "warps.h"}
    paths = [stand_ins.get(name, CUDA / name) for name in sequence.parts(tiling.file)]
    paths = [HOST / "fibers.h", HOST / "clusters.h", HOST / "device.h", *paths]
    text = "\n".join([path.read_text("utf-8") for path in paths])
    text = f"#define XP_CLUSTER {tiling.cluster}\n{text}"
    for old, new in faults:
        if text.count(old) != 1:
            raise ValueError(f"the source has this {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    types = {"v": "const Arg<0>*", "p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(tiling.parameters)])
    others = [f"static_cast<Arg<{i}>>(a{i})" for i in range(1, len(tiling.parameters))]
    passed = ", ".join(["*a0", *others])
    return f"""{text}
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
    if COMPILER is None:
        raise RuntimeError("there is no g++ here to compile the kernels for the host with")
    source = source_of(tiling, faults)
    key = hashlib.sha256(repr((COMPILER, FLAGS, source)).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"xprnn-host-sequences-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}.so"
    if not target.exists():
        mine = folder / f"{key}-{os.getpid()}.so"
        command = (COMPILER, *FLAGS, "-x", "c++", "-", "-o", str(mine))
        outcome = subprocess.run(command, input=source, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(f"g++ refuses {tiling.name}:\n{outcome.stderr[:4000]}")
        mine.replace(target)  # whole or not at all, whoever else compiles it now
    return ctypes.CDLL(str(target))


def launch(
    tiling: Tiling,
    arguments: list[Any],
    grid: tuple[int, int, int],
    passes: int,
    run: Run,
    faults: Faults = (),
) -> str:
    """Run a kernel on NumPy arrays and integers; what became of it, one of `OUTCOMES`.

    The first argument is `Both` of exchange.h, with addresses of the host.
    """
    compiled = library(tiling, faults)
    assert arguments[0].nbytes == compiled.bytes_by_value()
    given = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(tiling.parameters, arguments, strict=True)
    ]
    shape = (*grid, tiling.shared(passes), run.seed, run.resident)
    return OUTCOMES[compiled.run(*given, *shape)]


def both(tiling: Tiling, every: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`Both` of exchange.h for those arrays of one direction or two that a kernel takes."""
    names = KERNELS[tiling.cell, tiling.work].arrays
    table = np.zeros((2, len(names)), np.uint64)
    for d, arrays in enumerate(every):
        for k, name in enumerate(names):
            table[d, k] = 0 if arrays[name] is None else arrays[name].ctypes.data
    return table
