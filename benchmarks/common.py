"""What asv's benchmarks share: the parameters, skips with their reasons, and clocks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

CELLS = ("gru", "lstm", "rnn_tanh")
# library-device[-kernels]: "xprnn-<backend>-<XPRNN_KERNELS>" or "<peer>-<device>". A new kernel
# or peer is one name here, a new cell one name above.
IMPLEMENTATIONS = (
    "xprnn-numpy-reference",
    "xprnn-numpy-pointwise",
    "xprnn-numpy-sequence",
    "xprnn-cupy-reference",
    "xprnn-cupy-pointwise",
    "xprnn-cupy-sequence",
    "torch-cpu",
    "torch-cuda",
    "onnxruntime-cpu",
    "onnxruntime-cuda",
)
DTYPES = ("float32", "float64", "tf32", "float16", "bfloat16")
SIZES = (  # I = H
    "N=1 H=32 T=128",
    "N=8 H=64 T=128",
    "N=32 H=128 T=128",
    "N=64 H=512 T=64",
    "N=1 H=256 T=512",
    "N=32 H=512 T=512",
    "N=64 H=1024 T=256",
)
STEPS = ("N=1 H=32", "N=1 H=128", "N=1 H=512", "N=32 H=512")

SKIPS = "XPRNN_SKIPS"  # a file that takes the reasons, a line of JSON each
MEASURED = "XPRNN_MEASURED"  # the folder from which xprnn has to come


def skip(benchmark: str, parameters: tuple[str, ...], reason: str) -> NoReturn:
    """Leave out a combination: asv takes this error as a skip, and the reason is noted."""
    if SKIPS in os.environ:
        line = json.dumps({"benchmark": benchmark, "parameters": parameters, "reason": reason})
        with Path(os.environ[SKIPS]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    raise NotImplementedError(reason)


class UnusableError(Exception):
    """This combination cannot be measured here; the message says why."""


def numbers(size: str) -> dict[str, int]:
    """{"N": 8, "H": 64, "T": 128} of "N=8 H=64 T=128"; T is 1 where it is not given."""
    return {"T": 1, **{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", size)}}


def usable_backend(name: str) -> Any:
    """The backend of this name, of the version of xprnn that is measured."""
    if name == "cupy" and importlib.util.find_spec("cupy") is None:
        raise UnusableError("CuPy is not installed")  # known without importing anything

    import xprnn

    expected = os.environ.get(MEASURED)
    if expected and not Path(xprnn.__file__).is_relative_to(expected):
        raise RuntimeError(f"xprnn was imported from {xprnn.__file__}, expected {expected}")
    try:
        return xprnn.get_backend(name)
    except (xprnn.BackendUnavailableError, ValueError) as error:  # none here; no such name
        raise UnusableError(str(error)) from error


Clock = Callable[[], float]


def clock(backend: Any) -> Clock:
    """Seconds for work on a backend's device: between CUDA events on a GPU, else of the host."""
    return time.perf_counter if backend.name == "numpy" else EventClock(backend)


class EventClock:
    """Seconds on a GPU: each reading records an event and waits for it.

    Of two readings the difference is the time between their events. The sum is kept here,
    because CUDA gives the time between two events in float32.
    """

    def __init__(self, backend: Any) -> None:
        self._backend, self._cuda = backend, backend.xp.cuda
        self._seconds = 0.0
        self._last = self._record()

    def __call__(self) -> float:
        """The seconds from the first reading to now, on the device."""
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
