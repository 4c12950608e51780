"""Each kind of kernel once, at small, odd sizes, against float64: the first tests on a GPU.

The fake CuPy runs one kind of each way. Kernels that wait for no other block are checked with the
layers: the pointwise kernels are part of the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

import xprnn
from benchmarks.device import kinds, stacks, steps
from benchmarks.device.kinds import Kind
from benchmarks.device.problems import StackProblem, StepProblem
from tests.support import tolerances
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy import sequence as fake_sequence
from tests.support.fake_cupy import stack_step as fake_stack
from tests.support.implementations import SelectKernels
from tests.support.pointwise_cases import needs_dtype
from xprnn.backend import Backend
from xprnn.diagnostics.tolerances import EPSILON
from xprnn.diagnostics.verification.comparison import check
from xprnn.diagnostics.verification.suite import LAYERS, PRECISIONS
from xprnn.kernels.cuda import loading
from xprnn.kernels.cuda.plan import plan
from xprnn.kernels.cuda.table import KERNELS

FAKE = {  # on the fake CuPy
    kinds.LAYER: Kind(kinds.LAYER, "gru", "float32"),
    kinds.BOTH: Kind(kinds.BOTH, "lstm", "float16"),
    kinds.STEP: Kind(kinds.STEP, "lstm", "bfloat16", 3),
    kinds.CLUSTER: Kind(kinds.CLUSTER, "rnn_tanh", "tf32"),
    kinds.WAVE: Kind(kinds.WAVE, "gru", "float32"),
}
STEPWISE = [  # without a sequence kernel
    (cell, operand_type)
    for cell in LAYERS
    for operand_type in PRECISIONS
    if (cell, "forward") not in KERNELS or operand_type == "float64"
]


def marks(kind: Kind) -> list[pytest.MarkDecorator]:
    return [pytest.mark.frozen] if kind.way in kinds.FROZEN else []


def errors_by_kernel(kind: Kind, backend: Backend) -> dict[str, tuple[float, float]]:
    """For each kernel the error of the worst array, and its limit; a failure is infinite."""
    if kind.way in (kinds.STEP, kinds.WAVE):
        sizes = kind.cell, kind.operand_type, kind.N, kinds.H
        if kind.way == kinds.STEP:
            rows, absent = steps.compared(StepProblem(*sizes, kinds.LAYERS), backend)
        else:
            rows, absent = stacks.compared(StackProblem(*sizes, kinds.T, kinds.LAYERS), backend)
        assert not absent
        wrong = {row["kernels"]: row["wrong"] for row in rows if row["wrong"]}
        assert not wrong
        return {row["kernels"]: (row["error"], row["limit"]) for row in rows}
    with kind.planned():
        layer = kind.layer(backend)
        checked, _ = check(layer, (kinds.T, kind.N, kinds.I), None, 0, differences=False)
    unit = EPSILON[kind.operand_type]
    return {row.implementation: (row.error * unit, row.limit * unit) for row in checked}


def compare(kind: Kind, backend: Backend, kernel: str) -> None:
    """Fail unless this kernel has run and all kernels of a kind are accurate."""
    errors = errors_by_kernel(kind, backend)
    assert kernel in errors
    for name, (error, limit) in errors.items():
        for listen in tolerances.listeners:
            listen(kind.operand_type, error, limit, f"{name} {kind}")
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.2e}"


def expected_kernel(kind: Kind) -> str:
    return "wave" if kind.way == kinds.WAVE else "sequence"


# -- on a GPU: plain sequence kernels first, frozen ones last


@pytest.fixture
def gpu(select_kernels: SelectKernels) -> Backend:
    select_kernels("sequence")
    try:
        return xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=marks(kind), id=str(kind)) for kind in kinds.kinds()]
)
def test_a_kind_of_kernel(kind: Kind, gpu: Backend) -> None:
    compare(kind, gpu, expected_kernel(kind))


@pytest.mark.gpu
@pytest.mark.parametrize(("cell", "operand_type"), STEPWISE)
def test_a_cell_without_a_sequence_kernel(cell: str, operand_type: str, gpu: Backend) -> None:
    compare(Kind(kinds.LAYER, cell, operand_type), gpu, "pointwise")


# -- on the fake CuPy


@pytest.fixture
def fake(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Iterator[Backend]:
    select_kernels("sequence")
    for module in (steps, stacks):
        monkeypatch.setattr(module, "poisoned", lambda backend: nullcontext())
    loading.kernel.cache_clear()
    plan.cache_clear()
    yield fake_cupy
    loading.kernel.cache_clear()
    plan.cache_clear()


each_way = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=marks(kind), id=str(kind)) for kind in FAKE.values()]
)


def installed(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> type:
    """The fake kernels that this kind launches."""
    needs_dtype("bfloat16" if kind.operand_type == "bfloat16" else "float32")
    module = fake_stack if kind.way == kinds.STEP else fake_sequence
    module.install(monkeypatch)
    return module.Function


@needs_compiler
@each_way
def test_a_kind_on_the_fake_cupy(
    kind: Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = installed(kind, monkeypatch)
    compare(kind, fake, expected_kernel(kind))
    assert function.launches


@needs_compiler
@each_way
def test_a_kernel_that_does_nothing_is_detected(
    kind: Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = installed(kind, monkeypatch)
    monkeypatch.setattr(function, "__call__", lambda *args, **options: None)
    with pytest.raises(AssertionError, match=r"relative error|is not finite|is off by"):
        compare(kind, fake, expected_kernel(kind))


@needs_compiler
@each_way
def test_each_kernel_of_a_kind_is_launched(
    kind: Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches that compute-sanitizer checks."""
    function = installed(kind, monkeypatch)
    kind.launch(fake)
    names = [name.removeprefix("xprnn::").partition("<")[0] for name, _ in function.launches]
    cell = kind.cell.partition("_")[0]
    steps_back = [] if kind.way == kinds.WAVE else [f"{cell}_backward"]
    sequence_kernels = [f"{cell}_forward", f"{cell}_forward", *steps_back]
    assert names == (["stack_step"] if kind.way == kinds.STEP else sequence_kernels)
    slices = 4 if kind.way == kinds.CLUSTER else 3  # of 16 units each, in whole clusters
    deep = 2 if kind.way in (kinds.BOTH, kinds.WAVE) else 1
    grid = (1, 11) if kind.way == kinds.STEP else (slices, 1, deep)
    assert {grid for _, grid in function.launches} == {grid}


def test_there_is_a_kind_for_every_kernel() -> None:
    every = kinds.kinds()
    assert len({*every}) == len(every)
    ways = [kind.way for kind in every]
    assert ways == sorted(ways, key=kinds.WAYS.index) and {*ways} == {*kinds.WAYS}
    pairs = {(cell, operand_type) for (cell, _), k in KERNELS.items() for operand_type in k.tilings}
    for way in (kinds.LAYER, kinds.BOTH, kinds.WAVE):
        assert {kind[1:3] for kind in every if kind.way == way} == pairs
    shared = {
        (cell, operand_type)
        for (cell, _), kernel in KERNELS.items()
        for operand_type, tilings in kernel.tilings.items()
        if any(tiling.cluster > 1 for tiling in tilings)
    }
    assert {kind[1:3] for kind in every if kind.way == kinds.CLUSTER} == shared
    assert all(size % 2 for size in (kinds.T, kinds.N, kinds.I, kinds.H, *kinds.STREAMS))
    before = dict(KERNELS)
    with kinds.only_clusters("gru", "bfloat16"):
        assert before != KERNELS
    assert before == KERNELS
