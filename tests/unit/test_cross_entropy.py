"""Cross-entropy at every step and with ignored rows, compared with torch by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xprnn import softmax_cross_entropy
from xprnn.backend import Backend

SHAPES = [(6, 5), (4, 3, 5), (2, 3, 4, 5), (1, 1, 1), (3, 7, 2)]


def make_case(shape: tuple[int, ...], ignored: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and targets of which about `share` are ignored, the last one always."""
    rng = np.random.default_rng(len(shape))
    targets = rng.integers(0, shape[-1], shape[:-1])
    targets[rng.random(shape[:-1]) < share] = ignored
    targets[..., -1] = ignored if share else targets[..., -1]
    return 3.0 * rng.standard_normal(shape), targets


def close(actual: Any, wanted: Any, tolerance: float = 1e-13) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * (1 + np.abs(wanted).max()))


@pytest.mark.parametrize("ignored", [-100, 0, 3, 77])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_it_equals_torch(shape: tuple[int, ...], share: float, ignored: int) -> None:
    torch = pytest.importorskip("torch")
    logits, targets = make_case(shape, ignored, share)
    t = torch.tensor(logits, requires_grad=True)
    flat = t.reshape(-1, shape[-1]), torch.tensor(targets.reshape(-1))
    wanted = torch.nn.functional.cross_entropy(*flat, ignore_index=ignored)
    wanted.backward()
    loss, dlogits = softmax_cross_entropy(logits, targets, ignored)
    close(loss, wanted.item())
    close(dlogits, t.grad)
    strided = softmax_cross_entropy(logits.T.copy().T, targets.tolist(), ignore_index=ignored)
    close(strided[0], loss)
    close(strided[1], dlogits)


def test_if_every_row_is_ignored_it_is_as_in_torch() -> None:
    torch = pytest.importorskip("torch")
    logits, targets = make_case((4, 3, 5), -100, 1.0)
    t = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(t.reshape(-1, 5), torch.tensor(targets.ravel()))
    wanted.backward()
    loss, dlogits = softmax_cross_entropy(logits, targets)
    assert np.isnan(loss)
    assert np.isnan(wanted.item())
    assert not dlogits.any()
    assert not t.grad.numpy().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_gradient_equals_finite_differences(shape: tuple[int, ...], share: float) -> None:
    logits, targets = make_case(shape, -100, share)
    if share and (targets == -100).all():
        targets[..., 0] = 0
    direction = np.random.default_rng(9).standard_normal(shape)
    above, below = (
        float(softmax_cross_entropy(logits + h * direction, targets)[0]) for h in (1e-4, -1e-4)
    )
    analytic = float((softmax_cross_entropy(logits, targets)[1] * direction).sum())
    assert (above - below) / 2e-4 == pytest.approx(analytic, rel=1e-6, abs=1e-8)


def test_a_sequence_equals_its_steps_one_by_one() -> None:
    logits, targets = make_case((4, 3, 5), -100, 0.0)
    loss, dlogits = softmax_cross_entropy(logits, targets)
    parts = [softmax_cross_entropy(*pair) for pair in zip(logits, targets, strict=True)]
    close(loss, np.mean([part[0] for part in parts]))
    close(dlogits, np.stack([part[1] for part in parts]) / 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ignored_rows_may_hold_any_value(dtype: str, value: float) -> None:
    logits, targets = make_case((4, 3, 5), -100, 0.4)
    logits = logits.astype(dtype)
    expected = softmax_cross_entropy(logits, targets)
    logits[targets == -100] = value
    kept = logits.copy()
    loss, dlogits = softmax_cross_entropy(logits, targets)
    assert loss.dtype == dlogits.dtype == dtype
    assert loss == expected[0]
    np.testing.assert_array_equal(dlogits, expected[1])
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize("kind", ["int8", "int64", "uint8", "uint64"])
def test_on_a_device(kind: str, fake_cupy: Backend) -> None:
    """On the fake CuPy: the same bits; a target out of range gives NaN without being read."""
    ignored = 4 if kind.startswith("u") else -100
    logits, targets = make_case((4, 3, 5), ignored, 0.4)
    targets = targets.astype(kind)
    on_device = fake_cupy.from_host(logits)
    expected = softmax_cross_entropy(logits, targets, ignored)
    for equal_targets in (fake_cupy.from_host(targets), targets, targets.tolist()):
        loss, dlogits = softmax_cross_entropy(on_device, equal_targets, ignored)
        assert fake_cupy.to_host(loss) == expected[0]
        np.testing.assert_array_equal(fake_cupy.to_host(dlogits), expected[1])
    targets[0, 0] = 5
    loss, _ = softmax_cross_entropy(on_device, fake_cupy.from_host(targets), ignored)
    assert np.isnan(fake_cupy.to_host(loss))


@pytest.mark.parametrize(
    ("shape", "targets", "ignored", "error", "text"),
    [
        ((2, 5), [0, 5], -100, ValueError, "targets: expected 0 to 4, got 0 to 5; .* are -100"),
        ((2, 5), [0, -100], -1, ValueError, "targets: expected 0 to 4, got -100 to 0; .* are -1"),
        ((2, 3, 5), [[0, 1, 2]], -100, ValueError, r"targets: expected \(2, 3\) integers, got int"),
        ((2, 3, 5), [0] * 6, -100, ValueError, r"targets: expected \(2, 3\) integers, got int"),
        ((2, 2, 5), [[0, 1], [0]], -100, ValueError, r"targets: expected \(2, 2\) integers: "),
        ((2, 5), np.ma.array([0, 1]), -100, TypeError, "targets: expected 2 integers, got Masked"),
        ((2, 5), [0, 1], 1.0, TypeError, "ignore_index: expected an integer, got 1.0"),
        ((2, 5), [0, 1], True, TypeError, "ignore_index: expected an integer, got True"),
        ((2, 0), [0, 1], -100, ValueError, "logits: expected at least one row and one class"),
        ((2, 0, 5), [[], []], -100, ValueError, "logits: expected at least one row"),
        ((5,), [0], -100, ValueError, r"logits: expected shape \(N, K\), got \(5,\)"),
    ],
    ids=range(11),
)
def test_invalid_arguments_are_named(
    shape: tuple[int, ...], targets: Any, ignored: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        softmax_cross_entropy(np.zeros(shape), targets, ignored)
