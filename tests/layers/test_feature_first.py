"""The (features, batch, time) interface: published values, and gradients by finite differences."""

import json
from pathlib import Path

import numpy as np
import pytest

from xprnn import feature_first as ff

FILE = Path(__file__).parents[1] / "data" / "reference_values.json"
GOLDEN = json.loads(FILE.read_text("utf-8"))


def inputs(case):
    case_data = GOLDEN[case]
    parameters = {k: np.array(v) for k, v in case_data["parameters"].items()}
    return np.array(case_data["x"]), np.array(case_data["a0"]), parameters


def check(case, results):
    """Compare every published element to its published digits."""
    for name, (index, value) in GOLDEN[case]["expected"].items():
        expected, actual = np.array(value), results[name][tuple(index)]
        decimals = max(len(repr(v).partition(".")[2]) for v in np.ravel(value).tolist())
        tolerance = max(0.5 * 10.0**-decimals, 1e-13 * np.abs(expected).max())
        assert actual.shape == expected.shape, name
        assert np.abs(actual - expected).max() <= tolerance * (1 + 1e-6), name
    for name, shape in GOLDEN[case]["shapes"].items():
        assert results[name].shape == tuple(shape), name


def test_cell_forward_golden(implementation):
    a_next, yt_pred, _ = ff.rnn_cell_forward(*inputs("rnn_cell_forward"))
    check("rnn_cell_forward", {"a_next": a_next, "yt_pred": yt_pred})


def test_cell_backward_golden(implementation):
    _, _, cache = ff.rnn_cell_forward(*inputs("rnn_cell_backward"))
    upstream = np.array(GOLDEN["rnn_cell_backward"]["upstream"])
    results = ff.rnn_cell_backward(upstream, cache)
    assert set(results) == {"dxt", "da_prev", "dWax", "dWaa", "dba"}
    check("rnn_cell_backward", results)


def test_forward_golden(implementation):
    a, y_pred, caches = ff.rnn_forward(*inputs("rnn_forward"))
    check("rnn_forward", {"a": a, "y_pred": y_pred, "x": caches[1]})


def test_backward_golden(implementation):
    _, _, caches = ff.rnn_forward(*inputs("rnn_backward"))
    results = ff.rnn_backward(np.array(GOLDEN["rnn_backward"]["upstream"]), caches)
    assert set(results) == {"dx", "da0", "dWax", "dWaa", "dba"}
    check("rnn_backward", results)


@pytest.mark.parametrize("case", ["rnn_cell_backward", "rnn_backward"])
def test_the_published_values_detect_a_wrong_sign(case):
    x, a0, parameters = inputs(case)
    upstream = -np.array(GOLDEN[case]["upstream"])
    if case == "rnn_backward":
        results = ff.rnn_backward(upstream, ff.rnn_forward(x, a0, parameters)[2])
    else:
        results = ff.rnn_cell_backward(upstream, ff.rnn_cell_forward(x, a0, parameters)[2])
    with pytest.raises(AssertionError):
        check(case, results)


def random_problem(steps):
    rng = np.random.default_rng(3)
    n_x, n_a, n_y, m = 3, 4, 2, 5
    time = () if steps is None else (steps,)
    values = {
        "x": rng.standard_normal((n_x, m, *time)),
        "a0": rng.standard_normal((n_a, m)),
        "Wax": rng.standard_normal((n_a, n_x)),
        "Waa": rng.standard_normal((n_a, n_a)) * 0.5,
        "Wya": rng.standard_normal((n_y, n_a)),
        "ba": rng.standard_normal((n_a, 1)),
        "by": rng.standard_normal((n_y, 1)),
    }
    upstream = rng.standard_normal((n_a, m, *time)), rng.standard_normal((n_y, m, *time))
    return values, upstream, rng


@pytest.mark.parametrize("steps", [None, 1, 4])
def test_all_gradients_with_the_readout_equal_finite_differences(steps, implementation):
    values, (da, dy), rng = random_problem(steps)
    forward = ff.rnn_cell_forward if steps is None else ff.rnn_forward
    backward = ff.rnn_cell_backward if steps is None else ff.rnn_backward

    def run(v):
        return forward(v["x"], v["a0"], {k: v[k] for k in ff.PARAMETERS})

    def loss(v):
        a, y, _ = run(v)
        return (a * da).sum() + (y * dy).sum()

    results = backward(da, run(values)[2], dy=dy)
    if steps is None:
        results["dx"], results["da0"] = results.pop("dxt"), results.pop("da_prev")
    assert set(results) == {f"d{name}" for name in values}
    for name, value in values.items():
        direction = rng.standard_normal(value.shape)
        step = 1e-3
        at = [loss({**values, name: value + k * step * direction}) for k in (-2.0, -1.0, 1.0, 2.0)]
        numeric = (8 * (at[2] - at[1]) - (at[3] - at[0])) / (12 * step)
        analytic = (results[f"d{name}"] * direction).sum()
        assert results[f"d{name}"].shape == value.shape
        assert numeric == pytest.approx(analytic, rel=1e-8), name


def test_writing_arguments_and_results_does_not_change_backward(implementation):
    values, (da, dy), _ = random_problem(4)
    parameters = {k: values[k] for k in ff.PARAMETERS}
    a, y, caches = ff.rnn_forward(values["x"], values["a0"], parameters)
    expected = ff.rnn_backward(da, ff.rnn_forward(values["x"], values["a0"], parameters)[2], dy=dy)
    for array in (a, y, *parameters.values(), values["x"], values["a0"]):
        array[...] = 7.0
    results = ff.rnn_backward(da, caches, dy=dy)
    for name in expected:
        np.testing.assert_array_equal(results[name], expected[name])
    with pytest.raises(RuntimeError, match="has been used"):
        ff.rnn_backward(da, caches)


def test_invalid_arguments_are_named():
    values, (da, _), _ = random_problem(4)
    parameters = {k: values[k] for k in ff.PARAMETERS}
    x, a0 = values["x"], values["a0"]
    with pytest.raises(KeyError, match="missing Waa, by"):
        ff.rnn_forward(x, a0, {k: v for k, v in parameters.items() if k not in ("Waa", "by")})
    with pytest.raises(ValueError, match=r"x: expected shape \(3, m, T_x\), got \(4, 5\)"):
        ff.rnn_forward(a0, a0, parameters)
    with pytest.raises(ValueError, match=r"a0: expected shape \(4, 5\), got \(5, 4\)"):
        ff.rnn_forward(x, a0.T, parameters)
    with pytest.raises(ValueError, match=r"ba: expected shape \(4, 1\), got \(4,\)"):
        ff.rnn_forward(x, a0, {**parameters, "ba": parameters["ba"][:, 0]})
    with pytest.raises(TypeError, match="xt: expected dtype float64, got float32"):
        ff.rnn_cell_forward(x[..., 0].astype(np.float32), a0, parameters)
    caches = ff.rnn_forward(x, a0, parameters)[2]
    with pytest.raises(ValueError, match=r"da: expected shape \(4, 5, 4\), got \(4, 5\)"):
        ff.rnn_backward(da[..., 0], caches)
    assert ff.rnn_backward(da, caches)["dx"].shape == x.shape
