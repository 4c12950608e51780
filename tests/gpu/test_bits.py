"""Two runs on a GPU give the same bits: forward, backward and three steps of an optimiser.

Also after other work, on another stream, and on another device of the same kind. While several
streams are active, cuBLAS gives the same bits only with a workspace per stream, which must be
configured (https://docs.nvidia.com/cuda/cublas/#results-reproducibility); without it the results
are as accurate.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

import xprnn
from tests.support.cases import LAYERS, Case, Results, build, by_name, draw, move, numpy_run, run
from tests.support.tolerances import assert_close
from xprnn.backend import Backend

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]

TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))
each_type = pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES, ids=str)
each_cell = pytest.mark.parametrize("cell", LAYERS)
WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
ROUNDS = 5


def case_of(cell: str, dtype: str = "float32", compute_dtype: str | None = None) -> Case:
    if compute_dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    sizes = {"T": 20, "N": 33, "I": 19, "H": 65}
    dropout = {"layers": 2, "directions": 2, "dropout": 0.25}
    return Case(cell, dtype=dtype, compute_dtype=compute_dtype, **dropout, **sizes)


def train(case: Case, backend_name: str, steps: int = 3) -> dict[str, bytes]:
    """The bits of all results and gradients of some steps, and of the parameters after them."""
    layer, problem = build(case, backend_name), draw(case)
    optimizer = xprnn.optim.AdamW([layer], lr=1e-2)
    x, doutput, *states = (
        move(layer.backend, array) for array in (problem.x, problem.doutput, *problem.initial)
    )
    hx = states[0] if len(states) == 1 else tuple(states)
    lengths = [(7 * row) % (case.T + 1) for row in range(case.N)]
    arrays: dict[str, Any] = {}
    for step in range(steps):
        optimizer.zero_grad()
        output, final = layer(x, hx, lengths=lengths)
        dx, dinitial = layer.backward(doutput, hx)
        arrays |= {f"output {step}": output, f"dx {step}": dx}
        arrays |= {f"{name} {step}": a for name, a in by_name(case, final, dinitial).items()}
        arrays |= {f"gradients {step}": layer.grads.flat.copy()}
        xprnn.optim.clip_grad_norm([layer], 1.0)
        optimizer.step()
        arrays |= {f"parameters {step}": layer.parameters.flat.copy()}
    return {name: xprnn.to_numpy(array).tobytes() for name, array in arrays.items()}


def assert_same_bits(actual: dict[str, bytes], expected: dict[str, bytes]) -> None:
    differ = [name for name, bits in expected.items() if actual[name] != bits]
    assert actual.keys() == expected.keys() and not differ, f"other bits: {', '.join(differ)}"


def other_work(backend: Backend) -> None:
    """Leave other values in the memory that is allocated next, and other shapes in caches."""
    for size in (10, 10_000, 3_000_000):
        backend.xp.full(size, backend.xp.nan)
    case = Case("lstm", N=70, H=129)
    run(build(case, backend.name), case, draw(case))


@each_type
@each_cell
def test_two_runs(
    cell: str,
    dtype: str,
    compute_dtype: str | None,
    backend: Backend,
    implementation: str,
) -> None:
    case = case_of(cell, dtype, compute_dtype)
    first = train(case, backend.name)
    assert_same_bits(train(case, backend.name), first)
    other_work(backend)
    assert_same_bits(train(case, backend.name), first)
    with backend.xp.cuda.Stream(non_blocking=True):
        assert_same_bits(train(case, backend.name), first)


def test_other_numbers_give_other_bits(backend: Backend) -> None:
    first = train(case_of("gru"), backend.name)
    with pytest.raises(AssertionError, match="other bits: output 0"):
        assert_same_bits(train(case_of("gru", "float64"), backend.name), first)


@each_cell
def test_every_device(cell: str, backend: Backend) -> None:
    """Devices other than the first give its bits, whichever is current."""
    runtime = backend.xp.cuda.runtime
    count = runtime.getDeviceCount()
    if count == 1:
        pytest.skip("one device only")
    kinds = [runtime.getDeviceProperties(device)["name"] for device in range(count)]
    first = train(case_of(cell), "cupy:0")
    for device in range(1, count):
        actual = train(case_of(cell), f"cupy:{device}")
        if kinds[device] == kinds[0]:
            assert_same_bits(actual, first)
        case = Case(cell, layers=2)
        layer, problem = build(case, f"cupy:{device}"), draw(case)
        expected = numpy_run(case, layer, problem)
        for name, array in run(layer, case, problem).items():
            assert_close(array, expected[name], case.dtype, f"cupy:{device} {name}")


# -- two threads, each with a stream


def in_two_threads(work: Callable[[str], Any]) -> list[Any]:
    """The results of repeated calls of `work(cell)` for two cells concurrently on two streams."""
    streams = xprnn.get_backend("cupy").xp.cuda.Stream
    start = Barrier(2)

    def run_cell(cell: str) -> list[Any]:
        stream: AbstractContextManager[Any] = streams(non_blocking=True)
        start.wait()
        with stream:
            return [work(cell) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_cell, ("gru", "lstm")))


def results(cell: str) -> Results:
    case = case_of(cell, "float64")
    return run(build(case, "cupy"), case, draw(case))


def test_two_threads(backend: Backend) -> None:
    for cell, rounds in zip(("gru", "lstm"), in_two_threads(results), strict=True):
        case = case_of(cell, "float64")
        expected = numpy_run(case, build(case, backend.name), draw(case))
        for each in rounds:
            for name, array in each.items():
                assert_close(array, expected[name], "float64", f"{cell} {name}")


def compare_threads() -> None:
    """Fail unless threads give the bits of a run alone; the environment needs `WORKSPACES`."""
    alone = {cell: train(case_of(cell), "cupy") for cell in ("gru", "lstm")}
    rounds = in_two_threads(lambda cell: train(case_of(cell), "cupy"))
    for each, cell in zip(rounds, alone, strict=True):
        for bits in each:
            assert_same_bits(bits, alone[cell])


def test_two_threads_with_a_workspace_per_stream(backend: Backend) -> None:
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", "from tests.gpu import test_bits; test_bits.compare_threads()"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **WORKSPACES},
    )
    assert done.returncode == 0, done.stderr
