"""The activation functions of ONNX's RNN, GRU and LSTM, by name, as functions of a definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Activation = str | tuple[str | float, ...]  # a name, or a name and parameters
Activations = Sequence[Activation]


class Function(NamedTuple):
    """A function of `f`, a value and parameters."""

    apply: Callable[..., Any]
    required: int  # parameters without a default
    allowed: int


def _affine(f: Any, value: Any, alpha: float, beta: float) -> Any:
    return alpha * value + beta


def _scaled_tanh(f: Any, value: Any, alpha: float, beta: float) -> Any:
    return alpha * f.tanh(beta * value)


def _thresholded_relu(f: Any, value: Any, alpha: float = 1.0) -> Any:
    return f.where(value > alpha, value, 0.0)


def _of_definitions(name: str, allowed: int = 0) -> Function:
    """The function of this name that every definition has."""

    def apply(f: Any, value: Any, *parameters: float) -> Any:
        return getattr(f, name)(value, *parameters)

    return Function(apply, 0, allowed)


FUNCTIONS: dict[str, Function] = {
    **{name: _of_definitions(name) for name in ("sigmoid", "tanh", "relu", "softsign", "softplus")},
    "leaky_relu": _of_definitions("leaky_relu", 1),
    "elu": _of_definitions("elu", 1),
    "hard_sigmoid": _of_definitions("hard_sigmoid", 2),
    "thresholded_relu": Function(_thresholded_relu, 0, 1),
    "affine": Function(_affine, 2, 2),
    "scaled_tanh": Function(_scaled_tanh, 2, 2),
}


def check_activations(value: Any, *counts: int) -> tuple[Activation, ...]:
    """`value` as a tuple of names, and of tuples of a name and parameters.

    :param counts: the numbers of functions that are allowed.
    :raises TypeError, ValueError: it is something else.
    """
    expected = " or ".join(map(str, counts))
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"activations: expected a tuple of {expected} functions, got {value!r}")
    if len(value) not in counts:
        raise ValueError(f"activations: expected {expected} functions, got {len(value)}: {value!r}")
    return tuple([_check_activation(each) for each in value])


def _check_activation(value: Any) -> Activation:
    name, *parameters = value if isinstance(value, (tuple, list)) and value else (value,)
    if not isinstance(name, str):
        raise TypeError(
            f"activations: expected a name, or a tuple of a name and numbers, got {value!r}"
        )
    if name not in FUNCTIONS:
        raise ValueError(f"activations: expected one of {', '.join(FUNCTIONS)}, got {name!r}")
    if not all(type(each) in (int, float) for each in parameters):
        raise TypeError(f"activations: expected numbers as parameters of {name}, got {value!r}")
    function = FUNCTIONS[name]
    if not function.required <= len(parameters) <= function.allowed:
        numbers = " or ".join(map(str, range(function.required, function.allowed + 1)))
        raise ValueError(
            f"activations: expected {numbers} parameters of {name}, got {len(parameters)}"
        )
    return (name, *map(float, parameters)) if parameters else name


def activation(f: Any, value: Activation) -> Callable[[Any], Any]:
    """A checked activation as a function of a value in a definition."""
    name, parameters = (value, ()) if isinstance(value, str) else (str(value[0]), value[1:])

    def apply(argument: Any) -> Any:
        return FUNCTIONS[name].apply(f, argument, *parameters)

    return apply
