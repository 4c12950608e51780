"""Low-precision compute dtypes with float32: every result and gradient against float64.

The inputs of the float64 reference are first rounded to the compute dtype, so that the comparison
measures only the rounding of intermediate results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import LAYERS, Case, Problem, Results, build, draw, product, run, unroll
from tests.support.targets import make
from tests.support.tolerances import assert_close
from xprnn.cells import CELLS
from xprnn.core.precision import check_precision_policy

pytest.importorskip("ml_dtypes")

LOW_PRECISION = ("float16", "bfloat16")
MATRIX = tuple(
    product(
        cell=LAYERS,
        layers=(1, 2),
        directions=(1, 2),
        bias=(True, False),
        dtype=("float32",),
        lengths=("full", "zero"),
        states=(True, False),
        H=(17,),  # in very small layers carried gradients may cancel, but not their errors
    )
)


def low_precision_dtype(name: str) -> Any:
    return check_precision_policy("float32", name, "ieee").compute_dtype


def rounded(array: np.ndarray, name: str) -> np.ndarray:
    """The numbers rounded to the compute dtype, as float32."""
    return array.astype(low_precision_dtype(name)).astype(np.float32)


def rounded_problem(case: Case, name: str) -> Problem:
    problem = draw(case)
    return replace(
        problem,
        x=rounded(problem.x, name),
        initial=tuple(rounded(state, name) for state in problem.initial),
    )


def pair(case: Case, name: str) -> tuple[Any, Any]:
    """A layer with the compute dtype, and one in float64 with the same parameters."""
    layer = build(case).to(compute_dtype=name)
    values = {key: rounded(value, name) for key, value in layer.parameters.items()}
    if case.cell == "rnn_relu":  # keep every unit away from the kink, on either side of it
        values = {
            k: _large_biases(v) if k.startswith("bias_ih") else v / 4 for k, v in values.items()
        }
    layer.load_state_dict(values)
    float64_layer = build(replace(case, dtype="float64"))
    float64_layer.load_state_dict(values)
    return layer, float64_layer


def _large_biases(bias: np.ndarray) -> np.ndarray:
    return np.where(np.arange(bias.size) % 3 == 0, -9.0, 9.0).astype(bias.dtype)


def in_float64(problem: Problem) -> Problem:
    return Problem(
        x=problem.x.astype(np.float64),
        initial=tuple(state.astype(np.float64) for state in problem.initial),
        lengths=problem.lengths,
        doutput=problem.doutput.astype(np.float64),
        dfinal=tuple(d.astype(np.float64) for d in problem.dfinal),
    )


def compare(case: Case, name: str) -> tuple[Results, Results]:
    layer, float64_layer = pair(case, name)
    problem = rounded_problem(case, name)
    float64_case = replace(case, dtype="float64")
    return run(layer, case, problem), run(float64_layer, float64_case, in_float64(problem))


def assert_all_close(case: Case, name: str, actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for key, reference in expected.items():
        assert np.abs(reference).max() > 0, f"{case}: {key} is all zero and tests nothing"
        what = f"{case} {name}: {key}"
        sizes = {"steps": case.T, "layers": case.layers, "width": 3 * case.H}
        assert_close(actual[key], reference, "float32", what, compute_dtype=name, **sizes)


@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("case", [c for c in MATRIX if c.bias or c.cell != "rnn_relu"], ids=str)
def test_layer_equals_float64_equations(case: Case, name: str) -> None:
    assert_all_close(case, name, *compare(case, name))


@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("cell", LAYERS)
def test_results_differ_from_those_of_float32(cell: str, name: str) -> None:
    """The compute dtype is really used: the error is that of its rounding, not of float32's."""
    actual, expected = compare(Case(cell, dtype="float32"), name)
    error = np.abs(actual["output"] - expected["output"]).max() / np.abs(expected["output"]).max()
    assert error > 2.0**-16


@pytest.mark.parametrize("name", LOW_PRECISION)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "gru_reset_before", "lstm"])
def test_a_wrong_gradient_of_a_gate_is_detected(
    cell: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(cell, dtype="float32", H=17)
    layer, float64_layer = pair(case, name)
    problem = rounded_problem(case, name)
    expected = run(float64_layer, replace(case, dtype="float64"), in_float64(problem))
    for factor in (1.0, 1.5):
        layer.zero_grad()
        with monkeypatch.context() as patch:
            scale_first_gate(cell, factor, patch)
            actual = run(layer, case, problem)
        if factor == 1.0:
            assert_all_close(case, name, actual, expected)
        else:
            with pytest.raises(AssertionError, match="relative error"):
                assert_all_close(case, name, actual, expected)


def scale_first_gate(name: str, factor: float, patch: pytest.MonkeyPatch) -> None:
    """Multiply the gradient of a cell's first gate after the op that computes it."""
    cell_type, op = type(CELLS[name]), CELLS[name].pointwise_ops[-1]
    original = getattr(cell_type, op)

    def broken(self: Any, xp: Any, *buffers: Any) -> None:
        original(self, xp, *buffers)
        gates = buffers[-1].gates
        gates[:, : gates.shape[1] // self.gates] *= factor

    patch.setattr(cell_type, op, broken)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_results_and_gradients_are_float32(name: str) -> None:
    layer = make("lstm", dtype="float32", compute_dtype=name)
    x = np.ones((4, 3, 3), np.float32)
    output, (h_n, c_n) = layer(x)
    dx, (dh0, dc0) = layer.backward(output, (h_n, c_n))
    arrays = [output, h_n, c_n, dx, dh0, dc0, *layer.parameters.values(), *layer.grads.values()]
    assert {array.dtype.name for array in arrays} == {"float32"}
    for wrong in (x.astype(np.float16), x.astype(np.float64)):
        with pytest.raises(TypeError, match="x: expected dtype float32"):
            layer(wrong)


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_row_without_steps_keeps_its_state_exactly(name: str) -> None:
    layer = make("lstm", dtype="float32", compute_dtype=name)
    h0, c0 = (np.random.default_rng(k).random((1, 2, 5), np.float32) for k in (0, 1))
    _, (h_n, c_n) = layer(np.ones((4, 2, 3), np.float32), (h0, c0), lengths=[4, 0])
    assert np.array_equal(h_n[:, 1], h0[:, 1]) and np.array_equal(c_n[:, 1], c0[:, 1])


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_a_cell_equals_the_layer(name: str) -> None:
    """h is rounded between the calls of a cell as it is inside the layer."""
    case = Case("gru", dtype="float32")
    layer = build(case).to(compute_dtype=name)
    cell = xprnn.GRUCell(case.I, case.H, dtype="float32", seed=0, compute_dtype=name).train()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.parameters.items()})
    problem = rounded_problem(case, name)
    actual = unroll(cell, problem.x, (problem.initial[0][0],), (problem.doutput,))
    expected = run(layer, case, replace(problem, dfinal=(0 * problem.dfinal[0],)))
    for one, other in (("h", "output"), ("dx", "dx"), ("dweight_hh", "dweight_hh_l0")):
        # the layer adds up dW over all steps in one product, the cell step by step
        scale = np.abs(expected[other]).max()
        assert np.abs(actual[one] - expected[other]).max() <= 1e-5 * scale, one


def test_dropout_drops_the_same_elements() -> None:
    results = []
    for name in ("float32", *LOW_PRECISION):
        layer = make("rnn_tanh", num_layers=2, dropout=0.5, dtype="float32", compute_dtype=name)
        x = np.random.default_rng(0).standard_normal((6, 4, 3), np.float32)
        layer(x)
        results.append(layer._records.last("RNN", layer.parameters).tape.activations[1][0].x == 0)
    assert 0.3 < results[0].mean() < 0.7
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_training_keeps_float32_parameters_and_learns() -> None:
    losses = {}
    for name in ("float32", *LOW_PRECISION):
        layer = make("gru", dtype="float32", compute_dtype=name)
        optimizer = xprnn.optim.Adam([layer], lr=1e-2)
        x = np.random.default_rng(0).standard_normal((6, 8, 3), np.float32)
        target = np.tanh(np.random.default_rng(1).standard_normal((6, 8, 5), np.float32))
        for _ in range(60):
            output, _ = layer(x)
            loss, doutput = xprnn.mse_loss(output, target)
            losses.setdefault(name, []).append(float(loss))
            optimizer.zero_grad()
            layer.backward(doutput)
            optimizer.step()
        assert losses[name][-1] < 0.7 * losses[name][0]
    for name in LOW_PRECISION:
        assert losses[name] != losses["float32"]
        np.testing.assert_allclose(losses[name], losses["float32"], rtol=0.02)


def test_small_float16_gradients_need_a_scale() -> None:
    """Small gradients underflow, as the constructor documents; scaling them avoids it."""
    case = Case("gru", dtype="float32")
    layer, float64_layer = pair(case, "float16")
    problem = rounded_problem(case, "float16")
    tiny = replace(
        problem, doutput=problem.doutput * 2.0**-26, dfinal=(problem.dfinal[0] * 2.0**-26,)
    )
    expected = run(float64_layer, replace(case, dtype="float64"), in_float64(tiny))["dweight_ih_l0"]
    lost = run(layer, case, tiny)["dweight_ih_l0"]
    assert np.abs(lost - expected).max() > 0.1 * np.abs(expected).max()
    layer.zero_grad()
    scaled = replace(tiny, doutput=tiny.doutput * 2.0**16, dfinal=(tiny.dfinal[0] * 2.0**16,))
    actual = run(layer, case, scaled)["dweight_ih_l0"] * np.float32(2.0**-16)
    assert_close(actual, expected, "float32", "scaled", compute_dtype="float16")
