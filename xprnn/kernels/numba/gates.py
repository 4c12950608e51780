"""What each cell does by element: a loop over rows, and over the units of a row.

All take blocks of rows; `Cell` and the plain cells say what the arrays hold. Where `saved` is
None the call is not recorded, and `gates` are read only.
"""

from __future__ import annotations

from typing import Any

from .elementary import of_type, sigmoid, tanh
from .jit import at, inlined, row


@inlined
def rnn_tanh_forward(
    gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any
) -> None:
    """`cells.RNN.forward_gates` with tanh."""
    for n in range(gates.shape[0]):
        _tanh_row(gates[n], gh[n], next_states[0][n])


@row
def _tanh_row(gx: Any, gh: Any, h_next: Any) -> None:
    for j in range(h_next.size):
        h_next[j] = tanh(gx[j] + gh[j])


@inlined
def rnn_relu_forward(
    gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any
) -> None:
    """`cells.RNN.forward_gates` with relu."""
    for n in range(gates.shape[0]):
        _relu_row(gates[n], gh[n], next_states[0][n])


@row
def _relu_row(gx: Any, gh: Any, h_next: Any) -> None:
    for j in range(h_next.size):
        a = gx[j] + gh[j]
        zero = of_type(a, 0.0)
        h_next[j] = zero if a < zero else a  # NaN stays


@inlined
def rnn_tanh_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.RNN.backward_gates` with tanh."""
    for n in range(gates.shape[0]):
        _tanh_back_row(gates[n], next_states[0][n], dstates[0][n])


@row
def _tanh_back_row(da: Any, h_next: Any, dh: Any) -> None:
    one = of_type(dh[0], 1.0)
    for j in range(dh.size):
        da[j] = (one - h_next[j] * h_next[j]) * dh[j]


@inlined
def rnn_relu_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.RNN.backward_gates` with relu."""
    for n in range(gates.shape[0]):
        _relu_back_row(gates[n], next_states[0][n], dstates[0][n])


@row
def _relu_back_row(da: Any, h_next: Any, dh: Any) -> None:
    zero, one = of_type(dh[0], 0.0), of_type(dh[0], 1.0)
    for j in range(dh.size):
        h = h_next[j]
        slope = one if h > zero else h  # 0, or NaN
        da[j] = slope * dh[j]


@inlined
def gru_forward(gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any) -> None:
    """`cells.GRU.forward_gates`."""
    (h,), (h_next,) = states, next_states
    H = h.shape[1]
    for n in range(h.shape[0]):
        g, a = gates[n], gh[n]
        _gru_row(
            g[:H],
            g[H : 2 * H],
            g[2 * H : 3 * H],
            a[:H],
            a[H : 2 * H],
            a[2 * H : 3 * H],
            bias[2 * H :],
            h[n],
            h_next[n],
            at(saved, n),
        )


@row
def _gru_row(
    r: Any, z: Any, n: Any, gh_r: Any, gh_z: Any, gh_n: Any, bias_n: Any, h: Any, h_next: Any,
    saved: Any,
) -> None:  # fmt: skip
    for j in range(h.size):
        reset = sigmoid(r[j] + gh_r[j])
        update = sigmoid(z[j] + gh_z[j])
        inner = gh_n[j] + bias_n[j]
        new = tanh(n[j] + reset * inner)
        h_next[j] = new + update * (h[j] - new)
        if saved is not None:
            r[j], z[j], n[j], saved[j] = reset, update, new, inner


@inlined
def gru_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.GRU.backward_gates`."""
    (h,), (dh,) = states, dstates
    H = h.shape[1]
    for n in range(h.shape[0]):
        g = gates[n]
        _gru_back_row(g[:H], g[H : 2 * H], g[2 * H :], saved[n], h[n], dh[n])


@row
def _gru_back_row(r: Any, z: Any, n: Any, saved: Any, h: Any, dh: Any) -> None:
    one = of_type(h[0], 1.0)
    for j in range(h.size):
        reset, update, new, down = r[j], z[j], n[j], dh[j]
        share = (one - update) * down
        dgx_n = (one - new * new) * share
        z[j] = (h[j] - new) * share * update
        r[j] = reset * ((one - reset) * (saved[j] * dgx_n))
        n[j] = dgx_n * reset
        saved[j] = dgx_n
        dh[j] = down * update


@inlined
def lstm_forward(gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any) -> None:
    """`cells.LSTM.forward_gates`."""
    (_, c), (h_next, c_next) = states, next_states
    H = c.shape[1]
    for n in range(c.shape[0]):
        g, a = gates[n], gh[n]
        _lstm_row(
            g[:H],
            g[H : 2 * H],
            g[2 * H : 3 * H],
            g[3 * H : 4 * H],
            a[:H],
            a[H : 2 * H],
            a[2 * H : 3 * H],
            a[3 * H : 4 * H],
            c[n],
            h_next[n],
            c_next[n],
            at(saved, n),
        )


@row
def _lstm_row(
    i: Any, f: Any, g: Any, o: Any, gh_i: Any, gh_f: Any, gh_g: Any, gh_o: Any, c: Any,
    h_next: Any, c_next: Any, saved: Any,
) -> None:  # fmt: skip
    for j in range(c.size):
        enter = sigmoid(i[j] + gh_i[j])
        keep = sigmoid(f[j] + gh_f[j])
        new = tanh(g[j] + gh_g[j])
        show = sigmoid(o[j] + gh_o[j])
        cell = keep * c[j] + enter * new
        shown = tanh(cell)
        c_next[j], h_next[j] = cell, show * shown
        if saved is not None:
            i[j], f[j], g[j], o[j], saved[j] = enter, keep, new, show, shown


@inlined
def lstm_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.LSTM.backward_gates`."""
    (_, c), (dh, dc) = states, dstates
    H = c.shape[1]
    for n in range(c.shape[0]):
        g = gates[n]
        _lstm_back_row(
            g[:H], g[H : 2 * H], g[2 * H : 3 * H], g[3 * H :], saved[n], c[n], dh[n], dc[n]
        )


@row
def _lstm_back_row(i: Any, f: Any, g: Any, o: Any, saved: Any, c: Any, dh: Any, dc: Any) -> None:
    one = of_type(c[0], 1.0)
    for j in range(c.size):
        enter, keep, new, show, shown = i[j], f[j], g[j], o[j], saved[j]
        down = dc[j] + (one - shown * shown) * show * dh[j]
        o[j] = show * (one - show) * shown * dh[j]
        i[j] = enter * (one - enter) * new * down
        f[j] = (one - keep) * keep * c[j] * down
        g[j] = (one - new * new) * enter * down
        dc[j] = down * keep
