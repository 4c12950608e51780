"""The pointwise ops of the GRU with reset before the product: see `cells.GRUResetBefore`.

Names as in `gates.py`: `*_row` is one row of an array, or one gate's block of it.
"""

from __future__ import annotations

from typing import Any

from .elementary import of_type, sigmoid, tanh
from .jit import inlined, row


@inlined
def forward_reset(gates: Any, gh_rz: Any, h: Any, saved: Any) -> None:
    """`cells.GRUResetBefore.forward_reset`."""
    H = h.shape[1]
    for s in range(h.shape[0]):
        gates_row, gh_row = gates[s], gh_rz[s]
        _reset_forward_row(
            gates_row[:H], gates_row[H : 2 * H], gh_row[:H], gh_row[H : 2 * H], h[s], saved[s]
        )


@row
def _reset_forward_row(
    r_row: Any, z_row: Any,  # inout: gx_r, gx_z -> r, z
    gh_r_row: Any, gh_z_row: Any,  # in
    h_row: Any,  # in
    saved_row: Any,  # out: q
) -> None:  # fmt: skip
    for j in range(h_row.size):
        r = sigmoid(r_row[j] + gh_r_row[j])
        z = sigmoid(z_row[j] + gh_z_row[j])
        q = r * h_row[j]
        r_row[j], z_row[j], saved_row[j] = r, z, q


@inlined
def forward_candidate(gates: Any, gh_n: Any, h: Any, h_next: Any) -> None:
    """`cells.GRUResetBefore.forward_candidate`."""
    H = h.shape[1]
    for s in range(h.shape[0]):
        gates_row = gates[s]
        _candidate_forward_row(gates_row[H : 2 * H], gates_row[2 * H :], gh_n[s], h[s], h_next[s])


@row
def _candidate_forward_row(
    z_row: Any,  # in
    n_row: Any,  # inout: gx_n -> n
    gh_n_row: Any,  # in
    h_row: Any,  # in
    h_next_row: Any,  # out
) -> None:
    for j in range(h_row.size):
        n = tanh(n_row[j] + gh_n_row[j])
        h_next_row[j] = n + z_row[j] * (h_row[j] - n)
        n_row[j] = n


@inlined
def backward_candidate(gates: Any, h: Any, dh: Any) -> None:
    """`cells.GRUResetBefore.backward_candidate`."""
    H = h.shape[1]
    for s in range(h.shape[0]):
        gates_row = gates[s]
        _candidate_backward_row(gates_row[H : 2 * H], gates_row[2 * H :], h[s], dh[s])


@row
def _candidate_backward_row(
    z_row: Any, n_row: Any,  # inout: z, n -> dgx_z, dgx_n
    h_row: Any,  # in
    dh_row: Any,  # inout: dh_next -> dh_next z
) -> None:  # fmt: skip
    one = of_type(h_row[0], 1.0)
    for j in range(h_row.size):
        z, n, dh_next = z_row[j], n_row[j], dh_row[j]
        dn = (one - z) * dh_next
        n_row[j] = (one - n * n) * dn
        z_row[j] = (h_row[j] - n) * dn * z
        dh_row[j] = dh_next * z


@inlined
def backward_reset(gates: Any, dq: Any, h: Any, dh: Any) -> None:
    """`cells.GRUResetBefore.backward_reset`."""
    H = h.shape[1]
    for s in range(h.shape[0]):
        _reset_backward_row(gates[s][:H], dq[s], h[s], dh[s])


@row
def _reset_backward_row(
    r_row: Any,  # inout: r -> dgx_r
    dq_row: Any,  # in
    h_row: Any,  # in
    dh_row: Any,  # inout: += dq r
) -> None:
    one = of_type(h_row[0], 1.0)
    for j in range(h_row.size):
        r, dq = r_row[j], dq_row[j]
        r_row[j] = (one - r) * h_row[j] * dq * r
        dh_row[j] = dh_row[j] + dq * r
