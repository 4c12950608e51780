"""A definition evaluated by torch, step by step, whose autograd gives every gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from xprnn.cells.definition import Definition

torch = pytest.importorskip(
    "torch", reason="torch is not installed: definitions are compared with it"
)


class Named:
    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __iter__(self) -> Any:
        return iter(self.__dict__.values())


class TorchFunctions:
    """The `f` of a definition on tensors.

    :param parameters: by name, `weight_hh` with the blocks that are read.
    :param masks: of each `keep`, in the order of the calls.
    """

    sigmoid, tanh, relu, exp, log = torch.sigmoid, torch.tanh, torch.relu, torch.exp, torch.log
    sqrt, abs, softsign = torch.sqrt, torch.abs, staticmethod(torch.nn.functional.softsign)
    maximum, clip = torch.maximum, torch.clamp

    def __init__(
        self,
        definition: Definition,
        options: Mapping[str, Any],
        parameters: Mapping[str, Any],
        masks: Sequence[Any],
    ) -> None:
        signature = definition.signature
        matrices = definition.trace(options).matrices
        self._blocks = matrices["weight_hh"].blocks if "weight_hh" in matrices else ()
        self._biased = matrices["weight_hh"].biased if "weight_hh" in matrices else ()
        self._gates, self._parameters = signature.gates, parameters
        self._masks = iter(masks)
        for name, value in {**signature.options, **options}.items():
            setattr(self, name, value)
        for name in signature.vectors:
            setattr(self, name, parameters[name])

    def recurrent(self, value: Any, *gates: str, bias: bool = True) -> Named:
        blocks = self._parameters["weight_hh"].chunk(len(self._blocks))
        results = {}
        for gate in gates or self._gates:
            result = value @ blocks[self._blocks.index(gate)].T
            if bias and "bias_hh" in self._parameters:
                biases = self._parameters["bias_hh"].chunk(len(self._biased))
                result = result + biases[self._biased.index(gate)]
            results[gate] = result
        return Named(results)

    def linear(self, name: str, value: Any, size: Any, bias: bool = False) -> Any:
        result = value @ self._parameters[name].T
        return result + self._parameters[f"{name}_bias"] if bias else result

    def norm(self, values: Any, gains: Any, biases: Any = None, eps: float = 1e-5) -> Any:
        joined = torch.cat([*values], 1)
        normed = torch.nn.functional.layer_norm(joined, joined.shape[1:], eps=eps)
        parts = normed.split([value.shape[1] for value in values], 1)
        scaled = [part * gain for part, gain in zip(parts, gains, strict=True)]
        if biases is None:
            return scaled
        return [each + bias for each, bias in zip(scaled, biases, strict=True)]

    def keep(self, rate: float, per: str = "step") -> Any:
        return next(self._masks)

    def leaky_relu(self, value: Any, slope: float = 0.01) -> Any:
        return torch.nn.functional.leaky_relu(value, slope)

    def elu(self, value: Any, alpha: float = 1.0) -> Any:
        return torch.nn.functional.elu(value, alpha)

    def hard_sigmoid(self, value: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
        return torch.clamp(alpha * value + beta, 0.0, 1.0)

    def softplus(self, value: Any) -> Any:  # torch's own is off by 2e-9
        return torch.logaddexp(value, torch.zeros_like(value))

    def minimum(self, a: Any, b: Any) -> Any:
        return torch.minimum(a, b)

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return torch.where(condition, a, b)


def torch_step(
    definition: Definition,
    options: Mapping[str, Any],
    parameters: Mapping[str, Any],
    gates: Mapping[str, Any],
    states: Mapping[str, Any],
    inputs: Mapping[str, Any],
    masks: Sequence[Any],
) -> tuple[Any, ...]:
    """The next states, tensors."""
    f = TorchFunctions(definition, options, parameters, masks)
    results = definition._step(f, Named({**gates, **inputs}), Named(states))
    return results if isinstance(results, tuple) else (results,)
