"""Shared by asv's benchmarks: parameters, skips with their reasons, clocks, choice of kernels."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

CELLS = ("gru", "lstm", "rnn_tanh")
DEFINED = ("li_gru", "gru_reset_before")  # generated from a definition; peers lack the first
PEERS = ("torch", "onnxruntime")  # measured where they are installed
WITHOUT = {"training": ("onnxruntime",), "stepper": PEERS}  # by task: peers that do not have it
STEPS = ("N=1 H=32", "N=1 H=128", "N=1 H=512", "N=32 H=512")


class Grid(NamedTuple):
    """What is measured on one kind of device, all combinations with each cell."""

    # library-device[-kernels]: "xprnn-<backend>-<XPRNN_KERNELS>" or "<peer>-<device>"
    implementations: tuple[str, ...]
    dtypes: tuple[str, ...]
    sizes: tuple[str, ...]  # I = H

    def params(self, task: str) -> tuple[tuple[str, ...], ...]:
        """asv's parameters of a task's benchmark: cell, implementation, dtype and size."""
        names = tuple(
            name
            for name in installed(self.implementations)
            if not name.startswith(WITHOUT.get(task, ()))
        )
        sizes = STEPS if task in ("step", "stepper") else self.sizes
        return CELLS, names, self.dtypes, sizes

    def defined(self) -> tuple[tuple[str, ...], ...]:
        """asv's parameters of the benchmarks of `DEFINED`: without peers."""
        names = tuple(name for name in self.implementations if not name.startswith(PEERS))
        return DEFINED, names, self.dtypes, self.sizes


def installed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out peers that are not installed."""
    lacking = tuple(peer for peer in PEERS if importlib.util.find_spec(peer) is None)
    return tuple(name for name in names if not name.startswith(lacking))


# To add a kernel or a peer's device, add its name to a grid; to add a cell, add its name to CELLS.
# A complete run on a CPU is to take minutes: at most 60 combinations a benchmark.
CPU = Grid(
    implementations=(
        "xprnn-numpy-reference",
        "xprnn-numpy-sequence",
        "xprnn-numpy-auto",  # what users get
        "torch-cpu",
        "onnxruntime-cpu",
    ),
    dtypes=("float32",),
    sizes=("N=1 H=32 T=128", "N=8 H=64 T=128", "N=32 H=128 T=128", "N=64 H=512 T=64"),
)
GPU = Grid(
    implementations=(
        "xprnn-cupy-reference",
        "xprnn-cupy-pointwise",
        "xprnn-cupy-sequence",
        "torch-cuda",
        "onnxruntime-cuda",
    ),
    dtypes=("float32", "float64", "tf32", "float16", "bfloat16"),
    sizes=(*CPU.sizes, "N=1 H=256 T=512", "N=32 H=512 T=512", "N=64 H=1024 T=256"),
)

SKIPS = "XPRNN_SKIPS"  # a file to which the reasons are appended, one line of JSON each
KERNELS = "XPRNN_KERNELS"
MEASURED = "XPRNN_MEASURED"  # the folder from which xprnn must be imported


def gpu_name() -> str:
    """The name of the first GPU, "" without one."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0]


def skip(benchmark: object, parameters: tuple[str, ...], reason: str) -> NoReturn:
    """Skip a combination: asv treats this error as a skip, and the reason is recorded."""
    if SKIPS in os.environ:
        kind = type(benchmark)
        name = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"  # as asv names it
        line = json.dumps({"benchmark": name, "parameters": parameters, "reason": reason})
        with Path(os.environ[SKIPS]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    raise NotImplementedError(reason)


class UnusableError(Exception):
    """This combination cannot be measured here; the message gives the reason."""


def numbers(size: str) -> dict[str, int]:
    """{"N": 8, "H": 64, "T": 128} for "N=8 H=64 T=128"; T defaults to 1."""
    return {"T": 1, **{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", size)}}


def usable_backend(name: str) -> Any:
    """The backend of this name in the version of xprnn under test."""
    if name == "cupy" and importlib.util.find_spec("cupy") is None:
        raise UnusableError("CuPy is not installed")  # known without importing xprnn

    import xprnn

    expected = os.environ.get(MEASURED)
    if expected and not Path(xprnn.__file__).is_relative_to(expected):
        raise RuntimeError(f"xprnn was imported from {xprnn.__file__}, expected {expected}")
    try:
        return xprnn.get_backend(name)
    except (xprnn.BackendUnavailableError, ValueError) as error:  # unavailable; unknown name
        raise UnusableError(str(error)) from error


def module_of(*names: str) -> Any:
    """The first of these modules that the imported version of xprnn has."""
    for name in names[:-1]:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return importlib.import_module(names[-1])


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Force xprnn's kernels; older versions know the environment variable only."""
    import xprnn

    if hasattr(xprnn, "use_kernels"):
        with xprnn.use_kernels(name):
            yield
        return
    previous = os.environ.get(KERNELS)
    os.environ[KERNELS] = name
    try:
        yield
    finally:
        del os.environ[KERNELS]
        if previous is not None:
            os.environ[KERNELS] = previous


Clock = Callable[[], float]


def clock(backend: Any) -> Clock:
    """A clock in seconds for a backend's device: CUDA events on a GPU, else the host's clock."""
    return time.perf_counter if backend.name == "numpy" else EventClock(backend)


class EventClock:
    """Seconds on a GPU: each reading records an event and waits for it.

    The difference of two readings is the time between their events. The sum is accumulated here,
    because CUDA returns the time between two events as float32.
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._cuda = backend, backend.xp.cuda
        self._seconds = 0.0
        self._last = self._record()

    def __call__(self) -> float:
        """The device's seconds since the first reading."""
        now = self._record()
        self._seconds += self._cuda.get_elapsed_time(self._last, now) / 1e3
        self._last = now
        return self._seconds

    def _record(self) -> Any:
        with self._backend.activate():
            event = self._cuda.Event()
            event.record()
            event.synchronize()
        return event
