"""gradcheck: passes for every cell and option, detects every injected fault, changes nothing."""

from __future__ import annotations

import copy
import importlib
import itertools
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fault_injection import FAULTS, inject, plain_product, scaled_gate, scaled_state
from xprnn.backend import Backend, to_numpy
from xprnn.diagnostics.gradient_check import GradcheckReport, GradientError, Row, gradcheck

T, N, H = 4, 3, 4
I = 3  # noqa: E741
LENGTHS = [2, 0, 4]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {"reset_after": True}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "lstm": ("LSTM", {}),
}


def make_layer(kind: str, **options: Any) -> Any:
    name, defaults = KINDS[kind]
    return getattr(xprnn, name)(I, H, **defaults, **{"dtype": "float64", "seed": 3, **options})


def make_cell(kind: str, **options: Any) -> Any:
    name, defaults = KINDS[kind]
    return getattr(xprnn, f"{name}Cell")(
        I, H, **defaults, **{"dtype": "float64", "seed": 3, **options}
    )


def arguments(layer: Any, *, batch_first: bool = False, seed: int = 0) -> tuple[np.ndarray, Any]:
    """Random x and states for a layer."""
    rng = np.random.default_rng(seed)
    net = layer._spec
    x = rng.standard_normal((N, T, I) if batch_first else (T, N, I)).astype(layer.dtype)
    shape = (net.num_layers * net.num_directions, N, H)
    states = tuple(rng.standard_normal(shape).astype(layer.dtype) for _ in net.cell.state_names)
    return x, states if len(states) > 1 else states[0]


def cell_arguments(cell: Any) -> tuple[np.ndarray, Any]:
    """Random x and states for a cell."""
    rng = np.random.default_rng(0)
    states = tuple(rng.standard_normal((N, H)) for _ in cell._spec.cell.state_names)
    return rng.standard_normal((N, I)), states if len(states) > 1 else states[0]


@pytest.mark.parametrize("dropout", [None, 0.0, 0.4], ids=["one", "two", "two_dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_the_layers_passes(
    kind: str, dropout: float | None, implementation: str
) -> None:
    # every combination of bidirectional, bias, batch_first and lengths
    flags = itertools.product([False, True], repeat=4)
    for number, (bidirectional, bias, batch_first, ragged) in enumerate(flags):
        layer = make_layer(
            kind,
            num_layers=1 if dropout is None else 2,
            dropout=dropout or 0.0,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
            seed=number,
        )
        x, hx = arguments(layer, batch_first=batch_first, seed=number)
        lengths = LENGTHS if ragged else None
        report = gradcheck(layer, x, hx, lengths=lengths, directions=1, seed=number)
        names = ["x", *(f"{name}0" for name in layer._spec.cell.state_names), *layer.parameters]
        assert [row.name for row in report.rows] == names
        assert report.worst.excess <= 1
        assert all(abs(row.analytic) > 0 for row in report.rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cells_pass(kind: str, bias: bool, implementation: str) -> None:
    cell = make_cell(kind, bias=bias)
    x, hx = cell_arguments(cell)
    report = gradcheck(cell, x, hx)
    names = ["x", *cell._spec.cell.state_names, *cell.parameters]
    assert [row.name for row in report.rows] == names
    unbatched = tuple(h[0] for h in hx) if isinstance(hx, tuple) else hx[0]
    gradcheck(cell, x[0], unbatched)
    gradcheck(cell, x)  # no states


@pytest.mark.parametrize("kind", KINDS)
def test_edge_sizes_pass(kind: str, implementation: str) -> None:
    layer = make_layer(kind, bidirectional=True)
    x, _ = arguments(layer)
    gradcheck(layer, x)  # states not given
    gradcheck(layer, x[:, 0])  # no batch
    gradcheck(layer, x[:0])
    gradcheck(layer, x[:, :0])
    gradcheck(layer, x, lengths=[0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_long_sequences_and_large_weights_pass(
    kind: str, scale: float, implementation: str
) -> None:
    layer = make_layer(kind)
    with layer.writable() as flat:
        flat *= scale
    x = 10 * np.random.default_rng(1).standard_normal((60, 2, I))
    gradcheck(layer, x, directions=1)


def test_a_relu_kink_within_a_step_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, reference: None
) -> None:
    layer = make_layer("rnn_relu", bias=False)
    x, h0 = arguments(layer)
    row = layer.parameters["weight_ih_l0"][0]
    before = row @ x[0, 0] + layer.parameters["weight_hh_l0"][0] @ h0[0, 0]
    x[0, 0] += row * (1e-4 - before) / (row @ row)  # unit 0 is just above its kink
    assert gradcheck(layer, x, h0).worst.excess <= 1
    module = importlib.import_module("xprnn.diagnostics.gradient_check")
    with monkeypatch.context() as patched, pytest.raises(GradientError):
        patched.setattr(module, "STEPS", module.STEPS[:1])  # this step alone crosses the kink
        gradcheck(layer, x, h0)
    # and a kink within a long step does not excuse a wrong gradient
    inject("rnn_relu", scaled_gate(0, 1.0001), monkeypatch)
    with pytest.raises(GradientError) as caught:
        gradcheck(layer, x, h0)
    wrong = [line.split()[0] for line in str(caught.value).splitlines() if line.endswith("wrong")]
    assert wrong == ["x", "weight_ih_l0", "weight_hh_l0"]  # h0's is computed before the fault


def test_frozen_parameters_are_left_out(implementation: str) -> None:
    layer = make_layer("gru")
    layer.freeze("weight_hh_l0", "bias_ih_l0")
    report = gradcheck(layer, *arguments(layer))
    assert [row.name for row in report.rows] == ["x", "h0", "weight_ih_l0", "bias_hh_l0"]


def test_a_float32_layer_is_checked_on_its_float64_copy(implementation: str) -> None:
    layer = make_layer("lstm", dtype="float32")
    report = gradcheck(layer, *arguments(layer))
    assert all(row.error < 1e-6 * abs(row.analytic) for row in report.rows)
    assert layer.dtype == np.float32


def test_the_analytic_values_are_those_of_backward(implementation: str) -> None:
    layer = make_layer("lstm", bidirectional=True)
    x, (h0, c0) = arguments(layer)
    report = gradcheck(layer, x, (h0, c0), directions=1, seed=5)
    rng = np.random.default_rng(5)
    layer.train()
    output, (h_n, c_n) = layer(x, (h0, c0))
    du, dh, dc = (rng.standard_normal(array.shape) for array in (output, h_n, c_n))
    dx, (dh0, dc0) = layer.backward(du, (dh, dc))
    gradients = {"x": dx, "h0": dh0, "c0": dc0, **layer.grads}
    for row in report.rows:
        d = rng.standard_normal(gradients[row.name].shape)
        expected = (gradients[row.name] * d).sum() / np.linalg.norm(d)
        np.testing.assert_allclose(row.analytic, expected, rtol=1e-12)


def test_the_layer_is_unchanged(implementation: str) -> None:
    layer = make_layer("gru", num_layers=2, dropout=0.5).train()
    x, h0 = arguments(layer)
    for _ in range(2):
        output, _ = layer(x, h0)
    layer.backward(np.ones_like(output))
    before = copy.deepcopy(layer.__getstate__())
    x_before, h_before = x.copy(), h0.copy()
    records = list(layer._records)
    gradcheck(layer, x, h0, directions=1)
    np.testing.assert_equal(layer.__getstate__(), before)
    np.testing.assert_array_equal(x, x_before)
    np.testing.assert_array_equal(h0, h_before)
    assert layer._records == records
    layer.backward(np.ones_like(output))  # the recorded call can still be used


def test_reports_are_reproducible(implementation: str) -> None:
    layer = make_layer("gru", num_layers=2, dropout=0.5)
    x, h0 = arguments(layer)
    assert gradcheck(layer, x, h0) == gradcheck(layer, x, h0)
    assert gradcheck(layer, x, h0, seed=1) != gradcheck(layer, x, h0)


def test_it_runs_without_conversion_to_numpy(fake_cupy: Backend) -> None:
    layer = make_layer("gru", bidirectional=True, backend=fake_cupy.name)
    x, h0 = (fake_cupy.from_host(array) for array in arguments(layer))
    on_numpy = gradcheck(make_layer("gru", bidirectional=True), to_numpy(x), to_numpy(h0))
    for row, expected in zip(gradcheck(layer, x, h0).rows, on_numpy.rows, strict=True):
        np.testing.assert_allclose(row.analytic, expected.analytic, rtol=1e-10)


# -- injected faults


@pytest.mark.parametrize("kind, fault", FAULTS)
def test_an_injected_fault_is_detected(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch, reference: None
) -> None:
    layer, cell = make_layer(kind), make_cell(kind)
    inject(kind, FAULTS[kind, fault], monkeypatch)
    with pytest.raises(GradientError, match="wrong gradient of"):
        gradcheck(layer, *arguments(layer))
    with pytest.raises(GradientError, match="wrong gradient of"):
        gradcheck(cell, *cell_arguments(cell))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_a_few_parts_in_a_million_is_detected(
    kind: str, monkeypatch: pytest.MonkeyPatch, reference: None
) -> None:
    # 5e-6 is more than the 1e-6 that the tolerance allows for truncation errors
    layer = make_layer(kind)
    inject(kind, scaled_state(0, 1 + 5e-6), monkeypatch)
    with pytest.raises(GradientError):
        gradcheck(layer, *arguments(layer))


def test_only_wrong_gradients_are_named(monkeypatch: pytest.MonkeyPatch, reference: None) -> None:
    layer = make_layer("gru_reset_before")
    inject("gru_reset_before", plain_product, monkeypatch)
    with pytest.raises(GradientError) as caught:
        gradcheck(layer, *arguments(layer))
    first, _, *table = str(caught.value).splitlines()
    assert first == "GRU: wrong gradient of weight_hh_l0"
    assert [line.split()[0] for line in table] == ["x", "h0", *layer.parameters]
    assert [line.split()[0] for line in table if line.endswith("wrong")] == ["weight_hh_l0"]


def test_another_dropout_mask_in_backward_is_detected(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    layer = make_layer("gru", num_layers=2, dropout=0.4)
    original = xprnn.engine.stack.backward

    def broken(stack: Any, tape: Any, *rest: Any) -> Any:
        seed, call = tape.dropout_key
        vars(tape)["dropout_key"] = (seed, call + 1)
        return original(stack, tape, *rest)

    monkeypatch.setattr(xprnn.engine.stack, "backward", broken)
    with pytest.raises(GradientError, match="weight_ih_l0"):
        gradcheck(layer, *arguments(layer))


def test_nan_gradients_are_wrong(monkeypatch: pytest.MonkeyPatch, reference: None) -> None:
    layer = make_layer("lstm")
    inject("lstm", scaled_gate(2, np.nan), monkeypatch)
    with pytest.raises(GradientError, match="weight_ih_l0"):
        gradcheck(layer, *arguments(layer))


# -- the report and the errors


def test_the_report_is_a_table() -> None:
    good = Row("x", 1.0, 1.0, 1e-12, 1e-11)
    bad = Row("weight_hh_l0", -0.5, 0.25, 0.75, 1e-10)
    report = GradcheckReport((good, bad))
    assert report.worst is bad
    assert str(report).splitlines() == [
        "                   analytic        numeric     error  tolerance",
        "x              1.000000e+00   1.000000e+00   1.0e-12    1.0e-11",
        "weight_hh_l0  -5.000000e-01   2.500000e-01   7.5e-01    1.0e-10  wrong",
    ]


def test_arguments_that_do_not_fit_are_refused() -> None:
    layer, cell = make_layer("lstm"), make_cell("gru")
    x, (h0, c0) = arguments(layer)
    with pytest.raises(TypeError, match="layer: expected an RNN, GRU, LSTM"):
        gradcheck(xprnn.Linear(2, 3), x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x: expected dtype float64, got int64"):
        gradcheck(layer, np.ones((T, N, I), np.int64))
    with pytest.raises(TypeError, match="x: expected a float64 array"):
        gradcheck(layer, None)
    with pytest.raises(ValueError, match="x: expected shape"):
        gradcheck(layer, x[..., :2])
    with pytest.raises(TypeError, match="h0, c0: expected a tuple"):
        gradcheck(layer, x, h0)
    with pytest.raises(TypeError, match="c0: expected a float64 array"):
        gradcheck(layer, x, (h0, "c0"))
    with pytest.raises(ValueError, match="lengths: expected 0 to 4"):
        gradcheck(layer, x, (h0, c0), lengths=[1, 2, 5])
    with pytest.raises(TypeError, match="lengths: expected None, a GRUCell runs one step"):
        gradcheck(cell, x[0], lengths=[1, 1, 1])
    with pytest.raises(ValueError, match="directions: expected at least 1"):
        gradcheck(layer, x, directions=0)
    with pytest.raises(TypeError, match="seed"):
        gradcheck(layer, x, seed=0.5)  # type: ignore[arg-type]
    gradcheck(layer, x, (h0, c0), directions=1)  # and it still works
    report = gradcheck(layer, x, (h0, None), directions=1)
    assert report == gradcheck(layer, x, (h0, c0 * 0.0), directions=1)
