"""The stepper with the compiled step of the CPU: `layers/test_stepper*.py`, and further tests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers import test_stepper as by_value
from tests.layers import test_stepper_memory as in_memory
from tests.layers import test_stepper_streams as in_streams
from tests.support.cases import LAYERS, Case, draw
from tests.support.implementations import SelectKernels
from tests.support.numba_cases import SIZES, needs_numba, python
from tests.support.streaming import MATRIX, assert_streams, assert_streams_apart, make, stream
from tests.support.targets import normal
from xprnn import kernels
from xprnn.backend import processors

pytestmark = needs_numba

NUMPY = xprnn.get_backend("numpy")
switch_threads_often = in_memory.switch_threads_often


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Automatic selection with one thread of the BLAS."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    kernels.forget_plans()
    yield
    kernels.forget_plans()


# -- by value


@pytest.mark.parametrize("case", [c for c in MATRIX if not c.compute_dtype], ids=str)
def test_every_cell(case: Case) -> None:
    layer = make(case)
    assert "one step: sequence" in layer.stepper(case.N).explain()
    assert_streams(case, layer)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", LAYERS)
def test_sizes(cell: str, dtype: str, layers: int) -> None:
    for N, I, H in SIZES:  # noqa: E741
        case = Case(cell, layers=layers, dtype=dtype, N=N, I=I, H=H)
        assert_streams(case, make(case))


def test_unusual_memory_layouts() -> None:
    """x read-only, unaligned or strided, and x and out that share memory."""
    layer, x = xprnn.GRU(5, 5, 2, seed=0), normal(0, 3, 5).astype("f4")
    expected = layer.stepper(3).step(x)
    unaligned = np.zeros(61, np.uint8)[1:].view(np.float32).reshape(3, 5)
    unaligned[...] = x
    unaligned.flags.writeable = False
    strided = np.repeat(x, 2, axis=1)[:, ::2]
    for x_like in (unaligned, strided, np.asfortranarray(x)):
        np.testing.assert_array_equal(layer.stepper(3).step(x_like), expected)
    raw = np.zeros(61, np.uint8)[1:].view("f4")
    for out in (np.zeros((5, 6), "f4").T[::2], raw.reshape(3, 5), x[::-1]):
        assert layer.stepper(3).step(x, out=out) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("cell", LAYERS)
def test_two_runs_give_the_same_bits(cell: str) -> None:
    case = Case(cell, layers=3, dtype="float32", N=9, H=37)
    layer, x = make(case), draw(case).x
    np.testing.assert_array_equal(stream(layer.stepper(9), x), stream(layer.stepper(9), x))


# -- the tests of the other implementations


@pytest.mark.parametrize("case", by_value.STACKS, ids=str)
def test_a_sequence_continues_in_a_stepper(case: Case) -> None:
    by_value.test_a_sequence_continues_in_a_stepper_and_back_in_the_layer(case)


@pytest.mark.parametrize("way", by_value.WAYS)
@pytest.mark.parametrize("cell", LAYERS)
def test_a_copy_continues_independently(cell: str, way: str) -> None:
    by_value.test_a_copy_continues_independently(cell, way)


WRITING = [*in_memory.WAYS, "an optimiser", "a frozen layer's other parameters"]


@pytest.mark.parametrize("way", WRITING)
@pytest.mark.parametrize("cell", LAYERS)
def test_written_parameters_take_effect(cell: str, way: str) -> None:
    in_memory.test_written_parameters_take_effect_at_the_next_step(cell, way, None, NUMPY)


def test_a_moved_layer_needs_a_new_stepper(fake_cupy: Any) -> None:
    with xprnn.use_kernels("auto"):  # `fake_cupy` forces the plain code
        in_memory.test_a_moved_layer_needs_a_new_stepper(fake_cupy)


def test_a_step_inside_a_writable_block_is_refused() -> None:
    in_memory.test_a_step_inside_a_writable_block_is_refused()


@pytest.mark.parametrize("N", [1, 8])
@pytest.mark.parametrize("cell", LAYERS)
def test_a_step_allocates_no_array(cell: str, N: int) -> None:
    in_memory.test_a_step_allocates_no_array(cell, N)


def test_out_is_written_and_returned_and_results_are_copies() -> None:
    in_memory.test_out_is_written_and_returned_and_results_are_copies(NUMPY)


@pytest.mark.parametrize("cell", LAYERS)
def test_steppers_of_one_layer_run_in_different_threads(
    cell: str, switch_threads_often: None
) -> None:
    in_memory.test_steppers_of_one_layer_run_in_different_threads(cell, switch_threads_often)


@pytest.mark.parametrize("cell", LAYERS)
def test_each_stream_equals_its_own_sequence(cell: str) -> None:
    case = Case(cell, layers=2)
    assert_streams_apart(case, make(case))


@pytest.mark.parametrize("rows", in_streams.ROWS.values(), ids=in_streams.ROWS.keys())
@pytest.mark.parametrize("cell", LAYERS)
def test_waiting_rows_keep_their_bits(cell: str, rows: Any) -> None:
    in_streams.test_waiting_rows_keep_their_bits(cell, rows, NUMPY)


@pytest.mark.parametrize("wrong", in_streams.WRONG.values(), ids=in_streams.WRONG.keys())
def test_invalid_arguments_change_nothing(wrong: in_streams.Wrong) -> None:
    in_streams.assert_refused(NUMPY, wrong)


def test_reset_clears_nan_from_a_row() -> None:
    in_streams.test_reset_clears_nan_from_a_row()


# -- threads and processes


def test_two_steppers_run_concurrently() -> None:
    """The compiled step releases the interpreter's lock; each thread has its own streams."""
    layer = xprnn.LSTM(64, 64, 3, seed=0)
    inputs = [normal(k, 300, 2, 64).astype("f4") for k in range(2)]
    expected = [stream(layer.stepper(2), x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(lambda x: stream(layer.stepper(2), x), inputs))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_use_works() -> None:
    code = """
import os, numpy as np, xprnn
layer = xprnn.GRU(3, 24, 2, seed=0)
stepper, other, x = layer.stepper(4), layer.stepper(4), np.ones((4, 3), "f")
assert "sequence" in stepper.explain().splitlines()[0]
for one in (stepper, other):
    one.step(x)
expected = other.step(x)
child = os.fork()
if child == 0:
    late = xprnn.LSTM(3, 24, seed=0).stepper(4).step(x)  # not compiled before the fork
    os._exit(0 if np.array_equal(stepper.step(x), expected) and np.isfinite(late).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), np.array_equal(stepper.step(x), expected))
"""
    assert python(code, OMP_NUM_THREADS="1").split() == ["0", "True"]


# -- the selected implementation


def test_explain_names_the_implementation_and_the_reason(select_kernels: SelectKernels) -> None:
    layer = xprnn.GRU(3, 4, 2, seed=0)
    assert layer.stepper(2).explain().splitlines() == [
        "GRU(3, 4) on numpy, float32, L=2 N=2, one step: sequence",
        "  reason: the fastest that fits",
        "  one call runs a step of all layers, on weights packed for it",
    ]
    select_kernels("reference")
    text = layer.stepper(2).explain()
    assert re.search("one step: reference\n  reason: .*reference", text)
    assert "its array calls are captured and replayed" in text
    select_kernels("sequence")
    assert re.search("  reason: .*sequence", layer.stepper(2).explain())


@pytest.mark.parametrize(
    ("N", "threads", "selected"),
    [(1, 1, "sequence"), (1, 2, "reference"), (8, 4, "sequence"), (8, 5, "reference")],
)
def test_work_for_many_threads_selects_the_blas(
    N: int, threads: int, selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "processors", lambda: 8)
    monkeypatch.setattr(processors, "_libraries", list)  # ignores the limits of this machine's BLAS
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", str(threads))
    lines = xprnn.GRU(64, 1024, 2, seed=0).stepper(N).explain().splitlines()
    assert lines[0].endswith(f"one step: {selected}")
    if selected == "reference":
        why = f"the products are faster on the BLAS's {threads} threads"
        assert lines[-1] == f"  sequence: N={N} I=1024 H=1024: {why}"
    small = xprnn.GRU(64, 64, 2, seed=0).stepper(N)
    assert small.explain().splitlines()[0].endswith("one step: sequence")


def test_low_precision_selects_the_reference_code_with_a_reason(
    select_kernels: SelectKernels,
) -> None:
    layer = xprnn.GRU(3, 4, seed=0, compute_dtype="float16")
    why = "the CPU's kernels compute in float32 or float64, not in float16"
    lines = layer.stepper(2).explain().splitlines()
    assert lines[0].endswith("one step: reference") and lines[-1] == f"  sequence: {why}"
    select_kernels("sequence")
    with pytest.raises(xprnn.KernelUnavailableError, match=rf"sequence\W*: {why}"):
        layer.stepper(2)


def test_without_numba_explain_names_the_reference_code_and_the_reason(
    without_numba: None, select_kernels: SelectKernels
) -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    lines = layer.stepper(2).explain().splitlines()
    assert lines[0].endswith("one step: reference")
    assert lines[-1].startswith("  sequence: ") and lines[-1].endswith("pip install xprnn[numba]")
    select_kernels("sequence")
    with pytest.raises(xprnn.KernelUnavailableError, match=r"pip install xprnn\[numba\]"):
        layer.stepper(2)


def test_the_forced_reference_code_imports_no_numba() -> None:
    code = """
import sys, numpy as np, xprnn
xprnn.GRU(3, 4, seed=0).stepper(2).step(np.ones((2, 3), "f"))
print("numba" in sys.modules)
"""
    assert python(code, XPRNN_KERNELS="reference").strip() == "False"
