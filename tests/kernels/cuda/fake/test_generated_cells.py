"""Cells of definitions by generated kernels on the fake CuPy, against plain evaluation in float64.

The kernels are compiled for the host, and products are computed by the fake gemmEx.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers import test_defined_layers as layers
from tests.layers.test_defined_layers import NAMES, Case, Problem, Results, build, check, run
from tests.support.cases import move
from tests.support.definitions import DEFINITIONS
from tests.support.emulator.elementwise import ROW_THREADS, needs_compiler
from tests.support.fake_cupy import cuda
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.implementations import SelectKernels
from tests.support.tolerances import assert_close
from tests.unit.test_random_definitions import random_definition
from xprnn.backend import Backend
from xprnn.kernels.codegen.cuda import KernelCall
from xprnn.kernels.cuda import generated as generated_cells
from xprnn.kernels.cuda import loading
from xprnn.kernels.cuda.generated import generated_cell

pytestmark = needs_compiler

TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))
LENGTHS = {"steps": 6, "layers": 2}


@pytest.fixture(autouse=True)
def generated(fake_cupy: Backend, select_kernels: SelectKernels) -> None:
    """Generated kernels on the fake CuPy."""
    select_kernels("pointwise")


def rounded(problem: Problem, *dtypes: str) -> Problem:
    """The same problem with values that are numbers of these dtypes, in the first one."""

    def as_numbers(array: np.ndarray) -> np.ndarray:
        for dtype in dtypes[::-1]:
            array = array.astype(BFLOAT16 if dtype == "bfloat16" else dtype)
        return array

    result = object.__new__(Problem)
    result.x, result.doutput = as_numbers(problem.x), as_numbers(problem.doutput)
    result.states = [as_numbers(state) for state in problem.states]
    result.dstates = [as_numbers(dstate) for dstate in problem.dstates]
    result.inputs = {name: as_numbers(value) for name, value in problem.inputs.items()}
    return result


def by_plain_code(case: Case, layer: Any, problem: Problem, **options: Any) -> Results:
    """The same by the plain code on NumPy, in float64 if there are no options."""
    plain = build(case, **options)
    dtype = options.get("dtype", "float64")
    state = {name: xprnn.to_numpy(p).astype(dtype) for name, p in layer.state_dict().items()}
    plain.load_state_dict(state)
    with xprnn.use_kernels("reference"):
        results = run(case, plain, rounded(problem, dtype))
    return {name: value.astype("float64") for name, value in results.items()}


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_equal_torch(name: str, fake_cupy: Backend) -> None:
    case = Case(name, layers=2, directions=2)
    check(case, fake_cupy.name)
    assert LOG.kernels > 0
    check(replace(case, lengths=None, bias=False, states=False), fake_cupy.name)
    check(replace(case, batch_first=True, directions=1), fake_cupy.name)


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_type(name: str, dtype: str, compute_dtype: str | None, fake_cupy: Backend) -> None:
    if compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    case = Case(name, layers=2, directions=2, H=9, N=5, lengths=(4, 0, 6, 2, 5))
    layer = build(case, fake_cupy.name, dtype=dtype, compute_dtype=compute_dtype)
    problem = rounded(Problem(case, layer), dtype, compute_dtype or dtype)
    options = {}
    if compute_dtype and layer._spec.cell.has_kinks:  # rounding decides on which side
        options = {"dtype": dtype, "compute_dtype": compute_dtype}
    expected = by_plain_code(case, layer, problem, **options)
    actual = run(case, layer, problem)
    for key, values in expected.items():
        assert_close(actual[key], values, dtype, f"{case}: {key}", compute_dtype, **LENGTHS)


@pytest.mark.parametrize("seed", range(8))
def test_random_definitions(seed: int, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DEFINITIONS, "random", random_definition(random.Random(seed)))
    case = Case("random", directions=2)
    layer = build(case, fake_cupy.name)
    problem = Problem(case, layer)
    expected, actual = by_plain_code(case, layer, problem), run(case, layer, problem)
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-9, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_edge_sizes(name: str, fake_cupy: Backend) -> None:
    for sizes in ({"T": 0}, {"T": 1}, {"N": 1}, {"N": 0}, {"H": 1}, {"H": 130, "N": 2}):
        case = Case(name, lengths=None, **sizes)
        layer = build(case, fake_cupy.name)
        problem = Problem(case, layer)
        expected, actual = by_plain_code(case, layer, problem), run(case, layer, problem)
        for key, values in expected.items():
            what = f"{sizes}: {key}"
            np.testing.assert_allclose(actual[key], values, rtol=1e-10, atol=1e-9, err_msg=what)


@pytest.mark.parametrize("name", NAMES)
def test_steppers_cells_and_segments_equal_the_sequence(name: str, fake_cupy: Backend) -> None:
    layers.test_a_stepper_equals_the_sequence(name, fake_cupy)
    case = Case(name, layers=2, directions=2)
    layer, other = build(case, fake_cupy.name), build(case, fake_cupy.name, recompute=4)
    problem = Problem(case, layer)
    layers.assert_equal(run(case, other, problem), run(case, layer, problem), layers.REORDERED)
    cell = xprnn.RecurrentCell(
        DEFINITIONS[name], 3, 4, backend=fake_cupy.name, dtype="float64", **case.sizes
    )
    one = build(replace(case, layers=1, directions=1), fake_cupy.name).eval()
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in one.state_dict().items()})
    x = move(fake_cupy, problem.x)
    inputs = {n: move(fake_cupy, value) for n, value in problem.inputs.items()}
    output, _ = one(x, **inputs)
    states = None
    for t in range(case.T):
        states = cell(x[t], states, **{n: value[t] for n, value in inputs.items()})
        h = layers.as_tuple(states)[0]
        np.testing.assert_allclose(
            xprnn.to_numpy(h), xprnn.to_numpy(output[t]), rtol=0, atol=layers.REORDERED
        )


class ReverseOrder(cuda.ElementwiseKernel):
    """Runs the threads in reverse order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernel.backwards = True


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_threads_does_not_matter(
    name: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(name)
    layer = build(case, fake_cupy.name)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    layer._calls = 0  # the counter of the masks
    layer.zero_grad()
    monkeypatch.setattr(type(layer.backend.xp), "ElementwiseKernel", ReverseOrder)
    actual = run(case, layer, problem)
    for key, values in expected.items():
        np.testing.assert_array_equal(actual[key], values, err_msg=key)


# -- launches

LAUNCHES = {  # of a step forward and backward, in float32 and in low precision
    **dict.fromkeys(("min_gru", "min_lstm"), (1, 1, 1, 1)),
    **dict.fromkeys(
        ("li_gru", "gru", "hard_gru", "lstm", "onnx_lstm", "slstm", "continuous", "zoneout"),
        (2, 2, 2, 2),
    ),
    **dict.fromkeys(("layer_norm_lstm", "layer_norm_gru"), (2, 2, 2, 2)),
    "recurrent_dropout": (3, 3, 3, 3),
    **dict.fromkeys(("gru2014", "multiplicative_lstm"), (4, 4, 4, 4)),
    "projected": (4, 4, 4, 5),  # dh is rounded before a product
    "every_function": (6, 6, 6, 7),
    "awkward": (7, 7, 8, 8),
}


def counted(layer: Any, case: Case) -> list[tuple[int, int]]:
    """The launches of forward and of backward, and the arrays that they allocate."""
    problem = rounded(Problem(case, layer), "float32")
    backend, result = layer.backend, []
    x, doutput = move(backend, problem.x), move(backend, problem.doutput)
    states = layers.bare([move(backend, state) for state in problem.states])
    dstates = layers.bare([move(backend, state) for state in problem.dstates])
    inputs = {name: move(backend, value) for name, value in problem.inputs.items()}
    for call in (lambda: layer(x, states, **inputs), lambda: layer.backward(doutput, dstates)):
        LOG.clear()
        call()
        result.append((LOG.launches, len(LOG.memory)))
    return result


@pytest.mark.parametrize("compute_dtype", [None, "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_launches_of_a_step(name: str, compute_dtype: str | None, fake_cupy: Backend) -> None:
    """As `explain` states them; one more step allocates nothing."""
    counts = []
    for T in (9, 4):
        case = Case(name, T=T, lengths=None)
        layer = build(case, fake_cupy.name, dtype="float32", compute_dtype=compute_dtype)
        for _ in range(3):  # until the workspace has its final size
            count = counted(layer, case)
        counts.append(count)
    (forward, backward), arrays = np.transpose(np.subtract(*counts))
    text = layer.explain((4, 4, 3))
    found = re.search(r"takes (\d+) launches forward, (\d+) backward and one more", text)
    assert found, text
    expected = LAUNCHES[name][2:] if compute_dtype else LAUNCHES[name][:2]
    assert (int(found[1]), int(found[2])) == expected
    assert (forward, backward - 5) == (5 * expected[0], 5 * expected[1])
    assert not arrays.any()


def test_explain(fake_cupy: Backend) -> None:
    layer = build(Case("li_gru"), fake_cupy.name)
    text = layer.explain((6, 4, 3))
    assert re.search(r": pointwise$", text.splitlines()[0])
    assert "  sequence: none are generated for definitions until a GPU has run" in text
    for name in ("sequence", "wave"):
        with (
            xprnn.use_kernels(name),
            pytest.raises(xprnn.KernelUnavailableError, match=name),
        ):
            layer.explain((6, 4, 3))
    with xprnn.use_kernels("auto"):
        assert re.search(r": pointwise$", layer.explain((6, 4, 3)).splitlines()[0])


def test_one_kernel_is_for_all_sizes() -> None:
    sources = [
        [
            step.source
            for step in generated_cell(
                DEFINITIONS["zoneout"].cell(H, {}, {}, True), True, False
            )._forward.steps
            if isinstance(step, KernelCall)
        ]
        for H in (5, 16)
    ]
    assert sources[0] == sources[1]


def test_a_block_is_a_row_in_both_languages() -> None:
    found = re.search(r"constexpr int THREADS = (\d+);", loading.text("rows.h"))
    assert found
    assert int(found[1]) == generated_cells.THREADS == ROW_THREADS


def test_a_barrier_is_between_the_operations_of_a_row() -> None:
    """What no thread of the host can see."""
    cell = generated_cell(DEFINITIONS["layer_norm_lstm"].cell(8, {}, {}, True), True, False)
    kernels = [
        step.source.text
        for step in (*cell._forward.steps, *cell._backward.steps)
        if isinstance(step, KernelCall)
    ]
    assert len(kernels) == 2
    for text, count in zip(kernels, (9, 10), strict=True):
        lines = text.splitlines()
        blocks = [k for k, line in enumerate(lines) if re.fullmatch(r"  (for|if|\{).*", line)]
        assert len(blocks) == count  # six sums over a row, and element-wise loops
        assert all(lines[k - 1] == "  sync_row();" for k in blocks[1:])
