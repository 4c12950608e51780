"""verify for one layer: its own parameters, nothing changed, limits that follow the equations."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest

import xprnn
from tests.support.targets import CELLS, LAYERS, make
from xprnn import kernels
from xprnn.diagnostics.tolerances import EPSILON, tolerance
from xprnn.diagnostics.verification import equations
from xprnn.diagnostics.verification.report import Absent, Row, VerifyReport
from xprnn.diagnostics.verification.suite import verify_cells

pytestmark = pytest.mark.usefixtures("without_numba")  # the same implementations everywhere


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_all_options_pass(name: str) -> None:
    for options in (
        {"dtype": "float32"},
        {"dtype": "float32", "batch_first": True, "bidirectional": True, "num_layers": 2},
        {"dtype": "float32", "compute_dtype": "float16", "num_layers": 2, "dropout": 0.4},
        {"dtype": "float32", "precision": "tf32", "bias": False},
    ):
        layer = make(name, 3, 9, **options)
        layer.freeze("weight_ih_l0")
        shape = (4, 6, 3) if layer.options["batch_first"] else (6, 4, 3)
        report = xprnn.verify(layer, shape, lengths=[3, 0, 6, 1])
        assert report.ok, str(report)
        assert [row.implementation for row in report.rows] == ["reference", "reference"]


@pytest.mark.parametrize("name", CELLS)
def test_cells_pass(name: str) -> None:
    for shape in ((4, 3), (3,), (0, 3)):
        report = xprnn.verify(make(name, 3, 9, dtype="float32"), shape)
        assert report.ok and report.rows[0].check == "float32"


def test_edge_shapes_pass() -> None:
    layer = make("gru", dtype="float32", bidirectional=True)
    for shape in ((0, 2, 3), (4, 0, 3), (1, 1, 3), (5, 3)):
        assert xprnn.verify(layer, shape).ok
    assert xprnn.verify(layer, (4, 3, 3), lengths=[0, 0, 0]).ok


def test_the_layer_and_the_environment_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("gru", num_layers=2, dropout=0.5, dtype="float32", compute_dtype="float16")
    output, _ = layer(np.ones((4, 2, 3), np.float32))
    before, records = copy.deepcopy(layer.__getstate__()), list(layer._records)
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "auto")
    assert xprnn.verify(layer, (4, 2, 3)).ok
    assert os.environ[kernels.ENVIRONMENT_VARIABLE] == "auto"
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE)
    xprnn.verify(layer, (4, 2, 3))
    with pytest.raises(ValueError, match="lengths"):
        xprnn.verify(layer, (4, 2, 3), lengths=[9, 9])
    assert kernels.ENVIRONMENT_VARIABLE not in os.environ
    np.testing.assert_equal(layer.__getstate__(), before)
    assert layer._records == records
    layer.backward(output)


def test_verify_is_reproducible() -> None:
    layer = make("lstm", dtype="float32", num_layers=2, dropout=0.5)
    first = xprnn.verify(layer, (4, 2, 3))
    assert xprnn.verify(layer, (4, 2, 3)) == first
    assert xprnn.verify(layer, (4, 2, 3), seed=1) != first


def test_the_parameters_of_the_layer_are_checked() -> None:
    layer = make("gru", dtype="float32")
    errors = set()
    for scale in (1.0, 1.5):
        with layer.writable() as flat:
            flat *= scale
        errors.add(xprnn.verify(layer, (4, 2, 3)).rows[0].error)
    assert len(errors) == 2
    layer.parameters["bias_hh_l0"] = np.full(15, np.nan, np.float32)
    with pytest.raises(ValueError, match=r"layer: gru's float64 \w+ is not finite"):
        xprnn.verify(layer, (4, 2, 3))


def test_a_comparison_without_significance_is_refused() -> None:
    wild = make("rnn_tanh", 3, 33, dtype="float32")
    with wild.writable() as flat:
        flat *= 12.0  # chaotic: rounding errors become as large as the values
    with pytest.raises(ValueError, match=r"shape: rounding to float32 alone may change .* by \d+%"):
        xprnn.verify(wild, (300, 2, 3))


def test_gradients_of_relu_are_left_out_where_rounding_determines_them() -> None:
    seen = set()
    for seed in range(6):
        layer = make("rnn_relu", 3, 9, dtype="float32", compute_dtype="float16", seed=seed)
        report = xprnn.verify(layer, (6, 3, 3))
        assert report.ok, str(report)
        left_out = "float16 gradients" in {one.check for one in report.absent}
        assert not (left_out and report.rows[0].array.startswith("d"))
        seen.add(left_out)
        wide = xprnn.verify(layer.to(compute_dtype="float32"), (6, 3, 3))
        assert [one.check for one in wide.absent] == [
            one.check for one in report.absent if one.check != "float16 gradients"
        ]
    assert seen == {True, False}


def test_arguments_that_do_not_fit_are_refused() -> None:
    layer, cell = make("gru"), make("gru_cell")
    with pytest.raises(TypeError, match="layer: expected an RNN, GRU, LSTM or one of their cells"):
        xprnn.verify(xprnn.Linear(2, 3), (4, 2))  # type: ignore[arg-type]
    for shape in [(4, 2, 5), (3,), (1, 4, 2, 3), ()]:
        with pytest.raises(ValueError, match="shape: expected"):
            xprnn.verify(layer, shape)
    with pytest.raises(TypeError, match="shape: expected a tuple of integers"):
        xprnn.verify(layer, 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lengths: expected None, a GRUCell runs one step"):
        xprnn.verify(cell, (2, 3), lengths=[1, 1])
    with pytest.raises(ValueError, match="lengths: expected 0 to 4"):
        xprnn.verify(layer, (4, 2, 3), lengths=[1, 5])
    with pytest.raises(TypeError, match="seed"):
        xprnn.verify(layer, (4, 2, 3), seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend: expected"):
        verify_cells("tpu")


# -- the report


def test_the_report_is_a_table() -> None:
    good = Row("gru", "reference", "float16", 0.5, "dx", 4.9)
    bad = Row("gru", "pointwise", "bfloat16", np.inf, "dweight_hh_l0[z]", 4.9)
    differences = Row("gru", "pointwise", "gradcheck", 1.25, "weight_hh_l0", 1.0)
    missing = [("gru", "no kernel"), ("lstm", "none"), ("gru", "no kernel"), ("rnn", "no kernel")]
    absent = tuple(Absent("sequence", *one) for one in missing)  # float16's and bfloat16's, say
    report = VerifyReport("every cell", (good, bad, differences), absent)
    assert not report.ok and report.failed == (bad, differences)
    lines = [" ".join(line.split()) for line in str(report).splitlines()]
    assert [*lines[:5], lines[-1]] == [
        "every cell",
        "cell implementation type error in limit",
        "gru reference float16 0.5 eps dx 4.9 eps ok",
        "gru pointwise bfloat16 inf eps dweight_hh_l0[z] 4.9 eps FAILED",
        "gru pointwise gradcheck 1.25 weight_hh_l0 1 FAILED",
        "not compared: sequence of gru, rnn: no kernel; of lstm: none",
    ]
    assert "in units of eps" in " ".join(lines)
    assert VerifyReport("", (good,), ()).ok
    assert not VerifyReport("", (), absent).ok


def test_epsilon_is_the_spacing_at_one() -> None:
    for name in ("float64", "float32", "float16"):
        assert EPSILON[name] == np.finfo(name).eps
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert EPSILON["bfloat16"] == float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)


def test_a_limit_is_the_tables_unless_the_equations_amplify_errors() -> None:
    calm = equations.Equations(make("lstm", 3, 17, dtype="float32"), (5, 4, 3), None, 0)
    table = tolerance("float32", steps=5, width=20, layers=1)
    assert table <= min(calm.limits.values()) <= max(calm.limits.values()) < 2 * table
    wild = make("rnn_tanh", 3, 17, dtype="float32")
    with wild.writable() as flat:
        flat *= 6.0
    magnified = equations.Equations(wild, (30, 4, 3), None, 0)
    assert max(magnified.limits.values()) > 10 * tolerance("float32", steps=30, width=20, layers=1)
    assert xprnn.verify(wild, (30, 4, 3)).ok
