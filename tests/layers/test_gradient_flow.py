"""gradient_flow: norms against closed forms and against torch's graph, and its verdicts."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.backend import Backend, to_numpy
from xprnn.diagnostics.gradient_norms import GradientFlow, gradient_flow

I, H = 3, 4  # noqa: E741
RNG_SEED = 7


def random_orthogonal(size: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(RNG_SEED).standard_normal((size, size)))
    return q


def elman(radius: float, **options: Any) -> Any:
    """An Elman layer whose recurrent matrix is orthogonal times `radius`."""
    layer = xprnn.RNN(I, H, dtype="float64", seed=0, **options)
    layer.parameters["weight_hh_l0"] = radius * random_orthogonal(H)
    return layer


@pytest.mark.parametrize("c", [0.5, 1.0, 1.5])
def test_a_linear_layer_gives_powers(c: float) -> None:
    # with positive inputs, weights and states relu is the identity and each factor is c
    layer = xprnn.RNN(I, H, nonlinearity="relu", bias=False, dtype="float64", seed=0)
    layer.parameters["weight_hh_l0"] = c * np.eye(H)
    layer.parameters["weight_ih_l0"] = abs(layer.parameters["weight_ih_l0"])
    x = np.random.default_rng(1).uniform(0.1, 1.0, (12, 5, I))
    dh_n = np.random.default_rng(2).standard_normal((1, 5, H))
    flow = gradient_flow(layer, x, dhx=dh_n)
    powers = c ** np.arange(11.0, -1.0, -1.0)
    np.testing.assert_allclose(flow.norms, [np.linalg.norm(dh_n) * powers], rtol=1e-12)
    np.testing.assert_allclose(flow.ratios, [c**11], rtol=1e-12)
    np.testing.assert_allclose(flow.factors, [c], rtol=1e-12)
    np.testing.assert_allclose(gradient_flow(layer, x).norms, [5**0.5 * powers], rtol=1e-12)


def torch_norms(
    torch: Any, layer: Any, x: np.ndarray, hx: Any, lengths: Any, doutput: np.ndarray, dhx: Any
) -> np.ndarray:
    """The same norms from torch's graph: one cell call a step, every row by itself."""
    name, net = type(layer).__name__, layer._spec
    D, T = net.num_directions, len(x)
    weights = layer._spec.weights({n: torch.tensor(p) for n, p in layer.parameters.items()})
    cell = {"RNN": torch.rnn_tanh_cell, "GRU": torch.gru_cell, "LSTM": torch.lstm_cell}[name]
    squares = np.zeros((net.num_layers * D, T))
    for row, length in enumerate(lengths):
        start = [torch.tensor(state[:, row : row + 1]) for state in hx]
        current = [torch.tensor(x[t, row : row + 1]) for t in range(length)]
        retained: list[tuple[int, int, Any]] = []
        loss = torch.zeros(())
        for layer_index in range(net.num_layers):
            outputs = []
            for d in range(D):
                k = layer_index * D + d
                state, hidden_states = tuple(s[k] for s in start), {}
                for t in reversed(range(length)) if d else range(length):
                    hidden = state if len(state) > 1 else state[0]
                    state = cell(current[t], hidden, *weights[layer_index][d])
                    state = state if isinstance(state, tuple) else (state,)
                    # a copy: its gradient is what comes from later, not from h_t = o tanh(c_t)
                    state = tuple(s.clone().requires_grad_() for s in state)
                    for s in state:
                        s.retain_grad()
                        retained.append((k, t, s))
                    hidden_states[t] = state[0]
                loss = loss + sum(
                    (torch.tensor(ds[k, row]) * s[0]).sum()
                    for ds, s in zip(dhx, state, strict=True)
                )
                outputs.append(hidden_states)
            current = [
                torch.cat([hidden_states[t] for hidden_states in outputs], dim=1)
                for t in range(length)
            ]
        for t in range(length):
            loss = loss + (torch.tensor(doutput[t, row]) * current[t][0]).sum()
        if length:
            loss.backward()
        for k, t, s in retained:
            squares[k, t] += float((s.grad**2).sum())
    return np.sqrt(squares)


@pytest.mark.parametrize("lengths", [None, [6, 0, 4]], ids=["full", "ragged"])
@pytest.mark.parametrize("layers, bidirectional", [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_norms_are_those_of_torchs_graph(
    name: str, layers: int, bidirectional: bool, lengths: Any, implementation: str
) -> None:
    torch = pytest.importorskip("torch")
    layer = getattr(xprnn, name)(
        I, H, layers, bidirectional=bidirectional, dtype="float64", seed=RNG_SEED
    )
    rng = np.random.default_rng(3)
    T, N, D = 6, 3, 2 if bidirectional else 1
    x, doutput = rng.standard_normal((T, N, I)), rng.standard_normal((T, N, D * H))
    count = len(layer._spec.cell.state_names)
    hx = tuple(rng.standard_normal((layers * D, N, H)) for _ in range(count))
    dhx = tuple(rng.standard_normal((layers * D, N, H)) for _ in range(count))

    def plain(states: tuple[Any, ...]) -> Any:
        return states if count > 1 else states[0]

    flow = gradient_flow(layer, x, plain(hx), lengths=lengths, doutput=doutput, dhx=plain(dhx))
    expected = torch_norms(torch, layer, x, hx, lengths or [T] * N, doutput, dhx)
    np.testing.assert_allclose(flow.norms, expected, rtol=1e-10)


@pytest.mark.parametrize(
    "radius, verdict", [(0.8, "vanishing"), (1.0, "stable"), (1.3, "exploding")]
)
def test_the_verdict_follows_the_radius(radius: float, verdict: str) -> None:
    # with tiny states tanh is the identity
    x = 1e-9 * np.random.default_rng(4).standard_normal((50, 2, I))
    layer = elman(radius, bias=False)
    flow = gradient_flow(layer, x)
    assert flow.verdicts == (verdict,)
    np.testing.assert_allclose(flow.factors, [radius], rtol=1e-6)
    np.testing.assert_allclose(flow.ratios, flow.norms[:, 0] / flow.norms[:, -1])
    np.testing.assert_allclose(flow.spectral_radius, [[radius]], rtol=1e-12)


def test_with_a_saturated_tanh_the_gradient_vanishes_at_any_radius() -> None:
    x = 20 * np.random.default_rng(4).standard_normal((50, 2, I))
    assert gradient_flow(elman(1.3), x).verdicts == ("vanishing",)


def test_the_limits_of_the_verdict_are_a_hundredth_and_a_hundred() -> None:
    x = np.zeros((3, 1, I))
    for ratio, verdict in [
        (0.0099, "vanishing"),
        (0.0101, "stable"),
        (99.0, "stable"),
        (101.0, "exploding"),
    ]:
        flow = gradient_flow(elman(ratio**0.5, bias=False), x)
        np.testing.assert_allclose(flow.ratios, ratio)
        assert flow.verdicts == (verdict,)


def test_by_default_each_layer_and_direction_is_measured_alone() -> None:
    layer = xprnn.GRU(I, H, 2, bidirectional=True, dropout=0.3, dtype="float64", seed=0)
    x = np.random.default_rng(5).standard_normal((9, 3, I))
    flow = gradient_flow(layer, x)
    assert flow.names == ("l0", "l0_reverse", "l1", "l1_reverse")
    np.testing.assert_allclose(flow.norms[[0, 2], -1], 3**0.5)  # one for each of three rows
    np.testing.assert_allclose(flow.norms[[1, 3], 0], 3**0.5)
    drawn = np.random.default_rng(0).standard_normal((4, 3, H))
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    for k in range(4):
        alone = np.where(np.arange(4)[:, None, None] == k, drawn, 0.0)
        np.testing.assert_allclose(gradient_flow(layer, x, dhx=alone).norms[k], flow.norms[k])
    together = gradient_flow(layer, x, dhx=drawn)
    np.testing.assert_allclose(together.norms[2:], flow.norms[2:])
    assert together.norms[0, 0] > 2 * flow.norms[0, 0]  # the upper layer adds its share
    assert together.norms[1, -1] > 2 * flow.norms[1, -1]


def test_a_reverse_direction_is_measured_from_its_own_last_state() -> None:
    layer = xprnn.RNN(I, H, bidirectional=True, bias=False, dtype="float64", seed=0)
    layer.parameters["weight_hh_l0"] = 0.5 * random_orthogonal(H)
    layer.parameters["weight_hh_l0_reverse"] = 2.0 * random_orthogonal(H)
    flow = gradient_flow(layer, np.zeros((11, 1, I)))
    np.testing.assert_allclose(flow.norms[0], 0.5 ** np.arange(10.0, -1.0, -1.0))
    np.testing.assert_allclose(flow.norms[1], 2.0 ** np.arange(11.0))
    np.testing.assert_allclose(flow.ratios, [0.5**10, 2.0**10])
    np.testing.assert_allclose(flow.factors, [0.5, 2.0])
    assert flow.verdicts == ("vanishing", "exploding")


def test_steps_before_the_gradient_enters_do_not_count() -> None:
    layer = elman(0.5, bias=False)
    doutput = np.zeros((10, 2, H))
    doutput[6] = 1.0
    flow = gradient_flow(layer, np.zeros((10, 2, I)), doutput=doutput)
    np.testing.assert_allclose(flow.norms[0, 7:], 0.0)
    np.testing.assert_allclose(flow.ratios, [0.5**6])
    np.testing.assert_allclose(flow.factors, [0.5])


def test_rows_that_join_later_do_not_count_as_growth() -> None:
    layer = elman(1.0, bias=False)
    x = np.zeros((5, 100, I))
    flow = gradient_flow(layer, x, lengths=[5] + [2] * 99)
    np.testing.assert_allclose(flow.norms, [[10.0, 10.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(flow.ratios, [1.0])


@pytest.mark.parametrize(
    "name, gates", [("RNN", ("",)), ("GRU", ("r", "z", "n")), ("LSTM", "ifgo")]
)
def test_the_spectral_radius_is_that_of_each_gates_block(name: str, gates: Any) -> None:
    layer = getattr(xprnn, name)(I, H, 2, dtype="float64", seed=0)
    rotated = random_orthogonal(H)
    for index in range(2):
        blocks = [(g + 1 + 10 * index) * rotated for g in range(len(gates))]
        layer.parameters[f"weight_hh_l{index}"] = np.concatenate(blocks)
    flow = gradient_flow(layer, np.zeros((2, 1, I)))
    expected = np.arange(1.0, len(gates) + 1)
    np.testing.assert_allclose(flow.spectral_radius, [expected, expected + 10])
    assert flow.gates == tuple(gates)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_the_layer_is_unchanged(name: str, implementation: str) -> None:
    layer = getattr(xprnn, name)(I, H, 2, dropout=0.5, seed=0).train()
    x = np.random.default_rng(6).standard_normal((5, 2, I)).astype(np.float32)
    output, _ = layer(x)
    before, records = copy.deepcopy(layer.__getstate__()), list(layer._records)
    flow = gradient_flow(layer, x)
    assert flow.norms.dtype == np.float64
    np.testing.assert_equal(layer.__getstate__(), before)
    assert layer._records == records
    layer.backward(np.ones_like(output))


@pytest.mark.parametrize("shape", [(0, 2, I), (1, 2, I), (5, 0, I), (5, I)])
def test_edge_sizes(shape: tuple[int, ...]) -> None:
    layer = xprnn.LSTM(I, H, bidirectional=True, dtype="float64", seed=0)
    flow = gradient_flow(layer, np.ones(shape))
    assert flow.norms.shape == (2, shape[0])
    if shape == (5, I):
        batched = gradient_flow(layer, np.ones((5, 1, I)))
        np.testing.assert_allclose(flow.norms, batched.norms)
        assert (flow.norms > 0).all()
    else:  # no step to measure
        np.testing.assert_array_equal(flow.factors, 1.0)
        assert flow.verdicts == ("stable", "stable")


def test_it_runs_without_conversion_to_numpy(fake_cupy: Backend) -> None:
    options: dict[str, Any] = {"bidirectional": True, "dtype": "float64", "seed": 0}
    x = np.random.default_rng(8).standard_normal((6, 2, I))
    on_numpy = gradient_flow(xprnn.LSTM(I, H, **options), x, lengths=[6, 3])
    layer = xprnn.LSTM(I, H, backend=fake_cupy.name, **options)
    flow = gradient_flow(layer, fake_cupy.from_host(x), lengths=[6, 3])
    np.testing.assert_allclose(flow.norms, on_numpy.norms, rtol=1e-12)
    np.testing.assert_allclose(to_numpy(flow.spectral_radius), on_numpy.spectral_radius)


def test_the_report_is_a_table() -> None:
    flow = GradientFlow(
        names=("l0", "l0_reverse"),
        norms=np.ones((2, 3)),
        ratios=np.array([0.25, 1.5e6]),
        factors=np.array([0.5, 1224.745]),
        spectral_radius=np.array([[0.5, 0.75, 1.0], [1.25, 12.5, 1.75]]),
        gates=("r", "z", "n"),
        verdicts=("stable", "exploding"),
    )
    assert str(flow).splitlines() == [
        "            per step  last to first  radius r  radius z  radius n  verdict",
        "l0            0.5000           0.25    0.5000    0.7500    1.0000  stable",
        "l0_reverse  1224.7450        1.5e+06    1.2500   12.5000    1.7500  exploding",
    ]


def test_arguments_that_do_not_fit_are_refused() -> None:
    layer = xprnn.LSTM(I, H, dtype="float64", seed=0)
    x = np.ones((5, 2, I))
    with pytest.raises(TypeError, match="layer: expected an RNN, GRU or LSTM, got GRUCell"):
        gradient_flow(xprnn.GRUCell(I, H), x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: expected shape"):
        gradient_flow(layer, x[..., :2])
    with pytest.raises(ValueError, match="doutput: expected shape"):
        gradient_flow(layer, x, doutput=np.ones((5, 2, I)))
    with pytest.raises(TypeError, match="dh_n, dc_n: expected a tuple"):
        gradient_flow(layer, x, dhx=np.ones((1, 2, H)))
    with pytest.raises(TypeError, match="doutput: expected dtype float64, got int64"):
        gradient_flow(layer, x, doutput=np.ones((5, 2, H), np.int64))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weight_hh_l1", "weight_ih_l0", "bias_hh_l0_reverse"])
@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.GRU, xprnn.LSTM])
def test_a_diverged_layer_is_named(kind: Any, name: str, value: float) -> None:
    layer = kind(I, H, num_layers=2, bidirectional=True, seed=0)
    changed = layer.parameters[name].copy()
    changed.flat[:2] = value
    layer.parameters[name] = changed
    x = np.ones((5, 2, I), np.float32)
    size = layer.parameters[name].size
    match = f"layer: expected finite parameters, got {name} with 2 of {size} elements infinite"
    for check in (gradient_flow, xprnn.gradcheck):
        with pytest.raises(ValueError, match=match):
            check(layer, x)


@pytest.mark.parametrize("size", [1e30, 1e200])
@pytest.mark.parametrize("options", [{"nonlinearity": "relu"}, {}], ids=["relu", "tanh"])
def test_a_gradient_beyond_float64_explodes(options: dict[str, Any], size: float) -> None:
    layer = xprnn.RNN(I, H, bias=False, dtype="float64", seed=0, **options)
    layer.parameters["weight_hh_l0"] = size * np.eye(H)
    layer.parameters["weight_ih_l0"] = abs(layer.parameters["weight_ih_l0"])
    x = np.zeros((40, 2, I)) if not options else np.ones((40, 2, I))
    flow = gradient_flow(layer, x)
    assert flow.verdicts == ("exploding",)
    assert not np.isfinite(flow.ratios).all()
    np.testing.assert_allclose(flow.spectral_radius, [[size]])
    assert "exploding" in str(flow)
