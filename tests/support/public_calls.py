"""Every public call that computes on a CPU, by name, on float32 values of a given magnitude."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import xprnn
from tests.support.targets import (
    FUNCTIONS,
    MODULES,
    arguments,
    arrays,
    copies,
    forward,
    make,
    module_of,
    run,
)
from xprnn import feature_first, optim

Call = Callable[[float], list[np.ndarray]]  # its results, without copies of its arguments


def _times(array: np.ndarray, size: float) -> np.ndarray:
    """The product in float32, where underflow is intended."""
    with np.errstate(under="ignore"):
        return (array * np.float64(size)).astype(np.float32)


def _drawn(size: float, *shape: int) -> np.ndarray:
    return _times(np.random.default_rng(0).standard_normal(shape), size)


def _recorded(name: str, **options: Any) -> Call:
    """The results of a call in eval and in train mode, and its gradients."""

    def call(size: float) -> list[np.ndarray]:
        subject = make(name, dtype="float32", **options)
        inputs = {n: _times(a, size) for n, a in arguments(subject).items()}
        module_of(subject).eval()
        results = copies(forward(subject, inputs))
        module_of(subject).train()
        return results + run(subject, inputs)

    return call


def _ragged(size: float) -> list[np.ndarray]:
    layer = make("lstm", dtype="float32", num_layers=2, bidirectional=True, dropout=0.5)
    inputs = {n: _times(a, size) for n, a in arguments(layer).items()}
    return run(layer, inputs, lengths=[4, 1, 2])


def _stepper(name: str) -> Call:
    def call(size: float) -> list[np.ndarray]:
        layer = make(name, dtype="float32", num_layers=2, bias=False)
        stepper, x = layer.stepper(2), _drawn(size, 4, 2, 3)
        zeros = stepper.state()
        drawn = tuple([_drawn(size, *state.shape) for state in arrays(zeros)])
        stepper.load(drawn if len(drawn) > 1 else drawn[0])
        results = [stepper.step(x[0]), stepper.step(x[1], out=np.empty((2, 5), np.float32))]
        stepper.reset([1])
        results += [stepper.step(x[2], rows=[0]), *arrays(stepper.state())]
        return results

    return call


def _feature_first(size: float) -> list[np.ndarray]:
    biases = {"ba": np.zeros((4, 1), np.float32), "by": np.zeros((2, 1), np.float32)}
    W = {"Wax": _drawn(1, 4, 3), "Waa": _drawn(1, 4, 4), "Wya": _drawn(1, 2, 4), **biases}
    x, a0 = _drawn(size, 3, 5, 6), _drawn(size, 4, 5)
    a, y, caches = feature_first.rnn_forward(x, a0, W)
    results = [a, y, *feature_first.rnn_backward(_times(a, size), caches, _times(y, size)).values()]
    a, y, cache = feature_first.rnn_cell_forward(x[:, :, 0], a0, W)
    return [
        *results,
        a,
        y,
        *feature_first.rnn_cell_backward(_times(a, size), cache, _times(y, size)).values(),
    ]


def _linear(size: float) -> list[np.ndarray]:
    linear = xprnn.Linear(4, 3, seed=0).train()
    y = linear(_drawn(size, 5, 4))
    return [y, linear.backward(_drawn(size, 5, 3)), *copies(tuple(linear.grads.values()))]


def _cross_entropy(size: float) -> list[np.ndarray]:
    """One class with a probability of about `size`, or far smaller if `size` is large."""
    logits = np.zeros((2, 3), np.float32)
    logits[:, 0] = np.log(size) if size < 1 else -size
    loss, dlogits = xprnn.softmax_cross_entropy(logits, [1, 2])
    return [np.asarray(loss), dlogits]


def _mse(size: float) -> list[np.ndarray]:
    loss, dprediction = xprnn.mse_loss(_drawn(size, 7, 3), np.zeros((7, 3), np.float32))
    return [np.asarray(loss), dprediction]


def _optimizer(kind: Any, **options: Any) -> Call:
    def call(size: float) -> list[np.ndarray]:
        linear = xprnn.Linear(4, 3, seed=0)
        optimizer = kind([linear], **options)
        for scale in (size, 0.0, 0.0):
            linear.grads.update({"weight": _drawn(scale, 3, 4), "bias": _drawn(scale, 3)})
            optimizer.step()
        return [*slots_of(optimizer), linear.parameters.flat.copy()]

    return call


def slots_of(optimizer: optim.Optimizer) -> list[np.ndarray]:
    """The state that an optimiser of one module derives from gradients."""
    state = optimizer.state_dict()
    return [state[name] for name in state if name.startswith("0.") and name != "0.steps"]


def _clip(size: float) -> list[np.ndarray]:
    linear = xprnn.Linear(4, 3, seed=0)
    linear.grads.update({"weight": _drawn(size, 3, 4), "bias": _drawn(0.5, 3)})
    optim.clip_grad_norm([linear], 0.01)
    return [linear.grads.flat]


def _conversions(size: float) -> list[np.ndarray]:
    """Conversions between dtypes."""
    wide = {"weight": np.full((3, 4), size * 1e-6), "bias": np.full(3, size * 1e-50)}
    linear = xprnn.Linear(4, 3, seed=0)
    linear.load_state_dict(wide)
    adam = optim.Adam([linear])
    adam.load_state_dict({**adam.state_dict(), "0.exp_avg": np.full(32, size * 1e-6)})
    double = xprnn.Linear(4, 3, dtype="float64", seed=0)
    double.load_state_dict(wide)
    double.to(dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        double.save(Path(folder) / "linear.safetensors")
        xprnn.load(Path(folder) / "linear.safetensors")
    xprnn.asarray(wide["weight"], dtype="float32")
    return []


def _diagnostics(size: float) -> list[np.ndarray]:
    gru = xprnn.GRU(3, 4, seed=0)
    x = _drawn(size, 5, 2, 3)
    xprnn.gradient_flow(gru, x)
    xprnn.gradient_flow(gru, x, dhx=_drawn(size, 1, 2, 4))
    if size <= 1:  # finite differences of saturated gates are meaningless
        xprnn.gradcheck(gru, x, directions=1)
    return []


def _verify(size: float) -> list[np.ndarray]:
    xprnn.verify(xprnn.GRU(3, 4, seed=0), (5, 2, 3))
    return []


CALLS: dict[str, Call] = {
    **{name: _recorded(name) for name in (*MODULES, *FUNCTIONS)},
    "recomputed": _recorded("gru", recompute=2),
    "mixed": _recorded("gru", compute_dtype="float16"),
    "ragged": _ragged,
    **{f"{name}_stepper": _stepper(name) for name in ("rnn_relu", "gru", "lstm")},
    "feature_first": _feature_first,
    "linear": _linear,
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "sgd": _optimizer(optim.SGD, lr=0.1, momentum=0.5),
    "adam": _optimizer(optim.Adam, betas=(0.5, 0.5)),
    "adamw": _optimizer(optim.AdamW),
    "clip": _clip,
    "conversions": _conversions,
    "diagnostics": _diagnostics,
    "verify": _verify,
}
