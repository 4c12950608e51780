"""Each kind of kernel once, at small, odd sizes, against float64: what a GPU is to show first.

The fake CuPy runs a kind of each way. Kernels that wait for no other block come with the layers:
the element-wise ones serve the same call.
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
STEPWISE = [  # no launch takes all steps
    (cell, numbers)
    for cell in LAYERS
    for numbers in PRECISIONS
    if (cell, "forward") not in KERNELS or numbers == "float64"
]


def marks(kind: Kind) -> list[pytest.MarkDecorator]:
    return [pytest.mark.frozen] if kind.way in kinds.FROZEN else []


def found(kind: Kind, backend: Backend) -> dict[str, tuple[float, float]]:
    """By kernels the error of the array that does worst, and its limit; a fault is infinite."""
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


def compare(kind: Kind, backend: Backend, asked: str) -> None:
    """Fail unless all kernels of a kind are right, and what is asked for with them."""
    errors = found(kind, backend)
    assert asked in errors
    for name, (error, limit) in errors.items():
        for listen in tolerances.listeners:
            listen(kind.operand_type, error, limit, f"{name} {kind}")
        assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.2e}"


def asked(kind: Kind) -> str:
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
    compare(kind, gpu, asked(kind))


@pytest.mark.gpu
@pytest.mark.parametrize(("cell", "numbers"), STEPWISE)
def test_what_is_taken_step_by_step(cell: str, numbers: str, gpu: Backend) -> None:
    compare(Kind(kinds.LAYER, cell, numbers), gpu, "pointwise")


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
    compare(kind, fake, asked(kind))
    assert function.launches


@needs_compiler
@each_way
def test_a_kernel_that_does_nothing_is_found(
    kind: Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = installed(kind, monkeypatch)
    monkeypatch.setattr(function, "__call__", lambda *given, **options: None)
    with pytest.raises(AssertionError, match=r"relative error|is not finite|is off by"):
        compare(kind, fake, asked(kind))


@needs_compiler
@each_way
def test_a_kind_is_launched_for_each_of_its_works(
    kind: Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compute-sanitizer looks at."""
    function = installed(kind, monkeypatch)
    kind.launch(fake)
    names = [name.removeprefix("xprnn::").partition("<")[0] for name, _ in function.launches]
    cell = kind.cell.partition("_")[0]
    steps_back = [] if kind.way == kinds.WAVE else [f"{cell}_backward"]
    whole = [f"{cell}_forward", f"{cell}_forward", *steps_back]
    assert names == (["stack_step"] if kind.way == kinds.STEP else whole)
    slices = 4 if kind.way == kinds.CLUSTER else 3  # of 16 units each, in whole clusters
    deep = 2 if kind.way in (kinds.BOTH, kinds.WAVE) else 1
    grid = (1, 11) if kind.way == kinds.STEP else (slices, 1, deep)
    assert {grid for _, grid in function.launches} == {grid}


def test_there_is_a_kind_for_every_kernel() -> None:
    every = kinds.kinds()
    assert len({*every}) == len(every)
    ways = [kind.way for kind in every]
    assert ways == sorted(ways, key=kinds.WAYS.index) and {*ways} == {*kinds.WAYS}
    pairs = {(cell, numbers) for (cell, _), k in KERNELS.items() for numbers in k.tilings}
    for way in (kinds.LAYER, kinds.BOTH, kinds.WAVE):
        assert {kind[1:3] for kind in every if kind.way == way} == pairs
    shared = {
        (cell, numbers)
        for (cell, _), kernel in KERNELS.items()
        for numbers, tilings in kernel.tilings.items()
        if any(tiling.cluster > 1 for tiling in tilings)
    }
    assert {kind[1:3] for kind in every if kind.way == kinds.CLUSTER} == shared
    assert all(size % 2 for size in (kinds.T, kinds.N, kinds.I, kinds.H, *kinds.STREAMS))
    before = dict(KERNELS)
    with kinds.only_clusters("gru", "bfloat16"):
        assert before != KERNELS
    assert before == KERNELS
