"""verify with an overflow: finite results are compared, and the others are reported."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import make
from xprnn import kernels
from xprnn.cells import CELLS as PLAIN
from xprnn.diagnostics.tolerances import LARGEST
from xprnn.diagnostics.verification.equations import Equations

T, N = 40, 3


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No kernels are forced, and copies of cells for low precision are made again."""
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    kernels.forget_plans()
    yield
    kernels.forget_plans()


def growing(scale: float = 20.0, **options: Any) -> Any:
    """A layer whose states grow by a factor a step."""
    layer = make("rnn_relu", 3, 9, **{"dtype": "float32", **options})
    with layer.writable() as flat:
        flat *= scale
    return layer


def steps_left_out(report: Any) -> tuple[int, int]:
    (one,) = [a for a in report.absent if "steps" in a.check]
    match = re.fullmatch(r"\w+, steps (\d+) to (\d+)", one.check)
    assert match, one
    return int(match[1]), int(match[2])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True},
    {"compute_dtype": "float16"},
    {"dtype": "float64", "compute_dtype": "float64", "num_layers": 2},
]


@pytest.mark.usefixtures("without_numba")
@pytest.mark.parametrize("lengths", [None, [T, 3, 0]])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_correct_layer_passes_and_the_report_names_the_steps_that_overflow(
    options: dict[str, Any], lengths: list[int] | None
) -> None:
    layer = growing(1e9 if options.get("dtype") == "float64" else 20.0, **options)
    shape = (N, T, 3) if options.get("batch_first") else (T, N, 3)
    report = xprnn.verify(layer, shape, lengths=lengths)
    assert report.ok, str(report)
    first, last = steps_left_out(report)
    assert 0 < first <= last == T - 1
    assert "sums may exceed" in str(report)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
def test_every_kernel_passes() -> None:
    report = xprnn.verify(growing(), (T, N, 3))
    assert report.ok, str(report)
    assert {"reference", "pointwise", "sequence"} <= {row.implementation for row in report.rows}
    assert steps_left_out(report)[1] == T - 1


def test_torch_is_finite_before_it_and_not_after() -> None:
    torch = pytest.importorskip("torch")
    layer = growing()
    theirs = torch.nn.RNN(3, 9, nonlinearity="relu")
    theirs.load_state_dict({n: torch.from_numpy(p.copy()) for n, p in layer.parameters.items()})
    first, _ = steps_left_out(xprnn.verify(layer, (T, N, 3)))
    x = Equations(layer, (T, N, 3), None, 0).arguments.x
    assert len(x) == first
    rest = np.random.default_rng(1).standard_normal((T - first, N, 3))
    output, _ = theirs(torch.from_numpy(np.concatenate([x, rest]).astype(np.float32)))
    assert torch.isfinite(output[:first]).all()
    assert not torch.isfinite(output[first:]).all()


@pytest.mark.parametrize("exponent", [10, 100])
@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.usefixtures("without_numba")
def test_an_overflow_within_a_kernel_is_detected(
    method: str, exponent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where float64 gives a number within float32's range, so must a kernel."""
    kind = type(PLAIN["rnn_relu"])
    original = getattr(kind, method)
    scale_up, scale_down = (np.float32(2.0 ** (sign * (128 - exponent))) for sign in (1, -1))

    def broken(self: Any, xp: Any, weights: Any, step: Any) -> None:
        original(self, xp, weights, step)
        array = step.next_states[0] if method == "forward" else step.gates
        if array.dtype == np.float32:
            array *= scale_up  # infinite from 2^exponent on
            array *= scale_down

    monkeypatch.setattr(kind, method, broken)
    with np.errstate(all="ignore"):
        report = xprnn.verify(growing(), (T, N, 3))
    assert [row[:3] for row in report.failed] == [("rnn_relu", "reference", "float32")]
    assert report.failed[0].error == np.inf
    with np.errstate(all="ignore"):  # without an overflow it passes
        assert xprnn.verify(growing(1.0), (T, N, 3)).ok


@pytest.mark.usefixtures("without_numba")
def test_a_call_that_overflows_in_its_first_step_is_refused() -> None:
    cell = make("rnn_relu_cell", 3, 9, dtype="float32")
    with cell.writable() as flat:
        flat *= 1e38
    for module, shape in ((growing(1e5, compute_dtype="float16"), (T, N, 3)), (cell, (N, 3))):
        with pytest.raises(
            ValueError, match=r"layer: rnn_relu may overflow float\d\d in its first"
        ):
            xprnn.verify(module, shape)


@pytest.mark.usefixtures("without_numba")
def test_a_step_whose_results_stay_within_the_type_is_compared() -> None:
    """Even if those of another step might exceed it."""
    cell = xprnn.RNNCell(3, 4, nonlinearity="relu", seed=0)
    with cell.writable() as flat:
        flat *= 1e19
    assert xprnn.verify(cell, (2, 3)).ok


def test_the_largest_number_of_each_type() -> None:
    for name in ("float64", "float32", "float16"):
        assert LARGEST[name] == np.finfo(name).max
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert LARGEST["bfloat16"] == float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
