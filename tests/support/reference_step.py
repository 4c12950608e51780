"""One step of each cell in its textbook form: float64, out of place, no buffers.

The functions take x (N, I), the states, (N, H) each, and `Weights` in torch's layout, and return
the next states. They share no code with `xprnn.cells`, and accept complex arrays, so that gradients
follow from complex steps: f'(x) = Im f(x + ih) / h, which is exact to rounding: nothing cancels.

W. Squire, G. Trapp, "Using complex variables to estimate derivatives of real functions" (1998).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xprnn.cells import Weights

States = tuple[np.ndarray, ...]
Step = Callable[[np.ndarray, States, Weights], States]
H_STEP = 1e-30  # of the complex step


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def bias(b: np.ndarray | None) -> np.ndarray | float:
    return 0.0 if b is None else b


def rnn_tanh(x: np.ndarray, states: States, w: Weights) -> States:
    (h,) = states
    a = x @ w.weight_ih.T + bias(w.bias_ih) + h @ w.weight_hh.T + bias(w.bias_hh)
    return (np.tanh(a),)


def rnn_relu(x: np.ndarray, states: States, w: Weights) -> States:
    (h,) = states
    a = x @ w.weight_ih.T + bias(w.bias_ih) + h @ w.weight_hh.T + bias(w.bias_hh)
    return (np.where(a.real > 0, a, 0),)


def gru(x: np.ndarray, states: States, w: Weights) -> States:
    (h,) = states
    gx_r, gx_z, gx_n = np.split(x @ w.weight_ih.T + bias(w.bias_ih), 3, axis=1)
    gh_r, gh_z, gh_n = np.split(h @ w.weight_hh.T + bias(w.bias_hh), 3, axis=1)
    r = sigmoid(gx_r + gh_r)
    z = sigmoid(gx_z + gh_z)
    n = np.tanh(gx_n + r * gh_n)
    return ((1 - z) * n + z * h,)


def gru_reset_before(x: np.ndarray, states: States, w: Weights) -> States:
    (h,) = states
    gx_r, gx_z, gx_n = np.split(x @ w.weight_ih.T + bias(w.bias_ih) + bias(w.bias_hh), 3, axis=1)
    W_hr, W_hz, W_hn = np.split(w.weight_hh, 3)
    r = sigmoid(gx_r + h @ W_hr.T)
    z = sigmoid(gx_z + h @ W_hz.T)
    n = np.tanh(gx_n + (r * h) @ W_hn.T)
    return ((1 - z) * n + z * h,)


def lstm(x: np.ndarray, states: States, w: Weights) -> States:
    h, c = states
    a = x @ w.weight_ih.T + bias(w.bias_ih) + h @ w.weight_hh.T + bias(w.bias_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c_next = f * c + i * g
    return o * np.tanh(c_next), c_next


REFERENCE_STEPS: dict[str, Step] = {
    function.__name__: function for function in (rnn_tanh, rnn_relu, gru, gru_reset_before, lstm)
}


def gradient(
    function: Callable[[np.ndarray], States], a: np.ndarray, upstream: States
) -> np.ndarray:
    """Return the gradient of Σ upstream · function(a) with respect to a, by complex steps."""
    result = np.empty(a.shape)
    for index in np.ndindex(a.shape):
        shifted = a.astype(complex)
        shifted[index] += 1j * H_STEP
        outputs = function(shifted)
        loss = sum((d * out).sum() for d, out in zip(upstream, outputs, strict=True))
        result[index] = loss.imag / H_STEP
    return result
