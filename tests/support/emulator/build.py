"""CUDA sources compiled by g++ for the emulator, `host/emulator.h`; cached by content."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.support.build_cache import build_once
from tests.support.emulator.elementwise import COMPILER
from tests.support.emulator.elementwise import FLAGS as COMMON
from xprnn.kernels.cuda import sequence

HOST = Path(__file__).parent / "host"
CUDA = Path(sequence.__file__).parent
OUTCOMES = (  # as `Outcome` in emulator.h
    *("fine", "deadlock", "shared memory overrun", "diverged warp", "unaligned vector"),
    *("sent to a block that has ended", "barrier misused", "incomplete cluster"),
)
# _FORTIFY_SOURCE rejects the change of stacks. Most of the time is spent compiling, which takes
# two thirds of the time with -O1 compared to -O2
WARNINGS = ("-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-unused-variable")
FLAGS = (*COMMON, "-O1", *WARNINGS, "-U_FORTIFY_SOURCE")
SUBSTITUTES = {"device.h": HOST / "warps.h", "lanes.h": HOST / "lanes.h"}
Faults = tuple[tuple[str, str], ...]  # text that occurs once in the source, and its replacement


def emulator_source(parts: Iterable[str | Path], faults: Faults = ()) -> str:
    """The source of files of the CUDA folder, by name, or of others, preceded by the emulator.

    The text of each fault must occur exactly once.
    """
    paths = [HOST / "emulator.h", HOST / "clusters.h", HOST / "device.h"]
    paths += [SUBSTITUTES.get(str(part), CUDA / part) for part in parts]
    text = "\n".join([path.read_text("utf-8") for path in paths])
    for old, new in faults:
        if text.count(old) != 1:
            raise ValueError(f"the source has this {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    return text


@cache
def compiled(name: str, source: str) -> ctypes.CDLL:
    """A source as a loaded library, compiled once for all processes and runs.

    :raises RuntimeError: g++ is missing, or does not accept the source.
    """
    if COMPILER is None:
        raise RuntimeError("there is no g++ to compile the kernels for the host")

    def compile_to(path: Path) -> None:
        command = (COMPILER, *FLAGS, "-x", "c++", "-", "-o", str(path))
        outcome = subprocess.run(command, input=source, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(f"g++ refuses {name}:\n{outcome.stderr[:4000]}")

    made_from = COMPILER, FLAGS, source
    return ctypes.CDLL(str(build_once("host-sequences", ".so", made_from, compile_to)))
