"""Temporarily frozen parameters in every optimiser, compared with torch by value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.optim import SGD, Adam, AdamW

CASES = {
    "sgd": (SGD, {"lr": 0.05}),
    "momentum": (SGD, {"lr": 0.05, "momentum": 0.9}),
    "adam": (Adam, {"lr": 0.02}),
    "adamw": (AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}
NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
# frozen parameters of the layer and of the read-out, and for how many steps
PHASES: list[tuple[tuple[str, ...], tuple[str, ...], int]] = [
    (NAMES, (), 5),
    (("weight_hh_l0",), ("bias",), 4),
    ((), (), 3),
    (("weight_ih_l0", "bias_ih_l0"), ("weight", "bias"), 2),
    (("bias_hh_l0",), (), 4),
    ((), ("weight",), 3),
]


def modules() -> list[Any]:
    layer = xprnn.GRU(3, 4, dtype="float64", seed=1)
    return [layer, xprnn.Linear(4, 2, dtype="float64", seed=2)]


def freeze(pair: list[Any], *frozen: tuple[str, ...]) -> None:
    for module, names in zip(pair, frozen, strict=True):
        module.unfreeze()
        if names:
            module.freeze(*names)


def set_gradients(pair: list[Any], rng: np.random.Generator) -> None:
    for module in pair:
        for name, gradient in module.grads.items():
            drawn = rng.standard_normal(gradient.shape)
            gradient[...] = 0.0 if name in module.frozen else drawn


@pytest.mark.parametrize("case", CASES)
def test_every_phase_equals_torch(case: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    kind, options = CASES[case]
    pair, rng = modules(), np.random.default_rng(0)
    twins = [
        {n: torch.nn.Parameter(torch.tensor(np.array(p))) for n, p in m.parameters.items()}
        for m in pair
    ]
    ours = kind(pair, **options)
    theirs = getattr(torch.optim, kind.__name__)([p for t in twins for p in t.values()], **options)
    for layer_frozen, readout_frozen, steps in PHASES:
        # another optimiser continues from a file that was written while others were frozen
        ours.save(tmp_path / "state.safetensors")
        freeze(pair, layer_frozen, readout_frozen)
        ours = kind(pair, **options)
        ours.load(tmp_path / "state.safetensors")
        for _ in range(steps):
            set_gradients(pair, rng)
            for module, twin in zip(pair, twins, strict=True):
                for name, p in twin.items():
                    frozen = name in module.frozen
                    p.grad = None if frozen else torch.tensor(np.array(module.grads[name]))
            ours.step()
            theirs.step()
        for module, twin in zip(pair, twins, strict=True):
            for name, p in twin.items():
                wanted = p.detach().numpy()
                error = np.abs(module.parameters[name] - wanted).max()
                assert error <= 1e-13 * np.abs(wanted).max(), (name, layer_frozen)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_first_update_after_a_freeze_is_of_the_learning_rate(kind: Any) -> None:
    layer = xprnn.GRU(3, 4, dtype="float64", seed=1)
    optimizer = kind([layer], lr=0.01, **({"weight_decay": 0.0} if kind is AdamW else {}))
    layer.freeze("weight_ih_l0")
    rng = np.random.default_rng(0)
    for _ in range(50):
        set_gradients([layer], rng)
        optimizer.step()
    layer.unfreeze()
    before = np.array(layer.parameters["weight_ih_l0"])
    set_gradients([layer], rng)
    optimizer.step()
    moved = np.abs(layer.parameters["weight_ih_l0"] - before)
    np.testing.assert_allclose(moved, 0.01, rtol=1e-6)  # eps is small against the gradients


def test_the_state_counts_the_steps_of_each_parameter() -> None:
    pair, rng = modules(), np.random.default_rng(0)
    optimizer = Adam(pair)
    for layer_frozen, readout_frozen, steps in PHASES:
        freeze(pair, layer_frozen, readout_frozen)
        for _ in range(steps):
            set_gradients(pair, rng)
            optimizer.step()
    state = optimizer.state_dict()
    assert state["steps"] == 21
    assert state["0.steps"].tolist() == [14, 12, 14, 12]
    assert state["1.steps"].tolist() == [16, 15]


@pytest.mark.parametrize("case", CASES)
def test_a_state_without_counts_continues(case: str) -> None:
    """As in files of xprnn 0.1.0: every parameter was updated in every step."""
    kind, options = CASES[case]
    pairs = [modules(), modules()]
    uninterrupted = kind(pairs[0], **options)
    rng = np.random.default_rng(0)
    for _ in range(3):
        set_gradients(pairs[0], rng)
        uninterrupted.step()
    state = {n: v for n, v in uninterrupted.state_dict().items() if n not in ("0.steps", "1.steps")}
    assert state["steps"] == 3
    for module, other in zip(*pairs, strict=True):
        other.load_state_dict(module.state_dict())
    resumed = kind(pairs[1], **options)
    pairs[1][0].freeze("bias_ih_l0")  # what it missed before the load is forgotten
    resumed.step()
    pairs[1][0].unfreeze()
    pairs[1][0].load_state_dict(pairs[0][0].state_dict())
    pairs[1][1].load_state_dict(pairs[0][1].state_dict())
    resumed.load_state_dict(state)
    for optimizer, pair in zip((uninterrupted, resumed), pairs, strict=True):
        set_gradients(pair, np.random.default_rng(7))
        optimizer.step()
    for module, other in zip(*pairs, strict=True):
        np.testing.assert_array_equal(module.parameters.flat, other.parameters.flat)


def test_a_state_in_bfloat16_is_accepted() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    linear = xprnn.Linear(2, 3, seed=0)
    optimizer = xprnn.optim.SGD([linear], lr=0.1, momentum=0.5)
    state = optimizer.state_dict()
    values = np.arange(state["0.momentum_buffer"].size, dtype=np.float32)
    optimizer.load_state_dict({**state, "0.momentum_buffer": values.astype(ml_dtypes.bfloat16)})
    np.testing.assert_array_equal(optimizer.state_dict()["0.momentum_buffer"], values)
