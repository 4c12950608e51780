"""Matrices in every dtype and layout, multiplied on a backend and compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy.array import FakeArray, FakeCupyBackend
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from xprnn.backend import Backend
from xprnn.backend.cublas import CudaModule

DTYPES = ("float16", "bfloat16", "float32", "float64")
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
RESULTS = {  # (dtype of the factors, of the result)
    **{(name, name): name for name in DTYPES},
    ("float16", "float32"): "float16 to float32",
    ("bfloat16", "float32"): "bfloat16 to float32",
}
SIZES = ((1, 1, 1), (1, 5, 1), (3, 1, 4), (1, 4, 6), (5, 3, 1), (4, 7, 5), (17, 40, 19))

# name: the shape of an array that contains a matrix (r, c), and the view of the matrix
LAYOUTS: dict[str, tuple[Callable[[int, int], tuple[int, int]], Callable[..., Any]]] = {
    "by rows": (lambda r, c: (r, c), lambda x, r, c: x),
    "by columns": (lambda r, c: (c, r), lambda x, r, c: x.T),
    "rows of more": (lambda r, c: (r + 3, c), lambda x, r, c: x[2 : 2 + r]),
    "every other row": (lambda r, c: (2 * r, c), lambda x, r, c: x[::2]),
    "columns of more": (lambda r, c: (r, c + 3), lambda x, r, c: x[:, 1 : 1 + c]),
    "columns of more, transposed": (lambda r, c: (c, r + 3), lambda x, r, c: x[:, 2 : 2 + r].T),
}
COPIED = {
    "every other column": (lambda r, c: (r, 2 * c), lambda x, r, c: x[:, ::2]),
    "upside down": (lambda r, c: (r, c), lambda x, r, c: x[::-1]),
    "every other row and third column": (lambda r, c: (2 * r, 3 * c), lambda x, r, c: x[::2, ::3]),
}
OUTPUTS = ("by rows", "rows of more", "every other row", "columns of more")


def numpy_type(name: str) -> np.dtype[Any]:
    if name == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


BACKENDS = ("fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu))


@contextmanager
def opened(name: str) -> Iterator[Backend]:
    """The fake CuPy, or CuPy if there is a usable GPU."""
    if name == "fake_cupy":
        LOG.clear()
        yield FakeCupyBackend.open("")
        return
    try:
        backend = xprnn.get_backend(name)
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    with backend.activate():
        yield backend


def zeros(*shape: int, dtype: Any = "float32") -> FakeArray:
    return FakeArray(np.zeros(shape, dtype))


def draw(rng: np.random.Generator, rows: int, columns: int, name: str, layout: str) -> np.ndarray:
    """An array on the host from which `LAYOUTS[layout]` cuts a matrix (rows, columns)."""
    shape = (LAYOUTS | COPIED)[layout][0](rows, columns)
    return rng.standard_normal(shape).astype(numpy_type(name))


def cut(array: Any, rows: int, columns: int, layout: str) -> Any:
    return (LAYOUTS | COPIED)[layout][1](array, rows, columns)


def assert_product(
    any_backend: Backend,
    size: tuple[int, int, int],
    types: tuple[str, str],
    layouts: tuple[str, str, str],
    add: bool,
    precision: str = "ieee",
    roundoff: float = 0.0,
) -> None:
    """Multiply on the backend; compare with float64, and check that nothing else was written.

    The bound is that of an inner product of k terms in any order and one rounding of the result,
    |error| <= (k + 1) u |a| |b| + u' |out| (N. J. Higham, "Accuracy and Stability of Numerical
    Algorithms", 3.1), u of the sums and u' of the result; `roundoff` is that of the factors.
    16-bit factors are multiplied by tensor cores, which truncate sums instead of rounding them, so
    that u is 2^-23 (M. Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ Comput.
    Sci. 7, 2021).
    """
    m, k, n = size
    rng = np.random.default_rng(sum(size))
    shapes = ((m, k), (k, n), (m, n))
    kinds = (types[0], types[0], types[1])
    host = [draw(rng, *s, t, layout) for s, t, layout in zip(shapes, kinds, layouts, strict=True)]
    device = [any_backend.from_host(array) for array in host]
    a, b, out = (cut(x, *s, layout) for x, s, layout in zip(device, shapes, layouts, strict=True))
    module = CudaModule(any_backend.xp, precision)
    returned = module.add_matmul(a, b, out) if add else module.matmul(a, b, out=out)
    assert returned is out

    a, b, before = (
        cut(x, *s, layout).astype(np.float64)
        for x, s, layout in zip(host, shapes, layouts, strict=True)
    )
    expected = a @ b + before if add else a @ b
    after = any_backend.to_host(device[2])
    written = cut(after, m, n, layouts[2])
    unit = {"float64": 2.0**-53, "float32": 2.0**-24}.get(types[0], 2.0**-23)
    magnitude = np.abs(a) @ np.abs(b) + add * np.abs(before)
    bound = ((k + 1) * unit + 3 * roundoff) * magnitude
    bound += UNIT_ROUNDOFF[types[1]] * (np.abs(expected) + bound)
    assert (np.abs(written.astype(np.float64) - expected) <= bound).all()
    cut(host[2], m, n, layouts[2])[...] = written
    assert after.tobytes() == host[2].tobytes(), "memory outside `out` was written"
