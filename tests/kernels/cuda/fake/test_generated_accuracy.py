"""Generated kernels of the built-in cells are as accurate as those that are written by hand.

Both run on the fake CuPy; the reference is the plain code in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import move
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.implementations import SelectKernels
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.cells import Cell
from xprnn.cells.shipped import builtin_cell
from xprnn.core.precision import PrecisionPolicy
from xprnn.kernels.codegen.cuda import EXPRESSIONS
from xprnn.kernels.cuda import package
from xprnn.kernels.cuda.generated import generated_cell

pytestmark = needs_compiler

T, N, I, H = 6, 32, 5, 40  # noqa: E741
SAME = 1.02
LAYERS: dict[str, Any] = {
    "gru": xprnn.GRU,
    "lstm": xprnn.LSTM,
    "rnn_tanh": xprnn.RNN,
    "rnn_relu": lambda *args, **kwargs: xprnn.RNN(*args, nonlinearity="relu", **kwargs),
    "gru_reset_before": lambda *args, **kwargs: xprnn.GRU(*args, reset_after=False, **kwargs),
}
# not float64, in which the reference rounds as the kernels that are written by hand
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")


def results(name: str, backend: str, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The results and gradients of a layer, in float64."""
    layer = LAYERS[name](I, H, backend=backend, seed=3, **options).train()
    layer.load_state_dict({key: p.astype(options["dtype"]) for key, p in state.items()})
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(shape) for shape in ((T, N, I), (T, N, H))]
    states = [rng.standard_normal((1, N, H)) for _ in range(4)]
    x, doutput, *rest = (
        move(layer.backend, array.astype("float16").astype(options["dtype"]))
        for array in (*arrays, *states)
    )
    h, dh = (rest[0], rest[1]) if name != "lstm" else (tuple(rest[:2]), tuple(rest[2:]))
    output, _ = layer(x, h)
    dx, _ = layer.backward(doutput, dh)
    values = {"output": output, "dx": dx, **layer.grads}
    return {key: xprnn.to_numpy(value).astype("float64") for key, value in values.items()}


def error(actual: dict[str, Any], expected: dict[str, Any]) -> float:
    """The root mean square of the relative errors of all results, each with the same weight."""
    relative = [
        np.mean((actual[key] - values) ** 2) / np.mean(values**2)
        for key, values in expected.items()
    ]
    return float(np.sqrt(np.mean(relative)))


def check(
    name: str,
    compute_dtype: str,
    select_kernels: SelectKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Assert that a layer's errors by generated kernels are no larger than by the others."""
    start = LAYERS[name](I, H, seed=3, dtype="float64")
    state = {
        key: p.astype(BFLOAT16 if compute_dtype == "bfloat16" else "float16").astype("float64")
        for key, p in start.state_dict().items()
    }
    with xprnn.use_kernels("reference"):
        expected = results(name, "numpy", state, dtype="float64")
    select_kernels("pointwise")
    options = {"dtype": "float32", "compute_dtype": compute_dtype}
    written = results(name, "fake_cupy", state, **options)
    kernels.forget_plans()
    made = []

    def generated(cell: Cell, precision: PrecisionPolicy, record: bool) -> Cell:
        made.append(generated_cell(builtin_cell(cell.name, H), record, precision.is_mixed))
        return made[-1]

    monkeypatch.setattr(package, "fused_cell", generated)
    LOG.clear()
    actual = results(name, "fake_cupy", state, **options)
    kernels.forget_plans()
    assert made
    assert LOG.kernels > 0
    ours, theirs = error(actual, expected), error(written, expected)
    assert 0 < ours <= SAME * theirs, f"{name}: {ours} {theirs}"


@pytest.mark.parametrize("compute_dtype", COMPUTE_DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_no_result_is_less_accurate(
    name: str,
    compute_dtype: str,
    fake_cupy: Backend,
    select_kernels: SelectKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    check(name, compute_dtype, select_kernels, monkeypatch)


def test_a_less_accurate_function_is_detected(
    fake_cupy: Backend, select_kernels: SelectKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPRESSIONS, "sigmoid", "sigmoid({0}) + A(1e-7)")
    generated_cell.cache_clear()
    with pytest.raises(AssertionError, match="lstm: "):
        check("lstm", "float32", select_kernels, monkeypatch)
    generated_cell.cache_clear()
