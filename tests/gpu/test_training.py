"""Training on a GPU as on NumPy: optimisers, losses, read-out, checks, commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers.test_feature_first import random_problem
from tests.support.cases import CELLS, LAYERS
from tests.support.targets import make, normal
from tests.support.tolerances import assert_close, tolerance
from xprnn import feature_first, optim
from xprnn.backend import Backend, to_numpy
from xprnn.diagnostics.gradient_check import GradientError
from xprnn.tools import demo
from xprnn.tools.data.japanese_vowels import japanese_vowels

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda modules: optim.SGD(modules, lr=0.1),
    "momentum": lambda modules: optim.SGD(modules, lr=0.1, momentum=0.9),
    "adam": lambda modules: optim.Adam(modules, lr=0.1),
    "adamw": lambda modules: optim.AdamW(modules, lr=0.1, weight_decay=0.1),
}
each_dtype = pytest.mark.parametrize("dtype", ["float64", "float32"])


def close(actual: Any, expected: Any, dtype: str, what: str) -> None:
    assert_close(to_numpy(actual), to_numpy(expected).astype(np.float64), dtype, what)


# -- optimisers, read-out, losses: the same as on NumPy in float64


@each_dtype
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_an_optimizer(name: str, dtype: str, backend: Backend) -> None:
    """Five steps on the same gradients, clipped and with decay; then one from a saved state."""

    def steps(target: Backend, dtype: str) -> tuple[Any, ...]:
        layer = make("gru", dtype=dtype, backend=target.name)
        optimizer = OPTIMIZERS[name]([layer])
        decay, norms = optim.CosineDecay(optimizer, 5), []
        for k in range(6):
            gradient = normal(k, layer.grads.flat.size, dtype="float32").astype(dtype)
            padding = to_numpy(layer.parameters.flat) == 0.0
            layer.grads.flat[...] = target.from_host(np.where(padding, 0.0, gradient).astype(dtype))
            norms.append(optim.clip_grad_norm([layer], 2.0))
            if k == 3:
                state = optimizer.state_dict()
                optimizer = OPTIMIZERS[name]([layer])
                optimizer.load_state_dict(state)
                decay.optimizer = optimizer
            optimizer.step()
            decay.step()
        return layer.parameters.flat, target.xp.stack(norms)

    expected = steps(xprnn.get_backend("numpy"), "float64")
    actual = steps(backend, dtype)
    close(actual[0], expected[0], dtype, f"parameters after {name}")
    close(actual[1], expected[1], "float64", "norms")


@each_dtype
def test_readout_and_losses(dtype: str, backend: Backend) -> None:
    x, dy = (normal(k, 4, 7, 3 - k, dtype="float32") for k in (0, 1))
    targets = [1, 0, 1, 1]

    def results(target: Backend, dtype: str) -> dict[str, Any]:
        linear = xprnn.Linear(3, 2, dtype=dtype, backend=target.name, seed=0).train()
        y = linear(target.from_host(x.astype(dtype)))
        results_by_name = {"y": y, "dx": linear.backward(target.from_host(dy.astype(dtype)))}
        results_by_name |= {f"d{name}": gradient for name, gradient in linear.grads.items()}
        for labels in (targets, target.from_host(np.array(targets))):
            loss, dlogits = xprnn.softmax_cross_entropy(y[:, 0], labels)
            results_by_name |= {f"loss {type(labels).__name__}": loss, "dlogits": dlogits}
        loss, dprediction = xprnn.mse_loss(y, target.xp.ones_like(y))
        return {**results_by_name, "mse": loss, "dprediction": dprediction}

    on_host, on_device = results(xprnn.get_backend("numpy"), "float64"), results(backend, dtype)
    for actual, (name, expected) in zip(on_device.values(), on_host.items(), strict=True):
        close(actual, expected, dtype, name)


def test_feature_first(backend: Backend) -> None:
    values, upstream, _ = random_problem(5)

    def results(move: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        inputs = {name: move(array) for name, array in values.items()}
        parameters = {name: inputs[name] for name in feature_first.PARAMETERS}
        a, y, caches = feature_first.rnn_forward(inputs["x"], inputs["a0"], parameters)
        da, dy = map(move, upstream)
        return {"a": a, "y": y, **feature_first.rnn_backward(da, caches, dy=dy)}

    on_host, on_device = results(np.array), results(backend.from_host)
    assert on_host.keys() == on_device.keys()
    for name, array in on_host.items():
        close(on_device[name], array, "float64", name)


# -- the package's own checks


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name: str, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(name, num_layers=2, bidirectional=True, backend=backend.name)
    x = backend.from_host(normal(0, 5, 3, 3))
    assert xprnn.gradcheck(layer, x, lengths=[5, 2, 0], directions=1).worst.excess <= 1
    original = type(layer).backward
    monkeypatch.setattr(
        type(layer), "backward", lambda self, *upstream: _negative(original(self, *upstream))
    )
    with pytest.raises(GradientError, match=r"wrong gradient of x"):
        xprnn.gradcheck(layer, x, directions=1)


def _negative(gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    return -gradients[0], gradients[1]


@pytest.mark.parametrize("name", CELLS)
def test_gradcheck_of_a_cell(name: str, backend: Backend) -> None:
    cell = make(f"{name}_cell", backend=backend.name)
    x = backend.from_host(normal(0, 4, 3))
    assert xprnn.gradcheck(cell, x, directions=1).worst.excess <= 1


def test_gradient_flow(backend: Backend) -> None:
    on_host, on_device = (
        make("gru", num_layers=2, bidirectional=True, backend=target)
        for target in ("numpy", backend.name)
    )
    x = normal(0, 6, 3, 3)
    expected, actual = (
        xprnn.gradient_flow(on_host, x),
        xprnn.gradient_flow(on_device, backend.from_host(x)),
    )
    assert actual.verdicts == expected.verdicts
    for name in ("norms", "ratios", "factors", "spectral_radius"):
        close(getattr(actual, name), getattr(expected, name), "float64", name)


# -- the demo and the commands


@pytest.mark.parametrize("cell", demo.LAYERS)
def test_the_demo_learns(cell: str, backend: Backend, tmp_path: Path) -> None:
    """In float32 as the demo runs it; the loaded model predicts what the trained one does."""
    outcome = demo.run(cell, 20, 0, backend.name, tmp_path, lambda *_: None)
    assert outcome.backend == backend.name and outcome.accuracy >= 0.9


@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16"])
def test_the_demo_learns_in_mixed_precision(compute_dtype: str, backend: Backend) -> None:
    if compute_dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    train, test = japanese_vowels()
    model = demo.build("gru", 0, backend.name)
    model.layer.to(compute_dtype=compute_dtype)
    demo.train(model, train, 20, 0, lambda *_: None)
    assert (model.predict(test) == test.speakers).mean() >= 0.9


COMMAND = """
import sys
sys.path.insert(0, {root!r})
from xprnn.tools.cli import main
sys.exit(main())
"""


def command(*arguments: Any, cwd: Path) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND.format(root=str(root)), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands(backend: Backend, tmp_path: Path) -> None:
    """info names the device; a model trained on the GPU gives the same results on the host."""
    printed = " ".join(command("info", cwd=tmp_path).split())
    assert "cupy:0 usable:" in printed and "compute capability" in printed
    printed = command("demo", "--epochs", "3", "--backend", "cupy", "--out", "here", cwd=tmp_path)
    assert "trained on cupy:0" in printed
    outputs = []
    for target in ("numpy", "cupy"):
        options = ["here/model.safetensors", "here/test_x.npy", "-o", f"{target}.npy"]
        options += ["--lengths", "here/test_lengths.npy", "--backend", target, "--batch", "100"]
        command("run", *options, cwd=tmp_path)
        outputs.append(np.load(tmp_path / f"{target}.npy"))
    # NumPy's float32 is as far from the exact output as the GPU's
    error = np.abs(outputs[1] - outputs[0]).max() / np.abs(outputs[0]).max()
    assert 0 < error <= 2 * tolerance("float32", steps=29, width=76, layers=1)
