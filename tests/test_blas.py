"""Products in slices: what they give, that they are small enough, and when they are left whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest

from xprnn import blas
from xprnn.processors import processors

SHAPES = [(384, 128, 32), (381, 127, 33), (97, 300, 200), (4, 8, 3), (1, 9, 5), (5, 9, 1)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(blas, "usable", lambda: request.param)
    return request.param


def operands(M: int, K: int, N: int, dtype: str = "float64") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(M + N)
    left, right = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    return left.astype(dtype), right.astype(dtype), np.full((M, N), np.nan, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_give_the_product(shape: tuple[int, ...], dtype: str, threads: int) -> None:
    """Of arrays as they stand and transposed, and into columns of a larger one."""
    left, right, out = operands(*shape, dtype)
    wanted = left.astype("float64") @ right.astype("float64")
    wide = np.full((shape[0], shape[2] + 3), np.nan, dtype)
    for a in (left, np.asfortranarray(left)):
        for b in (right, np.asfortranarray(right)):
            for target in (out, wide[:, 1:-2]):
                for make in (blas.matmul, lambda *given: [call() for call in blas.calls(*given)]):
                    target[...] = np.nan
                    make(a, b, target)
                    scale = np.abs(wanted).max(initial=1.0)
                    np.testing.assert_allclose(
                        target, wanted, rtol=0, atol=50 * np.finfo(dtype).eps * scale
                    )
    assert np.isnan(wide[:, 0]).all() and np.isnan(wide[:, -2:]).all()


@pytest.mark.parametrize("shape", [(384, 128, 32), (381, 127, 33), (1536, 512, 64)])
def test_no_slice_is_larger_than_openblas_leaves_alone(shape: tuple[int, ...]) -> None:
    left, right, out = operands(*shape)
    for call in blas.calls(left, right, out, shared=prod(shape)):
        stack = call.args[0]
        assert stack.shape[-2] >= 1 and stack.shape[-2] * right.size <= blas.SLICE


def whole(*shape: int, shared: int = blas.LOOP) -> bool:
    return [call.args[0].ndim for call in blas.calls(*operands(*shape), shared)] == [2]


def test_large_products_are_left_to_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "usable", lambda: 2)
    large, small = (1536, 512, 64), (384, 128, 32)
    assert whole(*large) and not whole(*small) and not whole(*large, shared=blas.ONCE * 2)
    monkeypatch.setattr(blas, "usable", lambda: 1)
    assert not whole(*large) and not whole(*small)


def test_a_vector_is_left_whole() -> None:
    assert whole(1536, 512, 1)


BUSY = """
import sys, time, numpy as np, xprnn
from xprnn import blas
blas.SLICE = int(sys.argv[1])
x = np.ones((128, 8, 64), "f")
layers = [make(64, 64, seed=0).train() for make in (xprnn.GRU, xprnn.LSTM)]
for turn in range(2):  # in the first what happens once
    time.sleep(0.1)
    start, mine = time.process_time(), time.thread_time()
    for layer in layers:
        for _ in range(5):
            output, _ = layer(x)
            layer.backward(output)
    mine = time.thread_time() - mine
    print((time.process_time() - start) / mine - 1.0)
"""


def busy(limit: int) -> float:
    """The processor time of all other threads over that of the caller's."""
    two = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "XPRNN_KERNELS": "reference"}
    command = [sys.executable, "-c", BUSY, str(limit)]
    done = subprocess.run(command, env=os.environ | two, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(processors() < 2, reason="this process may use one processor only")
def test_a_small_layer_wakes_no_thread() -> None:
    """All its products, those of all steps too, forward and backward; without slices it does."""
    assert busy(blas.SLICE) < 0.02
    assert busy(10**12) > 0.1
