"""Accuracy where rounding matters most: closed gates, and sums over very many rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.tolerances import assert_close
from xprnn.cells import lstm as lstm_module
from xprnn.cells import numerics
from xprnn.core import sums

T, N, I, H = 6, 3, 4, 5  # noqa: E741


def closed(kind: str, dtype: str, offset: float) -> tuple[Any, np.ndarray, np.ndarray]:
    """A layer whose first gate (r of a GRU, i of an LSTM) is nearly closed, x and doutput."""
    layer = getattr(xprnn, kind)(I, H, dtype=dtype, seed=3).train()
    bias = np.array(layer.parameters["bias_ih_l0"])
    bias[:H] += offset
    layer.parameters["bias_ih_l0"] = bias
    rng = np.random.default_rng(5)
    x, doutput = rng.standard_normal((T, N, I)), rng.standard_normal((T, N, H))
    return layer, x.astype(dtype), doutput.astype(dtype)


def check_closed_gate(kind: str, dtype: str, offset: float) -> None:
    """Compare the output and every gate's block of every gradient, each by its largest element."""
    torch = pytest.importorskip("torch")
    layer, x, doutput = closed(kind, dtype, offset)
    theirs = getattr(torch.nn, kind)(I, H, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v).double() for k, v in layer.state_dict().items()})
    output, _ = layer(x)
    layer.backward(doutput)
    y, _ = theirs(torch.tensor(x).double())
    y.backward(torch.tensor(doutput).double())
    assert_close(output, y.detach().numpy(), dtype, "output")
    for name, p in theirs.named_parameters():
        blocks = p.grad.numpy().reshape(-1, H, *p.shape[1:])
        for k, (actual, expected) in enumerate(
            zip(layer.grads[name].reshape(blocks.shape), blocks, strict=True)
        ):
            assert_close(np.array(actual), expected, dtype, f"{name}, gate {k}")


@pytest.mark.parametrize("offset", [-10.0, -20.0, -30.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_closed_gate_is_as_accurate_as_an_open_one(
    kind: str, dtype: str, offset: float, implementation: str
) -> None:
    check_closed_gate(kind, dtype, offset)


@pytest.mark.parametrize(("dtype", "offset"), [("float32", -20.0), ("float64", -30.0)])
def test_a_sigmoid_of_absolute_accuracy_is_detected(
    dtype: str, offset: float, monkeypatch: pytest.MonkeyPatch, reference: None
) -> None:
    def by_tanh(xp: Any, a: np.ndarray) -> None:
        a[...] = (1.0 + np.tanh(0.5 * a)) / 2.0

    monkeypatch.setattr(lstm_module, "sigmoid", by_tanh)
    with pytest.raises(AssertionError, match="relative error"):
        check_closed_gate("LSTM", dtype, offset)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 65_536, 1_000_003])
def test_sum_rows(rows: int) -> None:
    a = np.random.default_rng(0).uniform(0.5, 1.5, (rows, 3)).astype(np.float32)
    out = np.full(3, np.nan, np.float32)
    sums.sum_rows(np, a, out)
    expected = a.sum(axis=0, dtype=np.float64)
    # three levels of at most 511 additions; each error is a random walk of half units
    assert np.abs(out - expected).max() <= 8 * 2.0**-24 * np.sqrt(3 * 511) * max(
        expected.max(), 1.0
    )


def test_bias_gradients_over_a_million_rows(implementation: str) -> None:
    layer = xprnn.RNN(1, 2, seed=0).train()
    readout = xprnn.Linear(2, 1, seed=0).train()
    x = np.ones((20, 50_000, 1), np.float32)
    output, _ = layer(x)
    layer.backward(np.ones_like(output), need_dx=False)
    readout(output)
    readout.backward(np.ones((*output.shape[:2], 1), np.float32))
    assert readout.grads["bias"].tolist() == [1e6]
    one = xprnn.RNN(1, 2, dtype="float64", seed=0).train()
    one.load_state_dict(layer.state_dict())
    one(x[:, :1].astype(np.float64))
    one.backward(np.ones((20, 1, 2)))
    for name in ("bias_ih_l0", "bias_hh_l0"):
        expected = 50_000 * one.grads[name]
        assert_close(np.array(layer.grads[name]), expected, "float32", name, steps=20)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("columns", range(1, 17))
def test_sigmoid_of_columns_in_place(columns: int, dtype: str) -> None:
    """NumPy 2.4 wrongly negates float32 numbers 16 bytes apart in place."""
    a = np.random.default_rng(columns).standard_normal((20, columns)).astype(dtype)
    for k in range(columns):
        actual = a.copy()
        numerics.sigmoid(np, actual[:, k : k + 1])
        expected = a.copy()
        expected[:, k] = 1.0 / (1.0 + np.exp(-a[:, k].astype(np.float64)))
        np.testing.assert_allclose(actual, expected, rtol=4 * np.finfo(dtype).eps)
