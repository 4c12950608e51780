"""Dropout: a mask depends on (seed, call, layer, t, the caller's row, feature), nothing else."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import (
    LAYERS,
    arguments,
    arrays,
    assert_same,
    backward,
    forward,
    make,
    normal,
    run,
)
from tests.support.tolerances import assert_close
from xprnn import functional
from xprnn.core import dropout

T, N, H = 6, 5, 4
SEED = 11


def mask(
    p: float, key: tuple[int, int, int], time: np.ndarray, row: np.ndarray, features: int
) -> np.ndarray:
    """The result of `apply` for ones (S, F)."""
    ones = np.ones((len(time), features))
    dropout.apply(np, ones, p, key, time, row)
    return ones


def full_mask(
    p: float, call: int = 0, layer: int = 0, seed: int = SEED, shape: Any = (T, N, H)
) -> np.ndarray:
    """The mask (T, N, F) of one call."""
    steps, rows, features = shape
    time, row = np.divmod(np.arange(steps * rows), rows)
    return mask(p, (seed, call, layer), time, row, features).reshape(shape)


def revealing(layers: int = 2, directions: int = 1, p: float = 0.5, **options: Any) -> xprnn.RNN:
    """A layer whose output is the dropout mask before its last layer, features and all.

    The lower layers output relu(1) = 1; the last one, an identity without recurrence, passes it on.
    """
    layer = xprnn.RNN(
        3,
        H,
        layers,
        "relu",
        dropout=p,
        bidirectional=directions == 2,
        **{"seed": SEED, "dtype": "float64", **options},
    )
    state = {name: np.zeros(array.shape) for name, array in layer.parameters.items()}
    for k, d in itertools.product(range(layers), range(directions)):
        suffix = f"_l{k}" + ("_reverse" if d else "")
        if k < layers - 1:
            state[f"bias_ih{suffix}"][...] = 1.0
        else:
            state[f"weight_ih{suffix}"][:, d * H : (d + 1) * H] = np.eye(H)
    layer.load_state_dict(state)
    return layer.train()


X = normal(0, T, N, 3)

# -- the hash


def splitmix(value: int) -> int:
    """The finaliser of SplitMix64, written independently."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % 2**64
    return value ^ (value >> 31)


def kept(p: float, seed: int, call: int, layer: int, t: int, row: int, feature: int) -> bool:
    """Whether one element is kept, computed with Python's integers."""
    golden, root = 0x9E3779B97F4A7C15, 0
    for part in (seed, call, layer):
        root = splitmix(((root ^ part) + golden) % 2**64)
    h = splitmix((t * golden + root) % 2**64)
    h = splitmix(h ^ row * golden % 2**64)
    h = splitmix(h ^ feature * golden % 2**64)
    return h >> 40 >= round(p * 2**24)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("key", [(0, 0, 0), (11, 3, 1), (2**63 - 1, 2**40, 7)])
def test_masks_are_those_of_the_hash(p: float, key: tuple[int, int, int]) -> None:
    """The values are pinned: a saved seed means the same masks in every version."""
    time, row = np.array([0, 1, 99_999, 2**31]), np.array([3, 0, 2**31, 1])
    wanted = [
        [kept(p, *key, int(t), int(n), feature) / (1.0 - p) for feature in range(9)]
        for t, n in zip(time, row, strict=True)
    ]
    np.testing.assert_allclose(mask(p, key, time, row, 9), wanted, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_fraction_and_scale(p: float, dtype: str) -> None:
    """The number kept is within chance, and each is divided by exactly 1 - p."""
    x = np.full((2000, 50), 3.0, dtype)
    dropout.apply(np, x, p, (SEED, 0, 0), np.arange(2000), np.zeros(2000, int))
    values = {0.0} if p == 1.0 else {3.0} if p == 0.0 else {0.0, 3.0}
    scale = 1.0 if p == 1.0 else 1.0 / (1.0 - p)
    scaled = sorted(np.dtype(dtype).type(value) * np.dtype(dtype).type(scale) for value in values)
    assert_same(np.unique(x), np.array(scaled, dtype))
    count, deviation = np.count_nonzero(x), (x.size * p * (1.0 - p)) ** 0.5
    assert abs(count - x.size * (1.0 - p)) <= 5.0 * deviation


def test_masks_are_not_correlated() -> None:
    """Neither for other seeds, calls and layers nor for neighbouring steps, rows and features."""
    shape = (40, 50, 20)
    base = full_mask(0.5, shape=shape)
    others = [
        *(full_mask(0.5, shape=shape, seed=seed) for seed in (0, SEED + 1, SEED + 2**32)),
        *(full_mask(0.5, call, shape=shape) for call in (1, 2, SEED)),
        *(full_mask(0.5, 0, layer, shape=shape) for layer in (1, 2)),
        full_mask(0.5, 1, 0, 0, shape),
        full_mask(0.5, 0, SEED, 0, shape),
        *(np.roll(base, 1, axis) for axis in range(3)),
        base.transpose(0, 2, 1).reshape(shape),
        base[::-1],
    ]
    for k, other in enumerate(others):
        agree = np.count_nonzero(base == other) - base.size / 2
        assert abs(agree) < 5.0 * base.size**0.5 / 2, k
    for axis in range(3):  # no step, row or feature is dropped or kept entirely
        lines = (base != 0.0).mean(axis)
        assert lines.min() > 0.0
        assert lines.max() < 1.0


# -- the masks of a layer


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_layer_uses_the_mask_of_its_call(
    dtype: str, directions: int, implementation: str
) -> None:
    layer = revealing(directions=directions, dtype=dtype)
    for call in range(3):
        output, _ = layer(X.astype(dtype))
        wanted = full_mask(0.5, call, shape=(T, N, directions * H))
        assert_same(output, wanted.astype(dtype), f"call {call}")


def test_every_gap_between_layers_has_its_own_mask(implementation: str) -> None:
    """The middle layer outputs relu(1) again, so the output shows the last mask only."""
    output, _ = revealing(layers=3)(X)
    assert_same(output, full_mask(0.5, layer=1))


def test_lengths_and_order_do_not_change_the_mask(implementation: str) -> None:
    wanted = full_mask(0.5)
    for lengths in itertools.permutations([T, 4, 4, 1, 0]):
        output, _ = revealing()(X, lengths=lengths)
        inside = np.arange(T)[:, None] < np.array(lengths)
        np.testing.assert_array_equal(output, wanted * inside[:, :, None])


def test_masks_follow_the_order_of_the_rows() -> None:
    """A mask depends on a row's index in the caller's batch, not on where the row is packed."""
    time, row = np.divmod(np.arange(T * N), N)
    plain = mask(0.5, (SEED, 0, 0), time, row, H)
    order = np.random.default_rng(0).permutation(T * N)
    assert_same(mask(0.5, (SEED, 0, 0), time[order], row[order], H), plain[order])


def test_other_layouts_and_sizes_use_the_same_mask(implementation: str) -> None:
    wanted = full_mask(0.5)
    output, _ = revealing(batch_first=True)(X.transpose(1, 0, 2))
    assert_same(output, np.ascontiguousarray(wanted.transpose(1, 0, 2)))
    output, _ = revealing()(X[:, 0])
    assert_same(output, wanted[:, 0])
    output, _ = revealing()(X[:3, :2])
    assert_same(output, wanted[:3, :2])


def test_only_recorded_calls_advance_the_mask(implementation: str) -> None:
    layer = revealing()
    assert_same(layer(X)[0], full_mask(0.5, 0))
    layer.eval()
    assert_same(layer(X)[0], np.ones((T, N, H)))
    with pytest.raises(TypeError):
        layer(None)
    layer.train()
    with pytest.raises(ValueError):
        layer(X[..., :1])
    assert_same(layer(X)[0], full_mask(0.5, 1))
    layer.backward(np.ones((T, N, H)))
    layer.eval().train()
    assert_same(layer(X)[0], full_mask(0.5, 2))


@pytest.mark.parametrize("way", ["pickle", "copy", "deepcopy", "file", "to"])
def test_copies_and_files_keep_the_call_counter(
    way: str, tmp_path: Path, implementation: str
) -> None:
    layer = revealing()
    for _ in range(3):
        layer(X)
    if way == "file":
        layer.save(tmp_path / "a")
        twin = xprnn.load(tmp_path / "a").train()
    elif way == "to":
        twin = layer.eval().to(dtype="float32").to(dtype="float64").train()
    else:
        copied = {"copy": copy.copy, "deepcopy": copy.deepcopy}
        twin = copied[way](layer) if way in copied else pickle.loads(pickle.dumps(layer))
    assert_same(twin(X)[0], full_mask(0.5, 3))


def test_the_seed_determines_the_masks(implementation: str) -> None:
    assert_same(revealing(seed=5)(X)[0], full_mask(0.5, seed=5))
    assert not np.array_equal(full_mask(0.5, seed=5), full_mask(0.5, seed=6))
    big = 2**63 - 1
    assert_same(revealing(seed=big)(X)[0], full_mask(0.5, seed=big))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_dropped_with_p_0_in_eval_mode_or_from_a_single_layer(
    name: str, implementation: str
) -> None:
    plain = make(name, num_layers=2)
    inputs = arguments(plain, T, N)
    assert_same(run(make(name, num_layers=2, dropout=0.0), inputs), run(plain, inputs))
    evaluated = forward(plain.eval(), inputs)
    assert_same(forward(make(name, num_layers=2, dropout=1.0).eval(), inputs), evaluated)
    one = arguments(make(name), T, N)
    with pytest.warns(UserWarning, match="no effect"):
        single = make(name, dropout=0.5)
    assert_same(run(single, one), run(make(name), one))


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.GRU, xprnn.LSTM])
def test_dropout_of_a_single_layer_warns_once_where_it_is_built(kind: Any, tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match=r"dropout=0\.5 has no effect with num_layers=1") as caught:
        layer = kind(3, 4, dropout=0.5, seed=0)
    (warning,) = caught
    assert warning.filename == __file__, "the line that builds the layer"
    layer.save(tmp_path / "a")
    twins = [
        xprnn.load(tmp_path / "a"),
        copy.copy(layer),
        copy.deepcopy(layer),
    ]
    twins.append(pickle.loads(pickle.dumps(layer)).to(dtype="float64"))
    assert [twin.dropout for twin in twins] == [0.5] * 4
    kind(3, 4, dropout=0.0), kind(3, 4, 2, dropout=0.5)


@pytest.mark.parametrize("name", LAYERS)
def test_with_p_1_the_upper_layer_receives_zeros(name: str, implementation: str) -> None:
    layer = make(name, num_layers=2, dropout=1.0)
    inputs = arguments(layer, T, N)
    for gradient in inputs:
        if gradient.startswith("d") and gradient != "doutput":
            inputs[gradient][0] = 0.0  # none from the lower layer's own states
    output = forward(layer, inputs)[0].copy()
    dx, dinitial = backward(layer, inputs)
    for array in (dx, layer.grads["weight_ih_l0"], layer.grads["weight_ih_l1"]):
        np.testing.assert_array_equal(array, 0.0)
    for dstate in arrays(dinitial):
        np.testing.assert_array_equal(dstate[0], 0.0)
        assert np.abs(dstate[1]).max() > 0.0
    assert np.abs(layer.grads["weight_hh_l1"]).max() > 0.0
    assert_same(forward(layer, {**inputs, "x": inputs["x"] + 1.0})[0], output)


# -- the gradient


@pytest.mark.parametrize("lengths", [None, (3, 6, 0, 2, 6)], ids=["full", "ragged"])
@pytest.mark.parametrize("name", LAYERS)
def test_backward_uses_the_mask_of_its_call(name: str, lengths: Any, implementation: str) -> None:
    """Two layers with dropout equal two functions with the mask multiplied in between."""
    layer = make(name, num_layers=2, dropout=0.4, seed=SEED)
    inputs = arguments(layer, T, N)
    family = name.partition("_")[0]
    call = getattr(functional, f"{family}_forward")
    options = {**LAYERS[name][1], "lengths": lengths}
    states = ("h", "c") if name == "lstm" else ("h",)

    def part(prefix: str, k: int, suffix: str) -> Any:
        parts = tuple(inputs[f"{prefix}{s}{suffix}"][k : k + 1] for s in states)
        return parts if len(parts) > 1 else parts[0]

    def weights(k: int) -> list[np.ndarray]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [layer.parameters[f"{n}_l{k}"] for n in names]

    for number in range(2):
        actual = run(layer, inputs, lengths=lengths)
        factor = full_mask(0.4, number, shape=(T, N, layer.options["hidden_size"]))
        lower, end0, cache0 = call(inputs["x"], part("", 0, "0"), *weights(0), **options)
        output, end1, cache1 = call(lower * factor, part("", 1, "0"), *weights(1), **options)
        upper = functional.backward(inputs["doutput"], part("d", 1, "_n"), cache1)
        below = functional.backward(upper["dx"] * factor, part("d", 0, "_n"), cache0)
        wanted = [output]
        ends = zip(arrays(end0), arrays(end1), strict=True)
        wanted += [np.concatenate(pair) for pair in ends]
        wanted += [below["dx"]]
        wanted += [np.concatenate([below[f"d{s}0"], upper[f"d{s}0"]]) for s in states]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        wanted += [gradients[f"d{n}"] for gradients in (below, upper) for n in names]
        for k, (one, other) in enumerate(zip(actual, wanted, strict=True)):
            assert_close(one, other, "float64", f"call {number}, array {k}")


def test_recorded_calls_keep_their_own_masks(implementation: str) -> None:
    layer = revealing()
    doutput = normal(4, T, N, H)
    for _ in range(3):
        layer(X)
    for call in (2, 1, 0):  # the last one first; d(bias of the lower layer) is the masked sum
        layer.zero_grad()
        layer.backward(doutput)
        wanted = (doutput * full_mask(0.5, call)).sum((0, 1))
        assert_close(layer.grads["bias_ih_l0"], wanted, "float64", f"call {call}")
