"""The read-out and the losses, compared with torch and float64 differences by value."""

import numpy as np
import pytest

import xprnn
from xprnn import Linear, mse_loss, softmax_cross_entropy


def close(actual, wanted, tolerance=1e-13):
    wanted = np.asarray(wanted)
    assert actual.shape == wanted.shape
    assert np.abs(actual - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (5, 3, 4)])
def test_linear_equals_torch(bias, shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    ours = Linear(4, 2, bias, dtype="float64", seed=1).train()
    theirs = torch.nn.Linear(4, 2, bias, dtype=torch.float64)
    theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.state_dict().items()})
    x, dy = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], 2))
    tx = torch.tensor(x, requires_grad=True)
    y = theirs(tx)
    y.backward(torch.tensor(dy))
    close(ours(x), y.detach())
    close(ours.backward(dy), tx.grad)
    for name, p in theirs.named_parameters():
        close(ours.grads[name], p.grad)


def test_linear_calls_are_a_stack_that_errors_do_not_change():
    rng = np.random.default_rng(0)
    linear = Linear(4, 2, dtype="float64", seed=1)
    with pytest.raises(RuntimeError, match="no recorded call"):
        linear.backward(np.ones((1, 2)))
    linear.train()
    x1, x2 = rng.standard_normal((2, 3, 4))
    dy = rng.standard_normal((3, 2))
    linear(x1)
    linear(x2)
    with pytest.raises(ValueError, match=r"dy: expected shape \(3, 2\), got \(2, 2\)"):
        linear.backward(dy[:2])
    with pytest.raises(TypeError, match="dy: expected dtype float64, got float32"):
        linear.backward(dy.astype(np.float32))
    linear.backward(dy)
    close(linear.grads["weight"], dy.T @ x2)
    linear.backward(dy)
    close(linear.grads["weight"], dy.T @ x2 + dy.T @ x1)
    with pytest.raises(ValueError, match=r"x: expected shape \(\.\.\., 4\), got \(3, 5\)"):
        linear(np.ones((3, 5)))


def test_linear_frozen_weight_gets_no_gradient():
    linear = Linear(4, 2, dtype="float64", seed=1).train()
    linear.freeze("weight")
    linear(np.ones((3, 4)))
    linear.backward(np.ones((3, 2)))
    assert not linear.grads["weight"].any()
    assert linear.grads["bias"].tolist() == [3.0, 3.0]


def test_linear_empty_batch():
    linear = Linear(4, 2, dtype="float64", seed=1).train()
    assert linear(np.empty((0, 4))).shape == (0, 2)
    assert linear.backward(np.empty((0, 2))).shape == (0, 4)
    assert not linear.grads.flat.any()


def test_cross_entropy_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, targets = 3.0 * rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    t = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(t, torch.tensor(targets))
    wanted.backward()
    loss, dlogits = softmax_cross_entropy(logits, targets)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-14)
    close(dlogits, t.grad)


def test_cross_entropy_of_extreme_scores():
    logits = np.array([[1e30, -1e30, 0.0], [-1e30, 0.0, 1e30]], np.float32)
    loss, dlogits = softmax_cross_entropy(logits, [0, 2])
    assert loss.dtype == np.float32
    assert float(loss) == 0.0
    assert not dlogits.any()


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        ([0, 5], ValueError, "targets: expected 0 to 4, got 0 to 5"),
        ([-1, 0], ValueError, "targets: expected 0 to 4, got -1 to 0"),
        ([0], ValueError, r"targets: expected \(2,\) integers"),
        ([0.0, 1.0], ValueError, r"targets: expected \(2,\) integers"),
        ("ab", TypeError, "targets: expected 2 integers, got str"),
    ],
)
def test_cross_entropy_refuses_bad_targets(targets, error, text):
    with pytest.raises(error, match=text):
        softmax_cross_entropy(np.zeros((2, 5)), targets)


def test_losses_refuse_bad_arrays():
    with pytest.raises(TypeError, match="logits"):
        softmax_cross_entropy([[0.0]], [0])
    with pytest.raises(ValueError, match=r"logits: expected shape \(N, K\), got \(3,\)"):
        softmax_cross_entropy(np.zeros(3), [0])
    with pytest.raises(ValueError, match="logits: expected at least one row"):
        softmax_cross_entropy(np.zeros((0, 3)), [])
    with pytest.raises(TypeError, match="prediction"):
        mse_loss([1.0], np.zeros(1))
    with pytest.raises(ValueError, match=r"target: expected shape \(2,\), got \(3,\)"):
        mse_loss(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="prediction: expected at least one"):
        mse_loss(np.zeros((0, 2)), np.zeros((0, 2)))


def test_mse_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    p, target = rng.standard_normal((2, 3, 4))
    t = torch.tensor(p, requires_grad=True)
    wanted = torch.nn.functional.mse_loss(t, torch.tensor(target))
    wanted.backward()
    loss, dprediction = mse_loss(p, target)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-14)
    close(dprediction, t.grad)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gradients_equal_finite_differences(loss):
    rng = np.random.default_rng(1)
    x, direction = rng.standard_normal((2, 4, 3))
    target = rng.standard_normal((4, 3))

    def value(scale):
        if loss == "mse":
            return mse_loss(x + scale * direction, target)
        return softmax_cross_entropy(x + scale * direction, [2, 0, 1, 1])

    step = 1e-4
    numeric = (value(step)[0] - value(-step)[0]) / (2 * step)
    analytic = float((value(0.0)[1] * direction).sum())
    assert numeric == pytest.approx(analytic, rel=1e-7)


def test_linear_is_saved_and_loaded(tmp_path):
    linear = Linear(4, 2, seed=1)
    linear.save(tmp_path / "linear.safetensors")
    loaded = xprnn.load(tmp_path / "linear.safetensors")
    assert isinstance(loaded, Linear)
    np.testing.assert_array_equal(loaded.parameters.flat, linear.parameters.flat)
