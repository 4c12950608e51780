"""The contents of the files in `parent/`: objects of each kind, and calls that return their values.

This module is shared by the program that wrote the files and the test that reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import xprnn

I, H, N, T = 3, 2, 2, 4  # noqa: E741
# name: the class and its arguments
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {"num_layers": 2, "dropout": 0.5, "recompute": 2}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bias": False, "bidirectional": True}),
    "rnn_tf32": ("RNN", {"precision": "tf32"}),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "gru_float64": ("GRU", {"dtype": "float64", "bias": False}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "gru_bfloat16": ("GRU", {"compute_dtype": "bfloat16"}),
    "lstm": ("LSTM", {"num_layers": 2}),
    "lstm_bidirectional": ("LSTM", {"bidirectional": True, "dtype": "float64", "recompute": 3}),
    "lstm_float16": ("LSTM", {"compute_dtype": "float16", "batch_first": True}),
    "rnn_cell": ("RNNCell", {"bias": False}),
    "rnn_cell_relu": ("RNNCell", {"nonlinearity": "relu", "dtype": "float64"}),
    "gru_cell": ("GRUCell", {}),
    "gru_cell_reset_before": ("GRUCell", {"reset_after": False}),
    "lstm_cell": ("LSTMCell", {"dtype": "float64"}),
    "lstm_cell_float16": ("LSTMCell", {"compute_dtype": "float16"}),
    "linear": ("Linear", {}),
    "linear_float64": ("Linear", {"dtype": "float64", "bias": False}),
    "embedding": ("Embedding", {"padding_idx": 1}),
}
STEPPERS = ("rnn", "gru_float64", "gru_reset_before", "lstm")
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.9)}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
}


def module(name: str) -> Any:
    """A module in train mode with a frozen parameter, gradients and a user's attribute."""
    kind, options = MODULES[name]
    instance = getattr(xprnn, kind)(I, H, seed=len(name), **options).train()
    instance.note = name
    outputs = arrays(instance(argument(instance)))
    instance.backward(*_upstream(instance, outputs))
    instance.freeze([*instance.parameters][-1])
    return instance


def argument(instance: Any) -> Any:
    """The argument of a call of a module, with its dtype and shape."""
    if isinstance(instance, xprnn.Embedding):
        return [[0, 1], [2, 0]]
    batch_first = instance.options.get("batch_first", False)
    rows = (N, T) if batch_first else (T, N)
    shape = (*rows, I) if "num_layers" in instance.options else (N, I)
    return _drawn(shape, instance.dtype)


def call(instance: Any) -> dict[str, np.ndarray]:
    """The results of one call in eval mode, by number."""
    results = instance.eval()(argument(instance))
    return {str(k): array for k, array in enumerate(arrays(results))}


def optimizer(name: str) -> Any:
    """An optimiser of two modules after two steps, one of them with a frozen parameter."""
    kind, options = OPTIMIZERS[name]
    modules = [module("gru"), module("linear_float64")]
    modules[1].unfreeze()
    instance = getattr(xprnn.optim, kind)(modules, **options)
    instance.note = name
    for _ in range(2):
        instance.step()
    return instance


def schedule(instance: Any) -> Any:
    decay = xprnn.optim.CosineDecay(instance, steps=5, lr_min=0.001)
    decay.step()
    return decay


def next_step(instance: Any) -> dict[str, np.ndarray]:
    """The parameters of an optimiser's modules after its next step."""
    instance.step()
    return {
        f"{k}.{name}": np.array(array)
        for k, one in enumerate(instance.modules)
        for name, array in one.parameters.items()
    }


def stepper(name: str) -> Any:
    """A stepper after two steps, the second of one row only."""
    instance = module(name).eval().stepper(N)
    instance.step(_drawn((N, I), instance.arithmetic.dtype))
    instance.step(_drawn((N, I), instance.arithmetic.dtype), rows=[1])
    return instance


def steps_on(instance: Any) -> dict[str, np.ndarray]:
    """The states of a stepper, and the result of its next step."""
    states = {f"state{k}": array for k, array in enumerate(arrays(instance.state()))}
    return {**states, "y": instance.step(_drawn((N, I), instance.arithmetic.dtype))}


def arrays(value: Any) -> list[np.ndarray]:
    """The arrays in nested tuples, in their order."""
    if not isinstance(value, (tuple, list)):
        return [] if value is None else [value]
    return [array for item in value for array in arrays(item)]


def pickled() -> dict[str, Any]:
    """The object of each pickle, with all of the above; schedules share the optimizers."""
    optimizers = {name: optimizer(name) for name in OPTIMIZERS}
    return {
        "modules": {name: module(name) for name in MODULES},
        "steppers": {name: stepper(name) for name in STEPPERS},
        "optimizers": optimizers,
        "schedules": {name: schedule(instance) for name, instance in optimizers.items()},
    }


SHOWN: dict[str, Callable[[Any], dict[str, np.ndarray]]] = {
    "modules": call,
    "steppers": steps_on,
    "optimizers": next_step,
}


def _upstream(instance: Any, outputs: list[np.ndarray]) -> tuple[Any, ...]:
    """Gradients of the results, in the form that `backward` takes."""
    drawn = [_drawn(output.shape, output.dtype) for output in outputs]
    if "num_layers" in instance.options:
        return drawn[0], drawn[1] if len(drawn) == 2 else tuple(drawn[1:])
    return (drawn[0] if len(drawn) == 1 else tuple(drawn),)


def _drawn(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)
