"""`stack_step.cu`, its own source compiled by g++ and run on fibers, as host_sequence.py does."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from host_kernels import COMPILER
from host_sequence import CUDA, FLAGS, HOST, OUTCOMES, Faults, Run

FOLDERS = dict.fromkeys(("fibers.h", "clusters.h", "warps.h", "lanes.h"), HOST)
FOLDERS["host/device.h"] = HOST.parent
PARTS = ("fibers.h", "clusters.h", "host/device.h", "common.h", "gru.h", "lstm.h", "rnn.h")
PARTS += ("warps.h", "lanes.h")
KINDS = "ppppppppp" + "iiiii" + "upu"
C = {"p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}
THREADS = 128


def source_of(name: str, faults: Faults = ()) -> str:
    """The source for g++ of an instantiation; each fault must fit in exactly one place."""
    parts = (*PARTS, "numbers.h", "stack_step.cu")
    text = "\n".join([(FOLDERS.get(part, CUDA) / part).read_text("utf-8") for part in parts])
    for old, new in faults:
        if text.count(old) != 1:
            raise ValueError(f"the source has this {text.count(old)} times, not once: {old!r}")
        text = text.replace(old, new)
    types = {"p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(KINDS)])
    passed = ", ".join([f"(std::tuple_element_t<{i}, All>)(a{i})" for i in range(len(KINDS))])
    return f"""{text}
template <class F> struct Of;
template <class... P> struct Of<void (*)(P...)> {{ typedef std::tuple<P...> All; }};
constexpr auto kernel = {name};
typedef Of<std::remove_const_t<decltype(kernel)>>::All All;
extern "C" int run({declared}, int x, int y, int shared, unsigned seed, int resident) {{
  return fibers::launch({{x, y, 1}}, {THREADS}, shared, seed, resident,
                        [=] {{ kernel({passed}); }});
}}
"""


@cache
def library(name: str, faults: Faults = ()) -> ctypes.CDLL:
    """An instantiation as a loaded library, with one function `run`.

    :raises RuntimeError: g++ is missing, or does not accept the source.
    """
    if COMPILER is None:
        raise RuntimeError("there is no g++ here to compile the kernels for the host with")
    source = source_of(name, faults)
    key = hashlib.sha256(repr((COMPILER, FLAGS, source)).encode()).hexdigest()[:32]
    folder = Path(tempfile.gettempdir()) / f"xprnn-host-sequences-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"{key}.so"
    if not target.exists():
        mine = folder / f"{key}-{os.getpid()}.so"
        command = (COMPILER, *FLAGS, "-x", "c++", "-", "-o", str(mine))
        outcome = subprocess.run(command, input=source, capture_output=True, text=True)
        if outcome.returncode:
            raise RuntimeError(f"g++ refuses {name}:\n{outcome.stderr[:4000]}")
        mine.replace(target)  # whole or not at all, whoever else compiles it now
    return ctypes.CDLL(str(target))


def launch(
    name: str,
    arguments: Sequence[Any],
    grid: tuple[int, int],
    shared: int,
    run: Run,
    faults: Faults = (),
) -> str:
    """Run it on NumPy arrays and integers; what became of it, one of `OUTCOMES`."""
    given = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(KINDS, arguments, strict=True)
    ]
    return OUTCOMES[library(name, faults).run(*given, *grid, shared, run.seed, run.resident)]
