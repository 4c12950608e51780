"""The precision of the CUDA backend's products, and the arguments of cuBLAS that determine it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.fake_cupy.array import FakeCupyBackend
from tests.support.fake_cupy.cuda import CUDA, tf32
from tests.support.products import (
    BACKENDS,
    RESULTS,
    SIZES,
    assert_product,
    numpy_type,
    opened,
    zeros,
)
from xprnn.backend import Backend
from xprnn.backend.cublas import CudaModule

FAKE_CUPY = FakeCupyBackend.open("")

COMPUTE = {  # (factors, result, precision): the type of the sums, the math mode, None for any
    ("float16", "float16", "ieee"): ("CUBLAS_COMPUTE_32F", 16),
    ("float16", "float32", "ieee"): ("CUBLAS_COMPUTE_32F", None),
    ("bfloat16", "bfloat16", "ieee"): ("CUBLAS_COMPUTE_32F", 16),
    ("bfloat16", "float32", "ieee"): ("CUBLAS_COMPUTE_32F", None),
    ("float32", "float32", "ieee"): ("CUBLAS_COMPUTE_32F", 0),
    ("float32", "float32", "tf32"): ("CUBLAS_COMPUTE_32F_FAST_TF32", None),
    ("float64", "float64", "ieee"): ("CUBLAS_COMPUTE_64F", 0),
    ("float64", "float64", "tf32"): ("CUBLAS_COMPUTE_64F", 0),
}


@pytest.fixture(params=BACKENDS)
def any_backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with opened(request.param) as backend:
        yield backend


@pytest.fixture
def handle(any_backend: Backend) -> Iterator[Callable[..., int]]:
    """A function that sets the handle's math mode, if it gets one, and returns the current one."""
    cublas, number = any_backend.xp.cuda.cublas, any_backend.xp.cuda.device.get_cublas_handle()

    def mode(new: int | None = None) -> int:
        if new is not None:
            try:
                cublas.setMathMode(number, new)
            except RuntimeError as error:
                pytest.skip(f"this cuBLAS has no math mode {new}: {error}")
        return int(cublas.getMathMode(number))

    yield mode
    mode(0)


@pytest.mark.parametrize("variable", ["0", "1"])
@pytest.mark.parametrize("key", COMPUTE, ids=" ".join)
def test_the_compute_type_and_math_mode_of_a_product(
    key: tuple[str, str, str], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, (compute, mode) = [numpy_type(name) for name in key[:2]], COMPUTE[key]
    monkeypatch.setenv("CUPY_TF32", variable)
    calls = []
    original = CUDA.cublas.gemmEx

    def record(*call: int) -> None:
        calls.append((*call[-2:], CUDA.cublas._math_mode))
        original(*call)

    monkeypatch.setattr(CUDA.cublas, "gemmEx", record)
    a, out = zeros(2, 2, dtype=kinds[0]), zeros(2, 2, dtype=kinds[1])
    module = CudaModule(FAKE_CUPY.xp, key[2])
    for previous in (0, 3):
        monkeypatch.setattr(CUDA.cublas, "_math_mode", previous)
        module.matmul(a, a, out=out)
        expected = previous if mode is None else mode
        assert calls.pop() == (getattr(CUDA.cublas, compute), -1, expected)
        assert CUDA.cublas._math_mode == previous, "the handle has changed"


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 16, 19])
@pytest.mark.parametrize("types", RESULTS, ids=RESULTS.values())
def test_full_precision_in_every_math_mode_of_the_handle(
    types: tuple[str, str], mode: int, any_backend: Backend, handle: Callable[..., int]
) -> None:
    numpy_type(types[0])
    handle(mode)
    assert_product(any_backend, (64, 64, 64), types, ("by rows", "by columns", "by rows"), add=True)
    assert handle() == mode


@pytest.mark.gpu
def test_cupy_tf32_has_no_effect() -> None:
    with opened("cupy"):  # skips without a GPU
        code = """
from tests.support.products import assert_product, opened
with opened("cupy") as any_backend:
    assert_product(any_backend, (64, 64, 64), ("float32", "float32"), ("by rows",) * 3, add=True)
"""
    folder = Path(__file__).parents[4]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUPY_TF32": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)


def test_the_bound_distinguishes_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = ("by rows", "by rows", "by rows")
    arguments = FAKE_CUPY, (64, 64, 64), ("float32", "float32"), layouts, False
    with pytest.raises(AssertionError):
        assert_product(*arguments, precision="tf32")
    assert_product(*arguments, precision="tf32", roundoff=2.0**-11)
    monkeypatch.setattr("xprnn.backend.cublas.DISALLOW_REDUCED_PRECISION_REDUCTION", 0)
    with pytest.raises(AssertionError):
        assert_product(FAKE_CUPY, (64, 64, 64), ("float16", "float16"), layouts, False)


def test_tf32_rounds_only_the_factors(any_backend: Backend) -> None:
    # hardware may truncate instead of rounding: 2^-10
    for size in SIZES:
        layouts = ("by rows", "by columns", "by rows")
        assert_product(any_backend, size, ("float32", "float32"), layouts, True, "tf32", 2.0**-10)
    one = np.float32(1.0)
    for value, expected in (
        (one + 2.0**-11, one),  # half way, to even
        (one + 3 * 2.0**-11, one + 2 * 2.0**-10),
        (one + 2.0**-11 + 2.0**-23, one + 2.0**-10),
        (-one, -one),
        (np.inf, np.inf),
    ):
        assert tf32(np.array([value], "float32"))[0] == np.float32(expected)


def test_the_math_mode_is_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA.cublas, "_math_mode", 3)
    monkeypatch.setattr(CUDA.cublas, "gemmEx", lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        CudaModule(FAKE_CUPY.xp, "ieee").matmul(zeros(2, 2), zeros(2, 2))
    assert CUDA.cublas._math_mode == 3
