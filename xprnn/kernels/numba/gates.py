"""The pointwise ops of each cell: a loop over rows, and over the units of a row.

The functions take blocks of rows; the contents of the arrays are those of `Cell` and of the plain
cells, with the same names and the same order of statements. `*_row` is one row of an array, or
one gate's block of it; a name without the suffix is a single element. Where `saved` is None the
call is not recorded, and `gates` is in.
"""

from __future__ import annotations

from typing import Any

from .elementary import of_type, sigmoid, tanh
from .jit import inlined, row


@inlined
def rnn_tanh_forward(
    gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any
) -> None:
    """`cells.RNN.forward_gates` with tanh."""
    for s in range(gates.shape[0]):
        _tanh_forward_row(gates[s], gh[s], next_states[0][s])


@row
def _tanh_forward_row(gx_row: Any, gh_row: Any, h_next_row: Any) -> None:
    for j in range(h_next_row.size):
        h_next_row[j] = tanh(gx_row[j] + gh_row[j])


@inlined
def rnn_relu_forward(
    gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any
) -> None:
    """`cells.RNN.forward_gates` with relu."""
    for s in range(gates.shape[0]):
        _relu_forward_row(gates[s], gh[s], next_states[0][s])


@row
def _relu_forward_row(gx_row: Any, gh_row: Any, h_next_row: Any) -> None:
    for j in range(h_next_row.size):
        a = gx_row[j] + gh_row[j]
        zero = of_type(a, 0.0)
        h_next_row[j] = zero if a < zero else a  # propagates NaN


@inlined
def rnn_tanh_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.RNN.backward_gates` with tanh."""
    for s in range(gates.shape[0]):
        _tanh_backward_row(gates[s], next_states[0][s], dstates[0][s])


@row
def _tanh_backward_row(da_row: Any, h_next_row: Any, dh_row: Any) -> None:
    one = of_type(dh_row[0], 1.0)
    for j in range(dh_row.size):
        h_next, dh = h_next_row[j], dh_row[j]
        da_row[j] = (one - h_next * h_next) * dh


@inlined
def rnn_relu_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.RNN.backward_gates` with relu."""
    for s in range(gates.shape[0]):
        _relu_backward_row(gates[s], next_states[0][s], dstates[0][s])


@row
def _relu_backward_row(da_row: Any, h_next_row: Any, dh_row: Any) -> None:
    zero, one = of_type(dh_row[0], 0.0), of_type(dh_row[0], 1.0)
    for j in range(dh_row.size):
        h_next, dh = h_next_row[j], dh_row[j]
        slope = one if h_next > zero else h_next  # 0, or NaN
        da_row[j] = slope * dh


@inlined
def gru_forward(gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any) -> None:
    """`cells.GRU.forward_gates`."""
    (h,), (h_next,) = states, next_states
    H = h.shape[1]
    for s in range(h.shape[0]):
        gates_row, gh_row = gates[s], gh[s]
        if saved is None:  # noqa: SIM108 - decided when it is compiled
            saved_row = None
        else:
            saved_row = saved[s]
        _gru_forward_row(
            gates_row[:H],
            gates_row[H : 2 * H],
            gates_row[2 * H : 3 * H],
            gh_row[:H],
            gh_row[H : 2 * H],
            gh_row[2 * H : 3 * H],
            bias[2 * H :],
            h[s],
            h_next[s],
            saved_row,
        )


@row
def _gru_forward_row(
    r_row: Any, z_row: Any, n_row: Any,  # inout: gx -> gates; in: the call is not recorded
    gh_r_row: Any, gh_z_row: Any, gh_n_row: Any,  # in, without b_hh
    bias_n_row: Any,  # in: b_hh of n
    h_row: Any,  # in
    h_next_row: Any,  # out
    saved_row: Any,  # out: gh_n; None: the call is not recorded
) -> None:  # fmt: skip
    for j in range(h_row.size):
        r = sigmoid(r_row[j] + gh_r_row[j])
        z = sigmoid(z_row[j] + gh_z_row[j])
        gh_n = gh_n_row[j] + bias_n_row[j]
        n = tanh(n_row[j] + r * gh_n)
        h_next_row[j] = n + z * (h_row[j] - n)
        if saved_row is not None:
            r_row[j], z_row[j], n_row[j], saved_row[j] = r, z, n, gh_n


@inlined
def gru_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.GRU.backward_gates`."""
    (h,), (dh,) = states, dstates
    H = h.shape[1]
    for s in range(h.shape[0]):
        gates_row = gates[s]
        _gru_backward_row(
            gates_row[:H], gates_row[H : 2 * H], gates_row[2 * H :], saved[s], h[s], dh[s]
        )


@row
def _gru_backward_row(
    r_row: Any, z_row: Any, n_row: Any,  # inout: r, z, n -> dgx_r, dgx_z, dgh_n
    saved_row: Any,  # inout: gh_n -> dgx_n
    h_row: Any,  # in
    dh_row: Any,  # inout: dh_next -> dh_next z
) -> None:  # fmt: skip
    one = of_type(h_row[0], 1.0)
    for j in range(h_row.size):
        r, z, n, gh_n, h, dh_next = r_row[j], z_row[j], n_row[j], saved_row[j], h_row[j], dh_row[j]
        dn = (one - z) * dh_next
        dgx_n = (one - n * n) * dn
        z_row[j] = (h - n) * dn * z
        dh_row[j] = dh_next * z
        dr = gh_n * dgx_n
        r_row[j] = r * ((one - r) * dr)
        n_row[j] = dgx_n * r
        saved_row[j] = dgx_n


@inlined
def lstm_forward(gates: Any, gh: Any, bias: Any, states: Any, next_states: Any, saved: Any) -> None:
    """`cells.LSTM.forward_gates`."""
    (_, c), (h_next, c_next) = states, next_states
    H = c.shape[1]
    for s in range(c.shape[0]):
        gates_row, gh_row = gates[s], gh[s]
        if saved is None:  # noqa: SIM108 - decided when it is compiled
            saved_row = None
        else:
            saved_row = saved[s]
        _lstm_forward_row(
            gates_row[:H],
            gates_row[H : 2 * H],
            gates_row[2 * H : 3 * H],
            gates_row[3 * H : 4 * H],
            gh_row[:H],
            gh_row[H : 2 * H],
            gh_row[2 * H : 3 * H],
            gh_row[3 * H : 4 * H],
            c[s],
            h_next[s],
            c_next[s],
            saved_row,
        )


@row
def _lstm_forward_row(
    i_row: Any, f_row: Any, g_row: Any, o_row: Any,  # inout: gx -> gates; in: not recorded
    gh_i_row: Any, gh_f_row: Any, gh_g_row: Any, gh_o_row: Any,  # in
    c_row: Any,  # in
    h_next_row: Any,  # out
    c_next_row: Any,  # out
    saved_row: Any,  # out: tanh_c; None: the call is not recorded
) -> None:  # fmt: skip
    for j in range(c_row.size):
        i = sigmoid(i_row[j] + gh_i_row[j])
        f = sigmoid(f_row[j] + gh_f_row[j])
        g = tanh(g_row[j] + gh_g_row[j])
        o = sigmoid(o_row[j] + gh_o_row[j])
        c_next = f * c_row[j] + i * g
        tanh_c = tanh(c_next)
        c_next_row[j], h_next_row[j] = c_next, o * tanh_c
        if saved_row is not None:
            i_row[j], f_row[j], g_row[j], o_row[j], saved_row[j] = i, f, g, o, tanh_c


@inlined
def lstm_backward(gates: Any, saved: Any, states: Any, next_states: Any, dstates: Any) -> None:
    """`cells.LSTM.backward_gates`."""
    (_, c), (dh, dc) = states, dstates
    H = c.shape[1]
    for s in range(c.shape[0]):
        gates_row = gates[s]
        _lstm_backward_row(
            gates_row[:H],
            gates_row[H : 2 * H],
            gates_row[2 * H : 3 * H],
            gates_row[3 * H :],
            saved[s],
            c[s],
            dh[s],
            dc[s],
        )


@row
def _lstm_backward_row(
    i_row: Any, f_row: Any, g_row: Any, o_row: Any,  # inout: i, f, g, o -> di, df, dg, do
    saved_row: Any,  # in: tanh_c
    c_row: Any,  # in
    dh_row: Any,  # in: dh_next
    dc_row: Any,  # inout: dc_next -> dc
) -> None:  # fmt: skip
    one = of_type(c_row[0], 1.0)
    for j in range(c_row.size):
        i, f, g, o, tanh_c, c = i_row[j], f_row[j], g_row[j], o_row[j], saved_row[j], c_row[j]
        dc_next = dc_row[j] + (one - tanh_c * tanh_c) * o * dh_row[j]
        o_row[j] = o * (one - o) * tanh_c * dh_row[j]
        g_row[j] = (one - g * g) * i * dc_next
        i_row[j] = i * (one - i) * g * dc_next
        f_row[j] = (one - f) * f * c * dc_next
        dc_row[j] = dc_next * f
