"""Sliced products: their results, the size of the slices, and products that are not sliced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import xprnn
from tests.support.implementations import SelectKernels
from xprnn.backend import blas
from xprnn.backend.floating_point import environment
from xprnn.backend.processors import processors

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
    """Operands are contiguous or transposed; the output may be columns of a larger array."""
    left, right, out = operands(*shape, dtype)
    wanted = left.astype("float64") @ right.astype("float64")
    wide = np.full((shape[0], shape[2] + 3), np.nan, dtype)
    for a in (left, np.asfortranarray(left)):
        for b in (right, np.asfortranarray(right)):
            for target in (out, wide[:, 1:-2]):
                for make in (blas.matmul, lambda *arrays: [call() for call in blas.calls(*arrays)]):
                    target[...] = np.nan
                    make(a, b, target)
                    scale = np.abs(wanted).max(initial=1.0)
                    np.testing.assert_allclose(
                        target, wanted, rtol=0, atol=50 * np.finfo(dtype).eps * scale
                    )
    assert np.isnan(wide[:, 0]).all() and np.isnan(wide[:, -2:]).all()


SIZES = [(384, 128, 32), (381, 127, 33), (1536, 512, 64), (2, 700, 1500), (1536, 512, 1)]
SIZES += [(33, 4099, 31), (129, 1025, 67), (16, 9000, 16), (20000, 3, 300)]


@pytest.mark.parametrize("shape", SIZES)
def test_no_slice_is_large_enough_for_openblas_threads(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "usable", lambda: 2)
    left, right, out = operands(*shape)
    operand_sets: list[tuple[np.ndarray, ...]] = []
    original = np.matmul

    def noted(*arrays: np.ndarray) -> None:
        operand_sets.append(arrays)
        original(*arrays)

    monkeypatch.setattr(blas.np, "matmul", noted)
    blas.matmul(left, right, out)
    for call in blas.calls(left, right, out):
        call()
    assert operand_sets
    for a, b, _ in operand_sets:
        assert a.shape[-2] >= 1 and a.shape[-2] * b.shape[-2] * b.shape[-1] <= blas.SLICE
    np.testing.assert_allclose(out, left @ right, rtol=0, atol=1e-9)


def is_unsliced(*shape: int) -> bool:
    left, right, out = operands(*shape)
    (first, *others) = blas.calls(left, right, out)
    return not others and first.args[0] is right


def test_huge_products_are_not_sliced(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """The size alone decides, but with one usable thread no large product is sliced."""
    monkeypatch.setattr(blas, "LARGE", 40_000_000)
    assert is_unsliced(1536, 512, 64)
    assert is_unsliced(768, 512, 64) is (threads == 1)
    assert not is_unsliced(384, 128, 32)


# -- products that threads share


SHARED = [(1536, 512, 64), (512, 1536, 64), (129, 1025, 67), (64, 512, 1537), (4096, 2048, 1)]


def product(shape: tuple[int, ...]) -> np.ndarray:
    left, right, out = operands(*shape, "float32")
    for call in blas.calls(left, right, out):
        call()
    return out


@pytest.mark.parametrize("shape", SHARED)
def test_the_bits_do_not_depend_on_the_number_of_threads(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for count in (2, 3, 17):
        monkeypatch.setattr(blas, "usable", lambda count=count: count)
        outputs += [product(shape) for _ in range(3)]
    for each in outputs[1:]:
        np.testing.assert_array_equal(each, outputs[0])


def results(kind: str) -> list[np.ndarray]:
    """The results of a layer whose products are shared among threads, forward and backward."""
    layer = getattr(xprnn, kind)(70, 370, seed=0).train()
    x = np.random.default_rng(0).standard_normal((9, 66, 70), dtype=np.float32)
    output, state = layer(x)
    dx, _ = layer.backward(output)
    return [output, *(state if isinstance(state, tuple) else (state,)), dx, *layer.grads.values()]


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_layers_bits_do_not_depend_on_the_number_of_threads(
    kind: str, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    select_kernels("reference")
    shared: list[int] = []
    original = blas._share

    def noted(pieces: list[blas.Piece], others: int) -> None:
        shared.append(len(pieces))
        original(pieces, others)

    monkeypatch.setattr(blas, "_share", noted)
    outputs = []
    for count in (2, 3):
        monkeypatch.setattr(blas, "usable", lambda count=count: count)
        shared.clear()
        outputs.append([array.copy() for array in results(kind)])
        assert len(shared) >= 9  # the forward or backward product of each step
    for other in outputs[1:]:
        for one, two in zip(outputs[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


BITS = """
import sys; sys.path.insert(0, sys.argv[1])
import hashlib, numpy as np
from tests.unit import test_blas
for kind in ("GRU", "LSTM"):
    for array in test_blas.results(kind):
        print(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
"""


def test_the_bits_do_not_depend_on_the_threads_of_the_process() -> None:
    """Neither OpenBLAS's threads nor the number of usable processors matters."""
    printed = set()
    for count in ("2", "3"):
        few = {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count}
        environment = os.environ | few | {"XPRNN_KERNELS": "reference"}
        command = [sys.executable, "-c", BITS, str(Path(__file__).parents[2])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert len(done.stdout.split()) > 10
        printed.add(done.stdout)
    assert len(printed) == 1


def concurrent_pieces(count: int) -> tuple[list[Callable[[int], None]], list[int]]:
    """Pieces that end once all of them have started, and the list of threads that ran them."""
    barrier, taken = threading.Barrier(count), []

    def piece(thread: int) -> None:
        taken.append(thread)
        barrier.wait(60)

    return [piece] * count, taken


def test_each_thread_has_its_own_number() -> None:
    """It selects the thread's own memory."""
    for count in (2, 4, 3):
        pieces, taken = concurrent_pieces(count)
        blas._share(pieces, count - 1)
        assert sorted(taken) == list(range(count))


def note(taken: list[int], k: int, thread: int) -> None:
    taken.append(k)


def test_every_piece_runs_once() -> None:
    for _ in range(200):
        taken: list[int] = []
        blas._share([partial(note, taken, k) for k in range(9)], 3)
        assert sorted(taken) == list(range(9))


@pytest.mark.parametrize("fault", ["left out", "twice"])
def test_a_sharing_fault_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The assertions above can fail."""

    class Faulty(blas._Product):
        def __init__(self, pieces: list[blas.Piece]) -> None:
            super().__init__(pieces[1:] if fault == "left out" else [*pieces, pieces[0]])

    monkeypatch.setattr(blas, "_Product", Faulty)
    with pytest.raises(AssertionError):
        test_every_piece_runs_once()
    if fault == "left out":
        monkeypatch.setattr(blas, "usable", lambda: 2)
        assert np.isnan(product(SHARED[0])).any()


def test_an_error_in_another_thread_reaches_the_caller() -> None:
    pieces, _ = concurrent_pieces(3)

    def wrong(thread: int) -> None:
        pieces[0](thread)
        if thread == 2:
            raise ValueError("a piece's own")

    with pytest.raises(ValueError, match="a piece's own"):
        blas._share([wrong] * 3, 2)
    test_each_thread_has_its_own_number()  # the threads still work


def test_an_interrupted_product_waits_for_started_pieces() -> None:
    """Pieces that other threads have started end before the exception leaves the call."""
    events = [threading.Event() for _ in range(3)]
    caller_started, worker_started, worker_ended = events

    def piece(thread: int) -> None:
        if thread:
            worker_started.set()
            caller_started.wait(60)
            time.sleep(0.01)
            worker_ended.set()
        else:
            caller_started.set()
            worker_started.wait(60)
            signal.raise_signal(signal.SIGINT)

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            blas._share([piece, piece], 1)
        assert worker_ended.is_set()
        for event in events:
            event.clear()
    test_every_piece_runs_once()


def test_subnormal_numbers_are_zero_in_every_thread() -> None:
    pieces, _ = concurrent_pieces(3)
    outputs: dict[int, float] = {}
    tiny = np.full(1, np.finfo(np.float64).tiny)

    def piece(thread: int) -> None:
        pieces[0](thread)
        outputs[thread] = float((tiny * 0.5)[0])

    with environment():
        blas._share([piece] * 3, 2)
    assert len(outputs) == 3 and len(set(outputs.values())) == 1


def test_eight_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "usable", lambda: 3)
    expected = product(SHARED[0])
    with ThreadPoolExecutor(8) as pool:
        for output in pool.map(product, [SHARED[0]] * 48):
            np.testing.assert_array_equal(output, expected)


FORK = """
import os, numpy as np
from xprnn.backend import blas
blas.usable = lambda: 3
left, right = np.ones((1536, 512)), np.ones((512, 64))
def product():
    out = np.full((1536, 64), np.nan)
    for call in blas.calls(left, right, out):
        call()
    return (out == 512).all() and len(blas._workers._threads) == 2
assert product()
child = os.fork()
if child == 0:
    os._exit(0 if not blas._workers._threads and product() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert product()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_starts_its_own_threads() -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK]
    subprocess.run(command, check=True, timeout=120)


# -- OpenBLAS's threads are not used


BUSY = """
import sys, time, numpy as np, xprnn
from xprnn.backend import blas
blas.SLICE = int(sys.argv[1])
x = np.ones((128, 8, 64), "f")
layers = [make(64, 64, seed=0).train() for make in (xprnn.GRU, xprnn.LSTM)]
for repetition in range(2):  # the first includes what happens only once
    time.sleep(0.1)
    start, own = time.process_time(), time.thread_time()
    for layer in layers:
        for _ in range(5):
            output, _ = layer(x)
            layer.backward(output)
    own = time.thread_time() - own
    print((time.process_time() - start) / own - 1.0)
"""


def busy(limit: int) -> float:
    """The processor time of all other threads over that of the caller's."""
    two = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "XPRNN_KERNELS": "reference"}
    command = [sys.executable, "-c", BUSY, str(limit)]
    done = subprocess.run(command, env=os.environ | two, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(processors() < 2, reason="this process may use one processor only")
def test_a_small_layer_uses_no_openblas_thread() -> None:
    """In none of its products, forward or backward; without slices it does."""
    assert busy(blas.SLICE) < 0.02
    assert busy(10**12) > 0.1
