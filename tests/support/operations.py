"""Calls of all public functions and methods of the package that use arrays."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import xprnn
from tests.support import definitions
from tests.support.on_device import backward, forward
from tests.support.targets import arguments, make, normal
from xprnn import feature_first, optim
from xprnn.backend import Backend

Case = tuple[Any, dict[str, Callable[[], Any]]]  # a module, and calls that leave it unchanged


def moved(device: Backend, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: device.from_host(array) for name, array in inputs.items()}


def quarter(device: Backend, module: Any) -> None:
    """Set every gradient to 1/4."""
    with device.activate():
        module.grads.flat[...] = 0.25


def opened(module: Any) -> None:
    with module.writable():
        pass


def of_a_layer(device: Backend, folder: Path) -> Case:
    layer = make("gru", backend=device.name)
    state = layer.state_dict()
    on_host = {name: device.to_host(array) for name, array in state.items()}
    inputs = moved(device, arguments(layer))
    forward(layer, inputs)
    quarter(device, layer)
    idle = make("gru", backend=device.name)
    host_layer = make("gru")
    idle.save(folder / "gru")
    return layer, {
        "backward": lambda: backward(layer, inputs),
        "state_dict": layer.state_dict,
        "load_state_dict": lambda: layer.load_state_dict(state),
        "load_state_dict from the host": lambda: layer.load_state_dict(on_host),
        "parameters": lambda: layer.parameters.update(state),
        "one parameter": lambda: layer.parameters.__setitem__("bias_ih_l0", state["bias_ih_l0"]),
        "writable": lambda: opened(layer),
        "zero_grad": layer.zero_grad,
        "freeze": layer.freeze,
        "save": lambda: layer.save(folder / "other"),
        "load": lambda: xprnn.load(folder / "gru", backend=device.name),
        "GRU.load": lambda: xprnn.GRU.load(folder / "gru", backend=device.name),
        "to another dtype": lambda: idle.to(dtype="float32"),
        "to the host": lambda: idle.to("numpy"),
        "to the device": lambda: host_layer.to(device.name),
        "copy": lambda: copy.copy(layer),
        "deepcopy": lambda: copy.deepcopy(layer),
        "pickle": lambda: pickle.dumps(layer),
        "gradcheck": lambda: xprnn.gradcheck(layer, inputs["x"]),
        "gradient_flow": lambda: xprnn.gradient_flow(layer, inputs["x"]),
        "verify": lambda: xprnn.verify(layer, inputs["x"].shape),
        "asarray": lambda: xprnn.asarray([1.0], backend=device.name),
        "asarray of another dtype": lambda: xprnn.asarray(
            inputs["x"], backend=device.name, dtype="float32"
        ),
        "to_numpy": lambda: xprnn.to_numpy(inputs["x"]),
        "synchronize": device.synchronize,
    }


def of_a_stepper(device: Backend, folder: Path) -> Case:
    layer = xprnn.GRU(3, 5, 2, dtype="float64", backend=device.name, seed=0)
    stepper, x = layer.stepper(4), device.from_host(normal(0, 4, 3))
    stepper.step(x)
    state = stepper.state()
    return layer, {
        "stepper": lambda: layer.stepper(4),
        "Stepper.step": lambda: stepper.step(x),
        "Stepper.step of some": lambda: stepper.step(x, rows=[1]),
        "Stepper.state": stepper.state,
        "Stepper.load": lambda: stepper.load(state),
        "Stepper.reset": stepper.reset,
        "Stepper copied": lambda: copy.copy(stepper),
    }


def of_a_readout(device: Backend, folder: Path) -> Case:
    readout = xprnn.Linear(3, 5, dtype="float64", backend=device.name, seed=0).train()
    x, y = device.from_host(normal(0, 4, 3)), device.from_host(normal(1, 4, 5))
    embedded = device.from_host(normal(2, 4, 3))
    targets = device.from_host(np.arange(4))
    readout(x)
    embedding = xprnn.Embedding(5, 3, dtype="float64", backend=device.name, seed=0).train()
    embedding(targets)
    return readout, {
        "Embedding": lambda: xprnn.Embedding(5, 3, backend=device.name),
        "Embedding of the device's indices": lambda: embedding(targets),
        "Embedding of the host's indices": lambda: embedding([0, 4, 1, 1]),
        "Embedding.backward": lambda: embedding.backward(embedded),
        "Linear": lambda: readout(x),
        "Linear.backward": lambda: readout.backward(y),
        "softmax_cross_entropy": lambda: xprnn.softmax_cross_entropy(y, targets),
        "softmax_cross_entropy of host targets": lambda: xprnn.softmax_cross_entropy(y, [0] * 4),
        "mse_loss": lambda: xprnn.mse_loss(y, y),
    }


def of_construction(device: Backend, folder: Path) -> Case:
    calls = {
        kind.__name__: lambda kind=kind: kind(3, 5, backend=device.name)
        for kind in (xprnn.RNN, xprnn.GRU, xprnn.LSTM, xprnn.Linear)
    }
    calls |= {
        kind.__name__: lambda kind=kind: kind(3, 5, backend=device.name)
        for kind in (xprnn.RNNCell, xprnn.GRUCell, xprnn.LSTMCell)
    }
    calls |= {
        kind.__name__: lambda kind=kind: kind(definitions.li_gru, 3, 5, backend=device.name)
        for kind in (xprnn.Recurrent, xprnn.RecurrentCell)
    }
    weights = [device.from_host(normal(k, 15, width)) for k, width in enumerate((3, 5))]
    calls["from_weights"] = lambda: xprnn.GRUCell.from_weights(*weights)
    return make("gru", backend=device.name), calls


def of_optimizers(device: Backend, folder: Path) -> Case:
    layer = make("gru", backend=device.name)
    quarter(device, layer)
    calls: dict[str, Callable[[], Any]] = {
        "clip_grad_norm": lambda: optim.clip_grad_norm([layer], 0.1)
    }
    for kind, options in ((optim.SGD, {"momentum": 0.9}), (optim.Adam, {}), (optim.AdamW, {})):
        optimizer = kind([layer], lr=0.1, **options)
        state = optimizer.state_dict()
        on_host = {name: xprnn.to_numpy(value) for name, value in state.items()}
        on_host |= {"steps": 7, "lr": 3.0}
        path = folder / kind.__name__
        optimizer.save(path)

        def unchanged(
            call: Callable[[], Any], target: Any = optimizer, before: Any = state
        ) -> None:
            try:
                call()
            except RuntimeError:
                assert (target.steps, target.lr) == (before["steps"], before["lr"])
                raise

        calls |= {
            kind.__name__: lambda kind=kind, o=options: kind([layer], lr=0.1, **o),
            f"{kind.__name__}.step": lambda target=optimizer, u=unchanged: u(target.step),
            f"{kind.__name__}.zero_grad": optimizer.zero_grad,
            f"{kind.__name__}.state_dict": optimizer.state_dict,
            f"{kind.__name__}.load_state_dict": lambda target=optimizer, h=on_host, u=unchanged: u(
                lambda: target.load_state_dict(h)
            ),
            f"{kind.__name__}.save": lambda target=optimizer: target.save(folder / "other"),
            f"{kind.__name__}.load": lambda target=optimizer, p=path, u=unchanged: u(
                lambda: target.load(p)
            ),
        }
    return layer, calls


def of_feature_first(device: Backend, folder: Path) -> Case:
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    W = {name: device.from_host(normal(k, *s)) for k, (name, s) in enumerate(shapes.items())}
    x, a0 = device.from_host(normal(5, 3, 4, 6)), device.from_host(normal(6, 5, 4))
    a, y, caches = feature_first.rnn_forward(x, a0, W)
    others = feature_first.rnn_forward(x, a0, W)[2]
    a1, y1, cache = feature_first.rnn_cell_forward(x[:, :, 0], a0, W)
    return make("gru", backend=device.name), {
        "rnn_forward": lambda: feature_first.rnn_forward(x, a0, W),
        "rnn_backward": lambda: feature_first.rnn_backward(a, caches),
        "rnn_backward with dy": lambda: feature_first.rnn_backward(a, others, y),
        "rnn_cell_forward": lambda: feature_first.rnn_cell_forward(x[:, :, 0], a0, W),
        "rnn_cell_backward": lambda: feature_first.rnn_cell_backward(a1, cache, y1),
    }


PARTS = (of_a_layer, of_a_stepper, of_a_readout, of_construction, of_optimizers, of_feature_first)
