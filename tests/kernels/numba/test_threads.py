"""Threads of the CPU kernels: bits that do not depend on them, limits, forks, concurrent calls."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import Case, build, draw, product, run
from tests.support.implementations import new_thread
from tests.support.numba_cases import SEQUENCE, compare, forced, needs_numba, python, several

pytestmark = needs_numba

X = np.random.default_rng(0).standard_normal((12, 4, 3)).astype(np.float32)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@pytest.mark.parametrize("cell", SEQUENCE)
def test_slices_equal_the_reference_code(cell: str) -> None:
    """Slices of rows, of directions, and of both."""
    for case in product(
        cell=(cell,),
        layers=(1, 2),
        directions=(1, 2),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=("full", "ragged", "zero"),
        N=(4,),
    ):
        with several(2):
            compare(case, "sequence")
    for case in product(cell=(cell,), directions=(1, 2), N=(9, 23), H=(33,), T=(5,)):
        with several(4):
            compare(case, "sequence")


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", SEQUENCE)
def test_the_bits_do_not_depend_on_the_number_of_threads(cell: str, ragged: bool) -> None:
    for N, directions in ((5, 2), (8, 1), (15, 1), (22, 2), (64, 1)):
        case = Case(cell, directions=directions, dtype="float32", N=N, H=40, I=17, T=9)
        layer, problem = build(case), draw(case)
        if ragged:
            lengths = np.random.default_rng(N).integers(0, 10, N)
            problem = replace(problem, lengths=tuple(lengths.tolist()))

        alone = bits(case, layer, problem, 1)
        for threads in (2, 3, 7):
            for name, values in bits(case, layer, problem, threads).items():
                np.testing.assert_array_equal(values, alone[name], f"{case} {threads}: {name}")


def bits(case: Case, layer: Any, problem: Any, threads: int) -> dict[str, np.ndarray]:
    """All results, recorded and not, with this number of threads."""

    def unrecorded() -> np.ndarray:
        output, _ = layer.eval()(problem.x, lengths=problem.lengths)
        return output

    layer.train().zero_grad()
    with several(threads):
        recorded = forced("sequence", run, layer, case, problem)
        eval_output = forced("sequence", unrecorded)
    return {**{name: array.copy() for name, array in recorded.items()}, "unrecorded": eval_output}


@pytest.mark.parametrize("lengths", [None, [9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [2] * 11 + [0]])
@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_slices_cover_all_rows_with_equal_work(parts: int, lengths: Any) -> None:
    from xprnn.core.packing import make_packed_batch
    from xprnn.kernels.numba.sequence import _slices

    row_lengths = None if lengths is None else np.array(lengths)
    layout = make_packed_batch(xprnn.get_backend("numpy"), 9, 12, row_lengths)
    slices = _slices(layout, parts, 1)
    rows = [row for low, high in slices for row in range(low, high)]
    assert rows == list(range(layout.running))
    assert all(low % 4 == 0 for low, _ in slices) and len(slices) <= min(parts, 3)
    if lengths is None:
        assert {high - low for low, high in slices} == {12 // min(parts, 3)} or parts == 2


@pytest.mark.parametrize(
    ("rows", "threads", "directions", "count"),
    [(64, 1, 1, 1), (64, 2, 1, 4), (64, 2, 2, 2), (64, 1, 2, 1), (23, 2, 1, 2), (64, 7, 2, 7)],
)
def test_slices_of_eight_rows_are_two_per_thread(
    rows: int, threads: int, directions: int, count: int
) -> None:
    from xprnn.core.packing import make_packed_batch
    from xprnn.kernels.numba.sequence import _slices

    layout = make_packed_batch(xprnn.get_backend("numpy"), 9, rows, None)
    assert len(_slices(layout, threads, directions)) == count


def test_a_concurrent_call_runs_on_one_thread() -> None:
    from xprnn.kernels.numba import threads

    with several(2), threads.pool(2) as first:
        assert first.size == 2
        with threads.pool(2) as second:
            assert second.size == 1
    with several(2), threads.pool(2) as third:
        assert third.size == 2


def test_threads_run_concurrently_and_errors_propagate() -> None:
    from xprnn.kernels.numba import threads

    meeting = threading.Barrier(3)
    with several(3), threads.pool(3) as pool:
        pool.run([lambda: meeting.wait(20)] * 3)  # one thread alone would not pass it
        with pytest.raises(ZeroDivisionError):
            pool.run([lambda: None, lambda: 1 // 0, lambda: None])
        pool.run([lambda: meeting.wait(20)] * 3)


def test_a_late_thread_runs_fewer_calls() -> None:
    from xprnn.kernels.numba import threads

    caller, calls_of_caller, enough = threading.get_ident(), [0], threading.Event()

    def call() -> None:
        if threading.get_ident() != caller:
            enough.wait(20)
            return
        calls_of_caller[0] += 1
        if calls_of_caller[0] == 3:
            enough.set()

    with several(2), threads.pool(2) as pool:
        pool.run([call] * 4)
        assert enough.is_set() and calls_of_caller[0] >= 3


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where a thread may run")
def test_workers_may_run_on_all_processors_but_the_callers() -> None:
    from xprnn.kernels.numba import threads

    allowed, seen = os.sched_getaffinity(0), set()
    if len(allowed) == 1:
        pytest.skip("this process may use one processor only")
    meeting = threading.Barrier(2)

    def note_affinity() -> None:
        meeting.wait(20)
        seen.add((threading.get_ident(), frozenset(os.sched_getaffinity(0))))

    assert threads._current_processor is not None
    for processor in [*allowed][:2]:
        before = None
        while before != processor or threads._current_processor() != processor:
            os.sched_setaffinity(0, {processor})  # runs on this processor, and may migrate
            os.sched_setaffinity(0, allowed)
            before = threads._current_processor()
            with several(2), threads.pool(2) as pool:
                seen.clear()
                pool.run([note_affinity] * 2)
        affinities = dict(seen)
        assert affinities.pop(threading.get_ident()) == allowed
        assert [*affinities.values()] == [allowed - {processor}]


def test_threads_keep_no_references() -> None:
    from xprnn.kernels.numba import threads

    class Held:
        def __call__(self) -> None:
            meeting.wait(20)  # the other call runs in the other thread

    meeting, held = threading.Barrier(2), Held()
    alone, interval = sys.getrefcount(held), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(200):
            with several(2), threads.pool(2) as pool:
                pool.run([held, held])
            assert sys.getrefcount(held) == alone
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("threads", [1, 2])
def test_two_layers_in_two_threads_give_correct_results(threads: int) -> None:
    layers = [xprnn.GRU(3, 24, seed=0), xprnn.LSTM(3, 40, bidirectional=True, seed=1)]
    inputs = [np.tile(X, (4, 3, 1)), np.tile(X, (2, 3, 1))]
    pairs = [*zip(layers, inputs, strict=True)]

    def work() -> None:
        expected = [layer(x)[0] for layer, x in pairs]
        wrong: list[int] = []
        ready = threading.Barrier(len(layers))

        def repeat(k: int) -> None:
            ready.wait()
            outputs = (layers[k](inputs[k])[0] for _ in range(200))
            wrong.extend(k for output in outputs if not np.array_equal(output, expected[k]))

        callers = [new_thread(repeat, k) for k in range(len(layers))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert not wrong

    for kernels_name in ("pointwise", "sequence"):
        with several(threads):
            forced(kernels_name, work)


USE = """
import os, threading, numpy as np, xprnn
from xprnn.kernels.numba import sequence, threads
sequence.PER_THREAD, threads.usable = 1, lambda: 2
layer = xprnn.GRU(3, 24, seed=0).train()
x = np.ones((12, 8, 3), "f")
expected, _ = layer(x)
assert [t.name for t in threading.enumerate()].count("xprnn") == 1
"""


@needs_fork
@pytest.mark.parametrize("kernels_name", ["pointwise", "sequence"])
def test_a_fork_after_use_works(kernels_name: str) -> None:
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
child = os.fork()
if child == 0:
    output, _ = layer(x)
    layer.backward(output)
    other = xprnn.LSTM(3, 24, seed=0)(x)[0]  # not compiled before the fork
    os._exit(0 if np.array_equal(output, expected) and np.isfinite(other).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    use = USE if kernels_name == "sequence" else USE.replace("assert", "# ")
    assert python(use + code, XPRNN_KERNELS=kernels_name).split() == ["0"]


@needs_fork
def test_a_fork_while_the_threads_are_in_use_works() -> None:
    code = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
with threads.pool(2) as pool:
    child = os.fork()
    if child == 0:
        with threads.pool(2) as own:
            meeting = threading.Barrier(2)
            own.run([lambda: meeting.wait(20)] * 2)
        os._exit(0 if np.array_equal(layer(x)[0], expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(USE + code, XPRNN_KERNELS="sequence").split() == ["0"]


def test_the_interpreter_exits_with_idle_threads_and_calls_at_exit_work() -> None:
    code = """
import atexit
atexit.register(lambda: print(np.array_equal(layer.eval()(x)[0], expected)))
"""
    assert python(USE + code, XPRNN_KERNELS="sequence").split() == ["True"]
    code = """
import atexit, numpy as np, xprnn
from xprnn.kernels.numba import sequence, threads
sequence.PER_THREAD, threads.usable = 1, lambda: 2
layer = xprnn.GRU(3, 24, seed=0)  # not called before the interpreter ends
atexit.register(lambda: print(layer(np.ones((12, 8, 3), "f"))[0].shape))
"""
    assert python(code, XPRNN_KERNELS="sequence") == "(12, 8, 24)\n"
