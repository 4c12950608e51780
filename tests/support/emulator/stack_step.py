"""`stack_step.cu`, compiled by g++ and run on the emulator, as in sequence.py."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from tests.support.emulator.build import OUTCOMES, Faults, compiled, emulator_source
from tests.support.emulator.sequence import Run
from xprnn.kernels.cuda.stack_step import PARTS

KINDS = "ppppppppp" + "iiiii" + "upu"
C = {"p": ctypes.c_void_p, "i": ctypes.c_int, "u": ctypes.c_uint}
THREADS = 128


def source_of(name: str, faults: Faults = ()) -> str:
    """The source for g++ of an instantiation; the text of each fault must occur exactly once."""
    text = emulator_source(PARTS, faults)
    types = {"p": "void*", "i": "int", "u": "unsigned"}
    declared = ", ".join([f"{types[kind]} a{i}" for i, kind in enumerate(KINDS)])
    passed = ", ".join([f"(std::tuple_element_t<{i}, All>)(a{i})" for i in range(len(KINDS))])
    return f"""{text}
template <class F> struct Of;
template <class... P> struct Of<void (*)(P...)> {{ typedef std::tuple<P...> All; }};
constexpr auto kernel = {name};
typedef Of<std::remove_const_t<decltype(kernel)>>::All All;
extern "C" int run({declared}, int x, int y, int shared, unsigned seed, int resident) {{
  return emulator::launch({{x, y, 1}}, {THREADS}, shared, seed, resident,
                        [=] {{ kernel({passed}); }});
}}
"""


@cache
def library(name: str, faults: Faults = ()) -> ctypes.CDLL:
    """An instantiation as a loaded library with a function `run`.

    :raises RuntimeError: g++ is missing, or does not accept the source.
    """
    return compiled(name, source_of(name, faults))


def launch(
    name: str,
    arguments: Sequence[Any],
    grid: tuple[int, int],
    shared: int,
    run: Run,
    faults: Faults = (),
) -> str:
    """Run it on NumPy arrays and integers; returns one of `OUTCOMES`."""
    values = [
        C[kind](value.ctypes.data if isinstance(value, np.ndarray) else value)
        for kind, value in zip(KINDS, arguments, strict=True)
    ]
    return OUTCOMES[library(name, faults).run(*values, *grid, shared, run.seed, run.resident)]
