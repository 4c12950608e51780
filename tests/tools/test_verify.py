"""verify: passes for every implementation, detects injected faults in each type and cell."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fault_injection import FAULTS, inject
from tests.support.targets import make
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.cells import CELLS as PLAIN
from xprnn.diagnostics.verification import equations
from xprnn.diagnostics.verification.suite import PROBLEMS, build, types_of, verify_cells
from xprnn.kernels import dispatch, use_kernels
from xprnn.kernels.request import Request

BFLOAT16 = pytest.param(
    "bfloat16",
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("ml_dtypes"), reason="bfloat16 needs ml_dtypes"
    ),
)
LOW_PRECISION = ["float16", BFLOAT16]
GATES = [(cell, gate) for cell, plain in PLAIN.items() for gate in range(plain.gates)]

pytestmark = pytest.mark.usefixtures("without_numba")  # the same implementations everywhere


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No kernels are forced, and copies of cells for low precision are made again."""
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    kernels.forget_plans()
    yield
    kernels.forget_plans()


def scale_after(
    method: str, cell: str, which: Callable[..., Any], factor: float, patch: pytest.MonkeyPatch
) -> None:
    """Multiply what a step wrote, in all but the float64 equations and gradchecks.

    `which` picks it from the buffers of the step. The class is patched, and so are its copies
    for low precision.
    """
    kind = type(PLAIN[cell])
    original = getattr(kind, method)

    def broken(self: Any, xp: Any, *buffers: Any) -> None:
        original(self, xp, *buffers)
        array = which(*buffers)
        if array.dtype == np.float32:
            array *= factor  # also where the calls of a step are captured
        elif array.dtype != np.float64:
            array[...] = array.astype(np.float32) * np.float32(factor)

    patch.setattr(kind, method, broken)


# -- all cells


def test_every_cell_passes_on_numpy() -> None:
    seen: list[tuple[int, int]] = []
    report = verify_cells("numpy", report=lambda done, total: seen.append((done, total)))
    assert report.ok
    types = types_of(xprnn.get_backend("numpy"))
    assert {"float64", "float32", "float16"} <= set(types) and "tf32" not in types
    expected = [(c, "reference", t) for c in PLAIN for t in (*types[1:], "gradcheck")]
    assert [row[:3] for row in report.rows] == expected
    assert all(row.error > 0 for row in report.rows)  # something was rounded
    absent = {(one.check, one.cell) for one in report.absent}
    assert absent == {(c, cell) for c in ("float64", "pointwise", "sequence") for cell in PLAIN}
    total = len(PLAIN) * (len(types) * len(PROBLEMS) + 1)
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("cell", PLAIN)
def test_every_kernel_passes_on_the_fake_cupy(cell: str, fake_cupy: Backend) -> None:
    types = types_of(fake_cupy) if cell == "gru" else ["float32", "float16"]
    assert cell != "gru" or "tf32" in types
    report = verify_cells(fake_cupy.name, [cell], types)
    assert report.ok, str(report)
    expected = {(cell, i, t) for i in ("reference", "pointwise") for t in (*types, "gradcheck")}
    assert {row[:3] for row in report.rows} == expected
    assert [one[:2] for one in report.absent] == [("sequence", cell)] * len(report.absent) != []
    errors = {row[1:3]: row.error for row in report.rows}
    assert all(error > 0 for (_, kind), error in errors.items() if kind != "float64")


@pytest.mark.parametrize("operand_type", ["float32", *LOW_PRECISION])
@pytest.mark.parametrize("cell", PLAIN)
def test_limits_are_above_the_errors_of_many_seeds_but_not_far(
    cell: str, operand_type: str
) -> None:
    worst = 0.0
    for problem in PROBLEMS:
        layer = build(cell, operand_type, problem, xprnn.get_backend("numpy"))
        for seed in range(10):
            shape = (problem.T, problem.N, problem.I)
            with use_kernels("reference"):
                reference = equations.Equations(layer, shape, problem.lengths, seed)
            worst = max(worst, reference.compare(copy.deepcopy(layer), "reference").excess)
    assert 1 / 30 < worst < 1


def test_a_relu_in_coarse_types_stays_away_from_its_kink() -> None:
    for problem in PROBLEMS:
        layer = build("rnn_relu", "float16", problem, xprnn.get_backend("numpy"))
        layer.to(compute_dtype="float32").eval()
        x = np.random.default_rng(1).standard_normal((problem.T, 200, problem.I), np.float32)
        h = layer(x)[0].reshape(-1, problem.directions, problem.H)
        assert h[..., 0::2].min() > 0.25 and not h[..., 1::2].any()
        for name, bias in layer.parameters.items():
            if name.startswith("bias_ih"):
                layer.parameters[name] = -bias
        h = layer(x)[0].reshape(-1, problem.directions, problem.H)
        assert h[..., 1::2].min() > 0.25 and not h[..., 0::2].any()


def test_the_layers_of_the_command_leave_out_no_comparison(fake_cupy: Backend) -> None:
    report = verify_cells(fake_cupy.name, ["rnn_relu"])
    assert {one.check for one in report.absent} == {"sequence"}


# -- injected faults


@pytest.mark.parametrize("cell", PLAIN)
def test_a_wrong_gradient_of_the_plain_code_fails_the_gradcheck(
    cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(cell, FAULTS[cell, "gate 0 times 1.001"], monkeypatch)
    other = "gru" if cell == "lstm" else "lstm"
    report = verify_cells("numpy", [other, cell], ["float32"])
    assert not report.ok
    assert [row[:3] for row in report.failed] == [(cell, "reference", "gradcheck")]


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("operand_type", ["float32", *LOW_PRECISION])
@pytest.mark.parametrize(("cell", "gate"), GATES)
def test_five_per_cent_of_one_gates_gradient_fail_in_every_type(
    cell: str, gate: int, operand_type: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dgate(weights: Any, step: Any) -> np.ndarray:
        gates = step.gates
        return gates.reshape(len(gates), PLAIN[cell].gates, -1)[:, gate]

    with monkeypatch.context() as patch:
        scale_after("backward", cell, dgate, 1.0, patch)
        assert verify_cells("numpy", [cell], [operand_type]).ok
    kernels.forget_plans()
    scale_after("backward", cell, dgate, factor, monkeypatch)
    report = verify_cells("numpy", [cell], [operand_type])
    assert [row[:3] for row in report.failed] == [(cell, "reference", operand_type)]


@pytest.mark.parametrize("factor", [0.94, np.nan])
@pytest.mark.parametrize("operand_type", ["float32", *LOW_PRECISION])
@pytest.mark.parametrize("cell", PLAIN)
def test_a_wrong_state_fails_in_every_type(
    cell: str, operand_type: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def h_next(weights: Any, step: Any) -> Any:
        return step.next_states[0]

    scale_after("forward", cell, h_next, factor, monkeypatch)
    report = verify_cells("numpy", [cell], [operand_type])
    assert [row[:3] for row in report.failed] == [(cell, "reference", operand_type)]


@pytest.mark.parametrize("cell", PLAIN)
def test_a_wrong_kernel_fails_alone(
    cell: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    with use_kernels("pointwise"):
        fused = make(cell, dtype="float32", backend=fake_cupy.name)._plan(3, 2).cell
    part = fused.pointwise_ops[-1]
    original = getattr(fused, part)

    def broken(*buffers: Any) -> None:
        original(*buffers)
        gates = buffers[-1].gates
        gates *= gates.dtype.type(1.05)

    monkeypatch.setattr(fused, part, broken)
    report = xprnn.verify(make(cell, dtype="float32", backend=fake_cupy.name), (3, 2, 3))
    assert not report.ok
    assert [(row[1:3], row.ok) for row in report.rows] == [
        (("reference", "float32"), True),
        (("reference", "gradcheck"), True),
        (("pointwise", "float32"), False),
        (("pointwise", "gradcheck"), False),
    ]


def test_a_forced_kernel_that_does_not_run_fails(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = dispatch._select

    def ignoring_forced(
        cell: Any, backend: Any, precision: Any, request: Request, *rest: Any
    ) -> Any:
        return original(cell, backend, precision, request._replace(name="reference"), *rest)

    ignoring_forced.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    monkeypatch.setattr(dispatch, "_select", ignoring_forced)
    report = xprnn.verify(make("gru", backend=fake_cupy.name), (4, 2, 3))
    assert [(row.implementation, row.ok) for row in report.rows] == [
        ("reference", True),
        ("reference", True),
        ("pointwise", False),
    ]
    assert {row.array for row in report.failed} == {"reference ran instead"}


@pytest.mark.gpu
def test_every_kernel_passes_on_the_gpu() -> None:
    try:
        report = verify_cells("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    assert report.ok, str(report)
    assert {"reference", "pointwise"} <= {row.implementation for row in report.rows}
