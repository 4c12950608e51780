"""A stepper's step in one launch of a kernel, called by the package and run on the emulator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import Case, draw, move
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Run
from tests.support.fake_cupy.array import FakeModule
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.fake_cupy.stack_step import Function, install
from tests.support.implementations import SelectKernels
from tests.support.streaming import (
    assert_same,
    assert_streams,
    assert_streams_apart,
    expected,
    make,
    on_host,
    sides,
    stream,
)
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels.cuda.loading import kernel
from xprnn.kernels.cuda.stack_step import UNITS

pytestmark = needs_compiler

PROCESSORS = 2  # with nine units or more, a warp computes several
CASES = [
    replace(
        Case(cell, layers, bias=bias, dtype="float32", T=4), compute_dtype=compute_dtype, **sizes
    )
    for cell in UNITS
    for compute_dtype in (None, "float16", "bfloat16")
    for layers, bias, sizes in (
        (1, True, {"N": 1, "I": 3, "H": 5}),
        (3, False, {"N": 3, "I": 12, "H": 5}),
        (1, True, {"N": 2, "I": 300, "H": 5}),
        (2, True, {"N": 8, "I": 40, "H": 33}),
    )
    if bias or cell != "rnn_relu" or not compute_dtype  # rounding decides at its kink
]
# a thread loads several items of a matrix or of x, more than are in flight at once (words,
# vectors); every number of rows
WIDE = [
    replace(Case(cell, 2, dtype="float32", T=2), compute_dtype=compute_dtype, **sizes)
    for cell, compute_dtype, sizes in (
        ("gru", None, {"N": 8, "I": 300, "H": 129}),
        ("lstm", "bfloat16", {"N": 8, "I": 20, "H": 68}),
        ("rnn_tanh", None, {"N": 8, "I": 5, "H": 516}),
        *[("gru", None, {"N": N, "I": 6, "H": 7}) for N in range(2, 8)],
    )
]


@pytest.fixture
def device(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Iterator[Backend]:
    """The fake CuPy with a small device; the kernel for a step of all layers is forced."""
    install(monkeypatch, multiProcessorCount=PROCESSORS)
    select_kernels("sequence")
    kernel.cache_clear()
    yield fake_cupy
    kernel.cache_clear()


def shaped(case: Case) -> str:
    return f"{case}-N{case.N}-I{case.I}-H{case.H}"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=shaped)
def test_steps_match_the_reference(
    case: Case, seed: int, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    monkeypatch.setattr(Function, "run", Run(seed))
    assert_streams(case, make(case, device.name))
    assert len(Function.launches) == case.T


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=shaped)
def test_steps_on_a_gpu_match_the_reference(case: Case, select_kernels: SelectKernels) -> None:
    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    select_kernels("sequence")
    try:
        assert_streams(case, make(case, backend.name))
    except xprnn.KernelUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("checked", [True, False])
def test_out_may_be_x(checked: bool, device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks write it while others still read it; without the overlap check results are wrong."""
    case = Case("gru", dtype="float32", I=20, H=20, T=1)
    layer, x = make(case, device.name), draw(case).x[0]
    wanted = stream(layer.stepper(4), x[None])[0]
    if not checked:
        monkeypatch.setattr(FakeModule, "may_share_memory", lambda self, a, b: False, False)

    def right(seed: int) -> bool:
        monkeypatch.setattr(Function, "run", Run(seed))
        buffer = move(device, x)
        assert layer.stepper(4).step(buffer, out=buffer) is buffer
        return np.array_equal(device.to_host(buffer), wanted)

    assert all(right(seed) for seed in range(1, 20)) == checked


@pytest.mark.parametrize("cell", UNITS)
def test_a_step_is_one_launch(cell: str, device: Backend) -> None:
    case = Case(cell, layers=3, dtype="float32", H=33)
    stepper, x = make(case, device.name).stepper(4), move(device, draw(case).x[0])
    out = device.xp.empty((4, 33), np.float32)
    stepper.step(x)  # reloads the parameters
    for options in ({}, {"out": out}):
        LOG.clear()
        stepper.step(x, **options)
        assert (LOG.kernels, LOG.launches) == (1, 1)
    LOG.clear()
    stepper.step(x, rows=[1])
    extra_launches = 3 if cell == "lstm" else 2
    assert LOG.launches == 1 + extra_launches
    lines = stepper.explain().splitlines()
    assert lines[0].endswith("one step: sequence")
    extra = f"and {extra_launches} more where streams wait"
    assert lines[2] == f"  one launch runs a step of all layers, {extra}"
    assert Function.launches[-1][1] == (1, min(PROCESSORS, 9))


def test_tf32_gives_the_results_of_float32(device: Backend) -> None:
    x = move(device, np.ones((1, 3), np.float32))
    layers = [
        xprnn.GRU(3, 5, 2, precision=precision, backend="fake_cupy", seed=0)
        for precision in ("ieee", "tf32")
    ]
    one, other = (layer.stepper(1).step(x) for layer in layers)
    assert_same([device.to_host(one)], [device.to_host(other)])


@pytest.mark.parametrize("cell", UNITS)
def test_streams_start_and_end_independently(cell: str, device: Backend) -> None:
    case = Case(cell, layers=2, dtype="float32")
    assert_streams_apart(case, make(case, device.name))


UNSUPPORTED = {
    "gru_reset_before": ({"reset_after": False}, 1, "needs two exchanges per step"),
    "float64": ({"dtype": "float64"}, 1, "float64: the step kernel exchanges words of 32 bits"),
    "nine streams": ({}, 9, "N=9: the step kernel supports at most 8 rows"),
    "too wide": ({"hidden_size": 4000}, 8, "bytes of shared memory, the device has 232,448"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_steps_are_refused_with_the_reason(
    name: str, device: Backend, select_kernels: SelectKernels
) -> None:
    options, N, words = UNSUPPORTED[name]
    layer = xprnn.GRU(3, **{"hidden_size": 5, **options}, backend="fake_cupy", seed=0)
    with pytest.raises(xprnn.KernelUnavailableError, match=words):
        layer.stepper(N)
    select_kernels("auto")
    assert words in layer.stepper(N).explain()


def test_kernels_that_no_gpu_has_run_must_be_forced(
    device: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels("auto")
    text = xprnn.GRU(3, 5, backend="fake_cupy", seed=0).stepper(1).explain()
    assert "one step: pointwise" in text and f"sequence: {kernels.EXPERIMENTAL}" in text


@pytest.mark.parametrize("cell", UNITS)
def test_infinities_and_nans_match_the_reference(cell: str, device: Backend) -> None:
    case = Case(cell, layers=2, dtype="float32", H=9)
    layer, x = make(case, device.name), draw(case).x
    sentinel = np.full(1, 0xFFFFFFFF, np.uint32).view(np.float32)[
        0
    ]  # what an exchange buffer is before
    for row, value in enumerate((np.nan, sentinel, np.inf)):
        x[2, row, row] = value
    actual = stream(layer.stepper(4), x)
    with np.errstate(all="ignore"):
        problem = replace(draw(case), x=x, initial=(np.zeros((2, 4, 9), np.float32),) * 2)
        if cell != "lstm":
            problem = replace(problem, initial=problem.initial[:1])
        wanted, *_ = expected(case, layer, problem)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(wanted))
    finite = np.isfinite(wanted)
    np.testing.assert_allclose(actual[finite], wanted[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", UNITS)
def test_a_nan_that_equals_the_sentinel_is_detected(
    cell: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The injected fault: a NaN is stored unchanged."""
    monkeypatch.setattr(Function, "faults", (("canonical_nan(word_of(v.x))", "word_of(v.x)"),))
    monkeypatch.setattr(Function, "max_polls", 1000)
    with pytest.raises((AssertionError, xprnn.KernelStoppedError)):
        test_infinities_and_nans_match_the_reference(cell, device)


# -- waits, and injected faults


def test_blocks_that_are_not_resident_cause_a_deadlock(
    device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("gru", layers=2, dtype="float32")
    monkeypatch.setattr(Function, "run", Run(0, 1))
    stepper, x = make(case, device.name).stepper(4), move(device, draw(case).x[0])
    before = sides(stepper)
    with pytest.raises(RuntimeError, match="deadlock"):
        stepper.step(x)
    assert_same(sides(stepper), before)


@pytest.mark.parametrize("cell", UNITS)
def test_a_timeout_gives_nan_and_is_reported(
    cell: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(cell, layers=3, dtype="float32")
    monkeypatch.setattr(Function, "run", Run(1, 1))
    monkeypatch.setattr(Function, "max_polls", 20)
    stepper = make(case, device.name).stepper(4)
    y = stepper.step(move(device, draw(case).x[0]))
    assert np.isnan(y._inner).all()
    with pytest.raises(xprnn.KernelStoppedError, match="kernel stack_step timed out at step 1:"):
        xprnn.synchronize()
    monkeypatch.setattr(Function, "run", Run(1))
    monkeypatch.setattr(Function, "max_polls", 1 << 23)
    stepper.reset()
    again = stream(stepper, draw(case).x)
    assert_same([again], [stream(make(case, device.name).stepper(4), draw(case).x)])


WAIT = "full = full && (!batch.has(j) || is_written(batch.items[j]));"
BARRIERS = (
    "    sync_block();  // shared memory of the layer below",
    "    sync_block();\n    float gh_sums",
    "    sync_block();\n\n    for (int u",
)
FAULTS = {
    "no wait": (WAIT, ""),
    "three words of four": (" && w.w != SENTINEL", ""),
    "rows without padding": ("pitch == K ? i : i / K * pitch + i % K", "i"),
    "a layer's buffer is shared": (BARRIERS[0], "    //"),
    "no barrier before the old state is read": (BARRIERS[1], "    float gh_sums"),
    "no barrier before the input is read": (BARRIERS[2], "\n    for (int u"),
    "the next exchange buffer is not cleared": (
        "next_exchange[i] = SENTINEL;",
        "(void)next_exchange;",
    ),
    "a value in another row's slot": (
        "publish(exchange + at,",
        "publish(exchange + at - lane * H,",
    ),
    "the layer below the one below": ("exchange + (layer - 1) * size", "exchange"),
    "a value that is not published": (
        "publish(exchange + at, word_of(v))",
        "publish(exchange + at, SENTINEL)",
    ),
    "a sign in GRU": ("return n + z * (h - n);", "return n - z * (h - n);"),
    "a missing bias": ("gh[g] += bias_hh[g * H + u];", ";"),
    "a gate's row": (
        "weights + (static_cast<Index>(g) * H + u) * K",
        "weights + (g * H + u + 1) % H * K",
    ),
    "half of the sums": ("bits; bits /= 2", "bits > 1; bits /= 2"),
    "a sign of x": ("decode<mode>(encode<mode>(x[i]))", "-x[i]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_detected(
    fault: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("gru", layers=3, dtype="float32", N=3, I=40, H=20)
    assert is_detected(FAULTS[fault], case, device, monkeypatch)


NO_CHANGE = "namespace emulator {\n\nenum", "namespace emulator {\n\n\nenum"
FIRST = WAIT, WAIT.replace("(!batch", "(j || !batch")
WIDE_FAULTS = {  # the fault, H
    "only the first vector of a batch is waited for": (FIRST, 68),
    "only the first word of a batch is waited for": (FIRST, 35),
    "items between batches": (("+= IN_FLIGHT * THREADS", "+= (IN_FLIGHT + 1) * THREADS"), 35),
    "no zeros after a row": (("to[row * pitch + k] = 0;", ";"), 35),
}


@pytest.mark.parametrize("fault", WIDE_FAULTS)
def test_injected_faults_are_detected_where_a_thread_has_more_items(
    fault: str, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    substitution, H = WIDE_FAULTS[fault]
    case = Case("gru", layers=2, dtype="float32", N=8, I=150, H=H, T=2)
    assert not is_detected(NO_CHANGE, case, device, monkeypatch)
    assert is_detected(substitution, case, device, monkeypatch)


def is_detected(
    fault: tuple[str, str], case: Case, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether the fault is detected in one of several thread orders."""
    monkeypatch.setattr(Function, "faults", (fault,))

    def fails(seed: int) -> bool:
        monkeypatch.setattr(Function, "run", Run(seed))
        try:
            with np.errstate(all="ignore"):
                assert_streams(case, make(case, device.name))
        except (AssertionError, RuntimeError):
            return True
        return False

    return any(fails(seed) for seed in range(1, 200, 20))


def test_the_cases_pass_without_a_fault(device: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("gru", layers=3, dtype="float32", N=3, I=40, H=20)
    for seed in range(1, 200, 20):
        monkeypatch.setattr(Function, "run", Run(seed))
        assert_streams(case, make(case, device.name))


def test_a_stepper_remains_usable_after_a_failed_launch(device: Backend, monkeypatch: Any) -> None:
    case = Case("lstm", layers=2, dtype="float32")
    layer, x = make(case, device.name), draw(case).x
    stepper, other = layer.stepper(4), layer.stepper(4)
    stream(stepper, x[:2])
    stream(other, x[:2])
    monkeypatch.setattr(Function, "run", Run(0, 1))
    with pytest.raises(RuntimeError, match="deadlock"):
        stepper.step(move(device, x[2]))
    monkeypatch.setattr(Function, "run", Run())
    assert_same([stream(stepper, x[2:])], [stream(other, x[2:])])
    assert_same(on_host(stepper, stepper.state()), on_host(other, other.state()))
