"""Steps of cells in torch, written from their papers: the reference of definitions.

A step gets the parameters of a direction by name, x (1, I), the states (1, H) each, the inputs, the
masks in the order of the definition, and the direction; it returns the next states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import layer_norm

Step = Callable[[Any, Any, Any, Any, Any, int], tuple[Any, ...]]
Own = Mapping[str, Any]
sigmoid, tanh = torch.sigmoid, torch.tanh


def linear(own: Own, side: str, value: Any, bias: bool = True) -> Any:
    """A value times the whole of W_ih or W_hh, plus its bias where there is one."""
    product = value @ own[f"weight_{side}"].T
    name = f"bias_{side}"
    return product + own[name] if bias and name in own else product


def both(own: Own, x: Any, h: Any, gates: int) -> tuple[Any, ...]:
    """The sums of both sides by gate."""
    return (linear(own, "ih", x) + linear(own, "hh", h)).chunk(gates, 1)


# -- the built-in cells with other activations, as the operators of ONNX


def activation(value: Any) -> Callable[[Any], Any]:
    """A function by its name, or by a tuple of its name and parameters."""
    name, *numbers = (value,) if isinstance(value, str) else value
    zero = torch.zeros((), dtype=torch.float64)
    functions: dict[str, Callable[..., Any]] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": lambda v: v / (1 + v.abs()),
        "softplus": lambda v: torch.logaddexp(v, zero),  # torch's own is off by 2e-9
        "leaky_relu": lambda v, alpha=0.01: torch.where(v >= 0, v, alpha * v),
        "elu": lambda v, alpha=1.0: torch.where(v >= 0, v, alpha * torch.expm1(v)),
        "hard_sigmoid": lambda v, a=0.2, b=0.5: torch.clamp(a * v + b, 0, 1),
        "thresholded_relu": lambda v, alpha=1.0: torch.where(v >= alpha, v, zero),
        "affine": lambda v, a, b: a * v + b,
        "scaled_tanh": lambda v, a, b: a * torch.tanh(b * v),
    }
    return lambda v: functions[name](v, *numbers)


def clipped(function: Callable[[Any], Any], threshold: float) -> Callable[[Any], Any]:
    return (lambda v: function(v.clamp(-threshold, threshold))) if threshold else function


def rnn(activations: Any, threshold: float = 0.0) -> Step:
    def step(own: Own, x: Any, states: Any, inputs: Any, masks: Any, direction: int) -> Any:
        function = clipped(activation(activations[direction % len(activations)]), threshold)
        return (function(linear(own, "ih", x) + linear(own, "hh", states[0])),)

    return step


def gru(activations: Any, threshold: float = 0.0, reset_after: bool = True) -> Step:
    def step(own: Own, x: Any, states: Any, inputs: Any, masks: Any, direction: int) -> Any:
        (h,), start = states, 2 * direction % len(activations)
        f, g = (clipped(activation(a), threshold) for a in activations[start : start + 2])
        (xr, xz, xn), (hr, hz, hn) = (
            linear(own, side, value).chunk(3, 1) for side, value in (("ih", x), ("hh", h))
        )
        r, z = f(xr + hr), f(xz + hz)
        if not reset_after:
            (weight,) = own["weight_hh"].chunk(3)[2:]
            hn = (r * h) @ weight.T + (own["bias_hh"].chunk(3)[2] if "bias_hh" in own else 0.0)
            r = 1.0
        n = g(xn + r * hn)
        return ((1 - z) * n + z * h,)

    return step


def lstm(activations: Any, threshold: float = 0.0, coupled: bool = False) -> Step:
    """With peepholes and a projection where there are such parameters."""

    def step(own: Own, x: Any, states: Any, inputs: Any, masks: Any, direction: int) -> Any:
        (h, c), start = states, 3 * direction % len(activations)
        f, g = (clipped(activation(a), threshold) for a in activations[start : start + 2])
        parts = [*both(own, x, h, 3 if coupled else 4)]
        if coupled:
            parts.insert(1, None)
        i, forget, new, o = parts
        i = f(i + own["p_i"] * c if "p_i" in own else i)
        forget = 1 - i if coupled else f(forget + own["p_f"] * c if "p_f" in own else forget)
        c = forget * c + i * g(new)
        h = f(o + own["p_o"] * c if "p_o" in own else o) * activation(activations[start + 2])(c)
        return h @ own["weight_hr"].T if "weight_hr" in own else h, c

    return step


# -- cells of papers


def li_gru(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """M. Ravanelli et al. (2018), without batch norm."""
    (h,) = states
    z, a = both(own, x, h, 2)
    z = sigmoid(z)
    return (z * h + (1 - z) * torch.relu(a),)


def norm(own: Own, value: Any, gains: tuple[str, ...], biases: tuple[str, ...]) -> Any:
    """LN(value; gain, bias) with vectors of all gates."""
    gain, bias = (torch.cat([own[name] for name in names]) for names in (gains, biases))
    return layer_norm(value, value.shape[1:], gain, bias, 1e-5)


def layer_norm_lstm(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """J. L. Ba et al. (2016), eq. 20 to 22."""
    h, c = states

    def vectors(kind: str) -> tuple[str, ...]:
        return tuple(f"{kind}_{gate}" for gate in "ifgo")

    a = norm(own, linear(own, "hh", h, bias=False), vectors("a1"), vectors("b1"))
    a = a + norm(own, linear(own, "ih", x), vectors("a2"), vectors("b2"))
    i, f, g, o = a.chunk(4, 1)
    c = sigmoid(f) * c + sigmoid(i) * tanh(g)
    return sigmoid(o) * tanh(norm(own, c, ("a3",), ("b3",))), c


def layer_norm_gru(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """J. L. Ba et al. (2016), the GRU of the supplement, with 1 - z for its z."""
    (h,) = states
    xr, xz, xn = linear(own, "ih", x).chunk(3, 1)
    hr, hz, hn = linear(own, "hh", h, bias=False).chunk(3, 1)
    a = norm(own, torch.cat([hz, hr], 1), ("a1_z", "a1_r"), ("b1_z", "b1_r"))
    a = a + norm(own, torch.cat([xz, xr], 1), ("a2_z", "a2_r"), ("b2_z", "b2_r"))
    z, r = sigmoid(a).chunk(2, 1)
    n = norm(own, xn, ("a2_n",), ("b2_n",)) + r * norm(own, hn, ("a1_n",), ("b1_n",))
    return ((1 - z) * tanh(n) + z * h,)


def zoneout(own: Own, x: Any, states: Any, inputs: Any, masks: Any, direction: int) -> Any:
    """D. Krueger et al. (2017): a mask is 1 where a state is computed."""
    h, c = states
    new_h, new_c = lstm(("sigmoid", "tanh", "tanh"))(own, x, states, inputs, (), direction)
    return torch.where(masks[0] == 1, new_h, h), torch.where(masks[1] == 1, new_c, c)


def recurrent_dropout(
    own: Own, x: Any, states: Any, inputs: Any, masks: Any, direction: int, rate: float = 0.3
) -> Any:
    """Y. Gal, Z. Ghahramani (2016), of h alone, as the recurrent_dropout of Keras."""
    h, c = states
    thinned = h * masks[0] / (1 - rate)
    return lstm(("sigmoid", "tanh", "tanh"))(own, x, (thinned, c), inputs, (), direction)


def slstm(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """M. Beck et al. (2024), with one head and a sigmoid forget gate."""
    h, c, n, m = states
    z, i, f, o = both(own, x, h, 4)
    z, o = tanh(z), sigmoid(o)
    log_f = -torch.logaddexp(torch.zeros_like(f), -f)
    m_next = torch.maximum(log_f + m, i)
    i, f = torch.exp(i - m_next), torch.exp(log_f + m - m_next)
    c, n = f * c + i * z, f * n + i
    return o * c / n, c, n, m_next


def min_gru(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """L. Feng et al. (2024)."""
    (h,) = states
    z, new = linear(own, "ih", x).chunk(2, 1)
    z = sigmoid(z)
    return ((1 - z) * h + z * new,)


def min_lstm(own: Own, x: Any, states: Any, *_: Any) -> Any:
    """L. Feng et al. (2024)."""
    (h,) = states
    new, f, i = linear(own, "ih", x).chunk(3, 1)
    f, i = sigmoid(f), sigmoid(i)
    return (f / (f + i) * h + i / (f + i) * new,)
