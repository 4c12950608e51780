"""Everything with a forward and a backward, under one interface: layers, cells and functions."""

from __future__ import annotations

from typing import Any

import numpy as np

import xprnn
from xprnn import functional

LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rnn_tanh": (xprnn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (xprnn.RNN, {"nonlinearity": "relu"}),
    "gru": (xprnn.GRU, {"reset_after": True}),
    "gru_reset_before": (xprnn.GRU, {"reset_after": False}),
    "lstm": (xprnn.LSTM, {}),
}
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rnn_tanh_cell": (xprnn.RNNCell, {"nonlinearity": "tanh"}),
    "rnn_relu_cell": (xprnn.RNNCell, {"nonlinearity": "relu"}),
    "gru_cell": (xprnn.GRUCell, {"reset_after": True}),
    "gru_reset_before_cell": (xprnn.GRUCell, {"reset_after": False}),
    "lstm_cell": (xprnn.LSTMCell, {}),
}
MODULES = {**LAYERS, **CELLS}
FUNCTIONS = tuple(f"{name}_function" for name in LAYERS)


class Function:
    """`xprnn.functional` on the weights of a one-layer module, with the module's interface."""

    def __init__(self, name: str, layer: Any) -> None:
        family = name.partition("_")[0]
        self.layer = layer
        self.weights = [layer.parameters.get(f"{kind}_l0") for kind in WEIGHTS]
        self.options = {**LAYERS[name][1], "batch_first": layer.options["batch_first"]}
        self.forward = getattr(functional, f"{family}_forward")
        self.function_backward = getattr(functional, f"{family}_backward")
        self.caches: list[functional.Cache] = []

    def __call__(self, x: Any, hx: Any = None, *, lengths: Any = None) -> tuple[Any, Any]:
        output, final, cache = self.forward(x, hx, *self.weights, lengths=lengths, **self.options)
        self.caches.append(cache)
        return output, final

    def backward(self, doutput: Any, dhx: Any, *, need_dx: Any = True) -> tuple[Any, Any]:
        gradients = self.function_backward(doutput, dhx, self.caches[-1], need_dx=need_dx)
        self.caches.pop()
        dinitial = tuple(gradients[name] for name in ("dh0", "dc0") if name in gradients)
        for kind in WEIGHTS:
            if f"d{kind}" in gradients:
                grad = self.layer.grads[f"{kind}_l0"]
                grad += gradients[f"d{kind}"]
        return gradients.get("dx"), dinitial if len(dinitial) > 1 else dinitial[0]


WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def make(name: str, I: int = 3, H: int = 5, **options: Any) -> Any:  # noqa: E741
    """A layer, cell or function in train mode; float64 and seed 0 by default."""
    options = {"dtype": "float64", "seed": 0, **options}
    if name in FUNCTIONS:
        name = name.removesuffix("_function")
        return Function(name, make(name, I, H, **options))
    kind, own = MODULES[name]
    return kind(I, H, **own, **options).train()


def is_cell(name: str) -> bool:
    return name in CELLS


def is_lstm(name: str) -> bool:
    return name.startswith("lstm")


def module_of(subject: Any) -> Any:
    """The module that holds the parameters and gradients."""
    return subject.layer if isinstance(subject, Function) else subject


def normal(seed: int, *shape: int, dtype: Any = "float64") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arguments(
    subject: Any, T: int = 4, N: int = 3, seed: int = 0, batched: bool = True
) -> dict[str, np.ndarray]:
    """x, the initial states and the upstream gradients of a call, by their names in errors."""
    module = module_of(subject)
    net, dtype = module._spec, module.dtype
    names, seeds = net.cell.state_names, iter(range(seed * 100, seed * 100 + 100))
    if isinstance(module, tuple(kind for kind, _ in CELLS.values())):
        outer = (N,) if batched else ()
        shapes = {"x": (*outer, net.input_size)}
        shapes |= dict.fromkeys(names, (*outer, net.hidden_size))
        shapes |= {f"d{name}_next": (*outer, net.hidden_size) for name in names}
    else:
        outer = (N, T) if module.options["batch_first"] else (T, N)
        outer = outer if batched else (T,)
        D = net.num_directions
        state = (net.num_layers * D, *((N,) if batched else ()), net.hidden_size)
        shapes = {"x": (*outer, net.input_size), "doutput": (*outer, D * net.hidden_size)}
        shapes |= {f"{name}0": state for name in names} | {f"d{name}_n": state for name in names}
    return {name: normal(next(seeds), *shape, dtype=dtype) for name, shape in shapes.items()}


def initial_names(inputs: dict[str, Any]) -> list[str]:
    """The names of the initial states among a call's arguments."""
    return [name for name in inputs if name in ("h", "c", "h0", "c0")]


def forward(subject: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """The unchanged result of a call with x and the initial states."""
    return subject(inputs["x"], _packed(inputs, initial_names(inputs)), **options)


def backward(subject: Any, inputs: dict[str, Any], **options: Any) -> Any:
    """The unchanged result of backward of the last call with the upstream gradients."""
    names = [name for name in inputs if name.startswith("d") and name != "doutput"]
    upstream = _packed(inputs, names)
    if "doutput" in inputs:
        return subject.backward(inputs["doutput"], upstream, **options)
    return subject.backward(upstream, **options)


def run(subject: Any, inputs: dict[str, Any], **options: Any) -> list[np.ndarray]:
    """All results and gradients of forward and backward; `grads` are zero before and after."""
    module = module_of(subject)
    module.zero_grad()
    results = arrays(forward(subject, inputs, **options)) + arrays(backward(subject, inputs))
    results += [grad.copy() for grad in module.grads.values()]
    module.zero_grad()
    return results


def arrays(results: Any) -> list[np.ndarray]:
    """The arrays in nested tuples, in order, without None."""
    if results is None:
        return []
    if isinstance(results, (tuple, list)):
        return [array for result in results for array in arrays(result)]
    return [results]


def copies(results: Any) -> list[np.ndarray]:
    return [array.copy() for array in arrays(results)]


def assert_same(actual: Any, expected: Any, what: str = "") -> None:
    """Fail unless two nests of arrays agree in dtype, shape and every bit of value."""
    actual, expected = arrays(actual), arrays(expected)
    assert len(actual) == len(expected), what
    for k, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.dtype == other.dtype, f"{what}[{k}]"
        np.testing.assert_array_equal(one, other, err_msg=f"{what}[{k}]", strict=True)


def state_of(subject: Any) -> list[np.ndarray]:
    """What a refused call must not change: parameters, gradients, recorded calls, counters."""
    module = module_of(subject)
    counts = [len(module._records), module._calls, len(getattr(subject, "caches", []))]
    versions = [module.parameters.version, int(module.training)]
    flat = [module.parameters.flat.copy(), module.grads.flat.copy()]
    return [*flat, np.array(counts + versions)]


def _packed(inputs: dict[str, Any], names: list[str]) -> Any:
    return tuple([inputs[name] for name in names]) if len(names) > 1 else inputs[names[0]]
