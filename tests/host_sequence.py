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
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host_kernels import COMPILER
from host_kernels import FLAGS as COMMON

from xprnn.kernels.cuda import sequence

HOST = Path(__file__).parent / "host"
CUDA = Path(sequence.__file__).parent
OUTCOMES = ("fine", "deadlock", "shared memory overrun", "diverged warp", "unaligned vector")
# _FORTIFY_SOURCE would refuse to change stacks
FLAGS = (*COMMON, "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-U_FORTIFY_SOURCE")
HEAD = 128  # HEAD of products.h
ITEMS = {"BF16": 32, "F16": 32, "TF32": 16, "TF32X3": 16}  # of a piece
DTYPES = {"BF16": "bfloat16", "F16": "float16", "TF32": "float32", "TF32X3": "float32"}
ARGUMENTS = {
    "gru_forward": "p p p p p p p i i i i i i u p u",
    "gru_backward": "p p p p p p p p i i i i i i i u p u",
}
C = {"p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}
Faults = tuple[tuple[str, str], ...]  # what stands once in the source, and what in its place


class Tiling(NamedTuple):
    """The sizes that are compiled into a kernel."""

    kind: str  # BF16, F16, TF32 or TF32X3
    warps: int
    chunks: int
    held: int
    tiles: int
    record: bool | None = None  # None: backward

    @property
    def kernel(self) -> str:
        return "gru_backward" if self.record is None else "gru_forward"

    @property
    def name(self) -> str:
        sizes = f"{self.kind}, {self.warps}, {self.chunks}, {self.held}, {self.tiles}"
        record = "" if self.record is None else f", {str(self.record).lower()}"
        return f"{self.kernel}<{sizes}{record}>"

    @property
    def reduction(self) -> int:
        """The longest reduction that it takes."""
        return self.warps * self.chunks * ITEMS[self.kind]

    def shared(self, passes: int) -> int:
        """Bytes of shared memory, as the interface gives them."""
        apart = self.warps * (self.chunks - self.held)
        if self.record is None:
            return HEAD + 1280 * self.warps * self.tiles + 1024 * apart + 512 * self.tiles * passes
        return HEAD + 3840 * self.warps * self.tiles + 3072 * apart


class Run(NamedTuple):
    """How the fibers take their turns: by which seed (0: in order), how many blocks at once."""

    seed: int = 0
    resident: int = 0  # 0: all


def source_of(tiling: Tiling, faults: Faults = ()) -> str:
    """The source for g++; each fault must fit in exactly one place."""
    stand_ins = {"device.h": HOST / "warps.h"}
    paths = [stand_ins.get(name, CUDA / name) for name in sequence.parts(tiling.kernel)]
    paths = [HOST / "fibers.h", HOST / "device.h", *paths]
    text = "\n".join([path.read_text("utf-8") for path in paths])
    for old, new in faults:
        if text.count(old) != 1:
            raise ValueError(f"the source has this {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    kinds = ARGUMENTS[tiling.kernel].split()
    types = {"p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(kinds)])
    passed = ", ".join([f"static_cast<Arg<{i}>>(a{i})" for i in range(len(kinds))])
    return f"""{text}
template <class F> struct Of;
template <class... P> struct Of<void (*)(P...)> {{ typedef std::tuple<P...> All; }};
constexpr auto kernel = xprnn::{tiling.name.replace("<", "<xprnn::")};
typedef Of<std::remove_const_t<decltype(kernel)>>::All All;
template <int i> using Arg = std::tuple_element_t<i, All>;
extern "C" int run({declared}, int x, int y, int shared, unsigned seed, int resident) {{
  return fibers::launch({{x, y, 1}}, {32 * tiling.warps}, shared, seed, resident,
                        [=] {{ kernel({passed}); }});
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
    arguments: Sequence[Any],
    grid: tuple[int, int],
    passes: int,
    run: Run,
    faults: Faults = (),
) -> str:
    """Run a kernel on NumPy arrays and integers; what became of it, one of `OUTCOMES`."""
    kinds = ARGUMENTS[tiling.kernel].split()
    given = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(kinds, arguments, strict=True)
    ]
    shape = (*grid, tiling.shared(passes), run.seed, run.resident)
    return OUTCOMES[library(tiling, faults).run(*given, *shape)]
