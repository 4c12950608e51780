"""How much Python runs in one recorded GRU call and its backward pass, by route.

    PYTHONPATH=. python benchmarks/trace.py [ROUTE ...]

For each route the second call of one layer of one direction in train mode is traced with
`sys.setprofile`: Python calls, distinct functions, distinct files, changes of file from one call to
the next, and the depth of the stack. Only functions of the package are counted, and comprehensions
only in the depth. The CUDA routes run on the tests' fake CuPy, whose kernels do nothing: the host
code is the package's own. The other routes run on older versions too:

    PYTHONPATH=CHECKOUT python benchmarks/trace.py NumPy Numba
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
SMALL = {"T": 3, "N": 2, "I": 4, "H": 16}
LARGE = {"T": 16, "N": 4, "I": 12, "H": 32}
ROUTES = {
    "NumPy": ("numpy", "reference", LARGE),
    "Numba": ("numpy", "sequence", LARGE),
    "CUDA sequence": ("fake_cupy", "sequence", SMALL),
    "CUDA pointwise": ("fake_cupy", "pointwise", SMALL),
}


class Counts(NamedTuple):
    """What one traced call did."""

    calls: int
    functions: int
    files: int
    changes: int  # of file, from one call to the next
    depth: int

    def __str__(self) -> str:
        """The cells of a table's row."""
        return " ".join(f"{value:>9}" for value in self)


def traced(call: Callable[[], Any]) -> tuple[Any, Counts]:
    """The result of a call, and what it did."""
    import xprnn

    package = str(Path(xprnn.__file__).parent)
    codes: list[Any] = []
    depth, deepest = 0, 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal depth, deepest
        if not frame.f_code.co_filename.startswith(package):
            return
        if event == "call":
            depth += 1
            deepest = max(deepest, depth)
            if frame.f_code.co_name not in COMPREHENSIONS:
                codes.append(frame.f_code)
        elif event == "return":
            depth -= 1

    sys.setprofile(note)
    try:
        result = call()
    finally:
        sys.setprofile(None)
    files = [code.co_filename for code in codes]
    changes = sum(a != b for a, b in pairwise(files))
    return result, Counts(len(codes), len(set(codes)), len(set(files)), changes, deepest)


@contextmanager
def backend_of(name: str) -> Iterator[str]:
    """The name of a backend on which a route runs, as long as the block lasts."""
    if name == "numpy":
        yield name
        return
    sys.path.append(str(Path(__file__).parents[1]))
    import pytest

    from tests.support.fake_cupy.array import FakeCupyBackend
    from tests.support.fake_cupy.sequence import Function, install
    from xprnn.backend.registry import BACKENDS

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, name, FakeCupyBackend)
        install(patch)
        patch.setattr(Function, "__call__", lambda *arguments, **options: None)
        yield name


def measure(backend: str, kernels: str, sizes: dict[str, int]) -> tuple[Counts, Counts]:
    """The second forward call and its backward pass."""
    import numpy as np

    import xprnn

    T, N, I, H = sizes.values()  # noqa: E741
    os.environ["XPRNN_KERNELS"] = kernels
    layer = xprnn.GRU(I, H, seed=0, backend=backend).train()
    x, doutput = (layer.backend.from_host(np.ones((T, N, width), np.float32)) for width in (I, H))
    layer(x)
    layer.backward(doutput)
    _, forward = traced(lambda: layer(x))
    _, backward = traced(lambda: layer.backward(doutput))
    return forward, backward


def main(routes: list[str]) -> None:
    """Print a table of the routes named, of all if none is."""
    from xprnn import KernelUnavailableError

    print(f"{'route':26} " + " ".join(f"{name:>9}" for name in Counts._fields))
    for route, (name, kernels, sizes) in ROUTES.items():
        if routes and route not in routes:
            continue
        try:
            with backend_of(name) as backend:
                found = measure(backend, kernels, sizes)
        except (ImportError, KernelUnavailableError) as error:
            print(f"{route:26} {error}")
            continue
        for what, counts in zip(("forward", "backward"), found, strict=True):
            print(f"{route + ', ' + what:26} {counts}")


if __name__ == "__main__":
    main(sys.argv[1:])
