"""The kernels that are compiled ahead of a run on a GPU: their list, and worker processes."""

from __future__ import annotations

import os
from itertools import product
from types import SimpleNamespace

import pytest

import xprnn
from benchmarks.device import kinds, peaks, warm
from benchmarks.device.problems import Problem as Call
from benchmarks.device.problems import problems, step_problems
from benchmarks.device.warm import Job
from tests.gpu import test_smoke as smoke
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy import sequence as fake_sequence
from tests.support.fake_cupy import stack_step as fake_stack
from tests.support.implementations import SelectKernels
from xprnn.backend import Backend
from xprnn.diagnostics.verification.suite import PROBLEMS
from xprnn.kernels.cuda import stack_step
from xprnn.kernels.cuda.plan import DeviceProperties, SequenceProblem, plan

fake = smoke.fake
H200 = DeviceProperties((9, 0), 132)
FAILS, ENDS = "does not compile", "ends its process"


@pytest.fixture(scope="module")
def every() -> list[Job]:
    return warm.jobs(H200)


def test_each_job_is_listed_once_and_frozen_ones_are_last(every: list[Job]) -> None:
    assert len({*every}) == len(every)
    late = [job.frozen for job in every]
    assert late == sorted(late) and 0 < sum(late) < len(late) / 2
    assert [job.what for job in every[:28]] == ["layer"] * 25 + ["ping_pong"] * 3


def test_the_reports_kernels_are_among_them(every: list[Job]) -> None:
    """Including T of 3, which is compared, and those of `xprnn verify`."""
    names = {job.name for job in every}

    def check(*sizes: object) -> None:
        for work in ("forward", "training", "backward"):
            chosen = plan(H200, SequenceProblem(sizes[0], work, *sizes[1:]))
            assert isinstance(chosen, str) or chosen.name in names, sizes

    calls: list[Call] = problems()
    for one in calls:
        check(one.cell, one.dtype, one.N, one.H, one.T, one.directions)
        check(one.cell, one.dtype, one.N, one.H, 3, one.directions)
    for one, cell in product(PROBLEMS, ("gru", "lstm", "rnn_relu")):
        for operand_type in ("float32", "tf32", "bfloat16", "float16"):
            check(cell, operand_type, one.N, one.H, one.T, one.directions)
    for one in step_problems(("gru", "lstm", "rnn_tanh"), ("float32", "float16")):
        rows = stack_step.StepSizes(one.layers, one.N, one.H, one.H).rows
        unit, kind = stack_step.UNITS[one.cell], stack_step.KINDS[one.dtype]
        assert stack_step.instantiation(unit, kind, rows) in names


@needs_compiler
@smoke.each_way
def test_the_kinds_kernels_are_among_them(
    kind: kinds.Kind, fake: Backend, monkeypatch: pytest.MonkeyPatch, every: list[Job]
) -> None:
    """As the fake CuPy launches them, from the same source."""
    function = smoke.installed(kind, monkeypatch)
    kind.launch(fake)
    launched = {name for name, _ in function.launches}
    listed = {job.name for job in every if job.frozen == (kind.way in kinds.FROZEN)}
    assert launched <= listed


@pytest.mark.parametrize("what", ["sequence", "step", "ping_pong"])
def test_a_job_compiles_what_a_launch_requests(
    what: str, fake: Backend, monkeypatch: pytest.MonkeyPatch, every: list[Job]
) -> None:
    """The same source under the same name, or CuPy's cache would not contain it."""
    module = fake_stack if what == "step" else fake_sequence
    module.install(monkeypatch)
    requested: list[tuple[object, ...]] = []

    class Kernel:
        kernel = "compiled"

    def kernel(xp: object, source: str, name: str, cooperative: bool = True) -> type[Kernel]:
        requested.append((source, name, cooperative))
        return Kernel

    monkeypatch.setattr(warm, "loading", SimpleNamespace(kernel=kernel))
    for job in every:
        if job.what == what:
            job.compile(fake)
    assert len(requested) == sum(job.what == what for job in every)
    if what == "sequence":
        for source, name, cooperative in requested:
            cluster = f"#define XP_CLUSTER {1 if cooperative else 2}\n"
            assert str(source).startswith(cluster) and str(name).partition("<")[0][7:] in str(
                source
            )
    elif what == "step":
        assert {source for source, *_ in requested} == {stack_step.source()}
    else:
        assert [one[1:] for one in requested] == [
            ("xprnn::ping_pong", True),
            ("xprnn::poll_words", False),
            ("xprnn::sweep", False),
        ]
        assert {source for source, *_ in requested} == {peaks.source()}


def test_a_layer_is_called_without_the_kernels_that_wait(
    fake: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    fake_sequence.install(monkeypatch)
    select_kernels("auto")
    monkeypatch.setitem(xprnn.kernels.AUTOMATIC, "cuda", ("reference", "pointwise"))
    Job("layer", "gru float32").compile(fake)
    assert not fake_sequence.Function.launches


# -- in processes


def work(job: Job) -> str:
    if job.name == ENDS:
        os._exit(9)
    return "CompileException: no" if job.name == FAILS else ""


def test_a_job_that_fails_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    every = [Job("step", name) for name in ("a", FAILS, "b")]
    assert warm.run(every, work, 1) == 1
    lines = [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == ["step a", "step b", f"step {FAILS}: CompileException: no"]


def test_a_process_that_terminates_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert warm.run([Job("step", ENDS), Job("step", "a")], work, 1) == 2
    assert capsys.readouterr().out.count("a worker process terminated: ") == 2


def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        assert warm.main() == 2
        assert capsys.readouterr().err == f"warm: no GPU to compile for: {error}\n"
    else:
        pytest.skip("this machine has a GPU")


def test_an_error_of_nvrtc_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's own class cannot be sent to another process."""
    pytest.importorskip("cupy", reason="CuPy is not installed: pip install --group nvrtc")
    from cupy.cuda.compiler import CompileException

    def refused(self: Job, backend: object) -> None:
        raise CompileException("no such type", "source", "name", ())

    monkeypatch.setattr(Job, "compile", refused)
    monkeypatch.setattr(xprnn, "get_backend", lambda name: None)
    assert warm.compiled(Job("step", "a")) == "CompileException: no such type"
