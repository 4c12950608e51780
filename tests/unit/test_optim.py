"""Optimisers, clipping and decay, compared with torch by value over 50 steps."""

import numpy as np
import pytest

import xprnn
from xprnn.optim import SGD, Adam, AdamW, CosineDecay, clip_grad_norm

STEPS = 50
CASES = {
    "sgd": (lambda m: SGD(m, lr=0.05), "SGD", {"lr": 0.05}),
    "momentum": (lambda m: SGD(m, lr=0.05, momentum=0.9), "SGD", {"lr": 0.05, "momentum": 0.9}),
    "adam": (lambda m: Adam(m, lr=0.02), "Adam", {"lr": 0.02}),
    "adam_betas": (
        lambda m: Adam(m, lr=0.02, betas=(0.8, 0.95), eps=1e-6),
        "Adam",
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adamw": (
        lambda m: AdamW(m, lr=0.02, weight_decay=0.1),
        "AdamW",
        {"lr": 0.02, "weight_decay": 0.1},
    ),
}


def modules():
    layer = xprnn.GRU(3, 4, dtype="float64", seed=1).train()
    return [layer, xprnn.Linear(4, 2, dtype="float64", seed=2).train()]


def set_gradients(pair, rng):
    """The same gradients for both, new ones at every step."""
    ours, theirs = pair
    for module, parameters in zip(ours, theirs, strict=True):
        for name, p in parameters.items():
            g = rng.standard_normal(p.shape)
            module.grads[name][...] = g
            if p.grad is None:
                p.grad = p.detach().clone()
            p.grad.copy_(p.new_tensor(g))


def twins(torch):
    ours = modules()
    theirs = [
        {name: torch.nn.Parameter(torch.tensor(np.array(p))) for name, p in m.parameters.items()}
        for m in ours
    ]
    return ours, theirs


def assert_same(pair, tolerance=1e-13):
    for module, parameters in zip(*pair, strict=True):
        for name, p in parameters.items():
            wanted = p.detach().numpy()
            error = np.abs(module.parameters[name] - wanted).max()
            assert error <= tolerance * np.abs(wanted).max(), name


@pytest.mark.parametrize("case", CASES)
def test_fifty_steps_equal_torch(case):
    torch = pytest.importorskip("torch")
    make, kind, options = CASES[case]
    pair = twins(torch)
    flat = [p for parameters in pair[1] for p in parameters.values()]
    optimizer, other = make(pair[0]), getattr(torch.optim, kind)(flat, **options)
    decay = CosineDecay(optimizer, STEPS - 10, lr_min=0.001)
    other_decay = torch.optim.lr_scheduler.CosineAnnealingLR(other, STEPS - 10, eta_min=0.001)
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        set_gradients(pair, rng)
        norm = clip_grad_norm(pair[0], 3.0)
        other_norm = torch.nn.utils.clip_grad_norm_(flat, 3.0)
        assert abs(norm - float(other_norm)) <= 1e-12 * norm
        optimizer.step()
        other.step()
        if step < STEPS - 10:  # torch's schedule rises again afterwards, ours stays
            decay.step()
            other_decay.step()
            assert optimizer.lr == pytest.approx(other_decay.get_last_lr()[0], rel=1e-12)
    assert_same(pair)
    decay.step()
    assert optimizer.lr == 0.001


@pytest.mark.parametrize("fault", ["lr", "gradient"])
def test_the_comparison_detects_a_fault(fault):
    torch = pytest.importorskip("torch")
    pair = twins(torch)
    flat = [p for parameters in pair[1] for p in parameters.values()]
    ours = Adam(pair[0], lr=0.02 * (1.001 if fault == "lr" else 1.0))
    other = torch.optim.Adam(flat, lr=0.02)
    set_gradients(pair, np.random.default_rng(0))
    if fault == "gradient":
        pair[0][0].grads["weight_hh_l0"][0, 0] *= -1.0
    ours.step()
    other.step()
    with pytest.raises(AssertionError):
        assert_same(pair)


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_continues_exactly(case, tmp_path):
    make = CASES[case][0]
    unbroken, first = modules(), modules()
    rng, again = np.random.default_rng(0), np.random.default_rng(0)

    def advance(optimizer, source, steps):
        for _ in range(steps):
            for module in optimizer.modules:
                for g in module.grads.values():
                    g[...] = source.standard_normal(g.shape)
            optimizer.step()

    uninterrupted = make(unbroken)
    advance(uninterrupted, rng, 8)
    before = make(first)
    advance(before, again, 3)
    before.save(tmp_path / "state.safetensors")
    after = make(first)
    after.load(tmp_path / "state.safetensors")
    advance(after, again, 5)
    for a, b in zip(unbroken, first, strict=True):
        np.testing.assert_array_equal(a.parameters.flat, b.parameters.flat)

    state = before.state_dict()
    copied = make(first)
    copied.load_state_dict(state)
    assert copied.state_dict().keys() == state.keys()
    assert all(np.array_equal(copied.state_dict()[k], state[k]) for k in state)


def test_a_wrong_state_is_refused_completely(tmp_path):
    optimizer = Adam(modules())
    state = optimizer.state_dict()
    del state["0.exp_avg"]
    state["1.exp_avg"] = np.ones(3)
    state["2.exp_avg"] = np.ones(3)
    state["steps"] = 7
    with pytest.raises(ValueError, match=r"missing 0\.exp_avg.*1\.exp_avg.*unexpected 2\.exp_avg"):
        optimizer.load_state_dict(state)
    assert optimizer.steps == 0
    with pytest.raises(ValueError, match="missing 'steps'"):
        optimizer.load_state_dict({})
    SGD(modules(), lr=0.1).save(tmp_path / "sgd.safetensors")
    with pytest.raises(ValueError, match="holds a 'SGD', expected a 'Adam'"):
        optimizer.load(tmp_path / "sgd.safetensors")


def test_frozen_parameters_stay_and_the_others_are_updated():
    free, part = modules()[0], modules()[0]
    part.freeze("weight_hh_l0", "bias_hh_l0")
    kept = {name: np.array(part.parameters[name]) for name in part.parameters}
    for layer in (free, part):
        optimizer = AdamW([layer], lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for name, g in layer.grads.items():
                g[...] = 0.0 if name in layer.frozen else 0.5
            optimizer.step()
    for name in kept:
        same = name in part.frozen
        assert np.array_equal(part.parameters[name], kept[name]) == same
        if not same:
            np.testing.assert_array_equal(part.parameters[name], free.parameters[name])


def test_padding_stays_zero():
    layer = xprnn.GRU(3, 5, seed=0)  # 45, 75, 15, 15 elements: padding after each
    layer.grads.flat[...] = 0.0
    for g in layer.grads.values():
        g[...] = 1.0
    optimizer = AdamW([layer], lr=0.1)
    optimizer.step()
    clip_grad_norm([layer], 0.1)
    for flat, arrays in (
        (layer.parameters.flat, layer.parameters),
        (layer.grads.flat, layer.grads),
    ):
        assert np.count_nonzero(flat) == sum(np.count_nonzero(a) for a in arrays.values())


def test_a_step_counts_as_a_write():
    layer = xprnn.GRU(3, 4, dtype="float64", seed=0).train()
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    layer(x)
    Adam([layer]).step()
    with pytest.raises(RuntimeError, match="parameters were changed"):
        layer.backward()


def test_clipping_keeps_small_gradients_and_scales_huge_ones():
    layer = xprnn.Linear(2, 1, bias=False, seed=0)
    layer.grads["weight"][...] = [[0.3, 0.4]]
    assert float(clip_grad_norm([layer], 1.0)) == pytest.approx(0.5, rel=1e-7)
    np.testing.assert_array_equal(layer.grads["weight"], np.float32([[0.3, 0.4]]))
    layer.grads["weight"][...] = [[3e30, 4e30]]  # the squares overflow float32
    assert float(clip_grad_norm([layer], 1.0)) == pytest.approx(5e30, rel=1e-6)
    np.testing.assert_allclose(layer.grads["weight"], [[0.6, 0.8]], rtol=1e-6)


def test_bad_arguments_are_named():
    layer = xprnn.Linear(2, 1)
    for make, text in (
        (lambda: SGD([layer], lr=-1.0), "lr"),
        (lambda: SGD([layer], lr=float("nan")), "lr"),
        (lambda: SGD([layer], lr=0.1, momentum=1.0), "momentum"),
        (lambda: Adam([layer], betas=(0.9, 1.0)), r"betas\[1\]"),
        (lambda: Adam([layer], eps=-1.0), "eps"),
        (lambda: CosineDecay(SGD([layer], lr=0.1), 0), "steps"),
        (lambda: clip_grad_norm([layer], 0.0), "max_norm"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    with pytest.raises(TypeError, match="modules"):
        SGD([np.ones(3)], lr=0.1)


def test_a_moved_module_is_refused_before_anything_changes():
    pair = modules()
    optimizer = Adam(pair)
    pair[1].to(dtype="float32")
    before = np.array(pair[0].parameters.flat)
    pair[0].grads.flat[...] = 1.0
    with pytest.raises(RuntimeError, match="Linear was moved or cast"):
        optimizer.step()
    np.testing.assert_array_equal(pair[0].parameters.flat, before)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda m: Adam(m[0]), TypeError, "modules: expected a list of modules, got GRU"),
        (lambda m: clip_grad_norm(m[0], 1.0), TypeError, "modules: expected a list"),
        (lambda m: Adam([]), ValueError, "modules: expected at least one"),
        (lambda m: Adam([m[0], m[0]]), ValueError, "none of them twice"),
        (lambda m: SGD(m, lr="fast"), TypeError, "lr: expected a number"),
        (lambda m: Adam(m, betas=0.9), TypeError, "betas: expected two numbers"),
        (lambda m: Adam(m, eps=0.0), ValueError, "eps"),
        (lambda m: clip_grad_norm(m, "1"), TypeError, "max_norm: expected a number"),
        (lambda m: CosineDecay(Adam(m), 2.5), TypeError, "steps: expected an integer"),
        (lambda m: Adam(m).load_state_dict({"steps": -1, "lr": 0.1}), ValueError, "steps"),
        (lambda m: Adam(m).load_state_dict({"steps": 1, "lr": np.nan}), ValueError, "lr"),
    ],
)
def test_likely_mistakes_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make(modules())


def test_without_momentum_one_bad_gradient_has_no_lasting_effect():
    layer = modules()[0]
    kept = layer.state_dict()
    optimizer = SGD([layer], lr=0.1)
    with np.errstate(over="ignore", invalid="ignore"):
        layer.grads.flat[...] = np.inf
        optimizer.step()
    layer.load_state_dict(kept)
    layer.zero_grad()
    optimizer.step()
    for name, value in kept.items():
        np.testing.assert_array_equal(layer.parameters[name], value)
