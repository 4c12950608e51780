"""The parts of the GRU whose reset gate acts before the product: see `cells.GRUResetBefore`."""

from __future__ import annotations

from typing import Any

from .elementary import of_type, sigmoid, tanh
from .jit import inlined, row


@inlined
def forward_reset(gates: Any, gh_rz: Any, h: Any, saved: Any) -> None:
    """`cells.GRUResetBefore.forward_reset`."""
    H = h.shape[1]
    for n in range(h.shape[0]):
        g, a = gates[n], gh_rz[n]
        _reset_row(g[:H], g[H : 2 * H], a[:H], a[H : 2 * H], h[n], saved[n])


@row
def _reset_row(r: Any, z: Any, gh_r: Any, gh_z: Any, h: Any, saved: Any) -> None:
    for j in range(h.size):
        reset = sigmoid(r[j] + gh_r[j])
        z[j] = sigmoid(z[j] + gh_z[j])
        r[j], saved[j] = reset, reset * h[j]


@inlined
def forward_candidate(gates: Any, gh_n: Any, h: Any, h_next: Any) -> None:
    """`cells.GRUResetBefore.forward_candidate`."""
    H = h.shape[1]
    for n in range(h.shape[0]):
        g = gates[n]
        _candidate_row(g[H : 2 * H], g[2 * H :], gh_n[n], h[n], h_next[n])


@row
def _candidate_row(z: Any, n: Any, gh_n: Any, h: Any, h_next: Any) -> None:
    for j in range(h.size):
        new = tanh(n[j] + gh_n[j])
        h_next[j] = new + z[j] * (h[j] - new)
        n[j] = new


@inlined
def backward_candidate(gates: Any, h: Any, dh: Any) -> None:
    """`cells.GRUResetBefore.backward_candidate`."""
    H = h.shape[1]
    for n in range(h.shape[0]):
        g = gates[n]
        _candidate_back_row(g[H : 2 * H], g[2 * H :], h[n], dh[n])


@row
def _candidate_back_row(z: Any, n: Any, h: Any, dh: Any) -> None:
    one = of_type(h[0], 1.0)
    for j in range(h.size):
        update, new, down = z[j], n[j], dh[j]
        share = (one - update) * down
        z[j] = (h[j] - new) * share * update
        n[j] = (one - new * new) * share
        dh[j] = down * update


@inlined
def backward_reset(gates: Any, dq: Any, h: Any, dh: Any) -> None:
    """`cells.GRUResetBefore.backward_reset`."""
    H = h.shape[1]
    for n in range(h.shape[0]):
        _reset_back_row(gates[n][:H], dq[n], h[n], dh[n])


@row
def _reset_back_row(r: Any, dq: Any, h: Any, dh: Any) -> None:
    one = of_type(h[0], 1.0)
    for j in range(h.size):
        reset, down = r[j], dq[j]
        r[j] = (one - reset) * h[j] * down * reset
        dh[j] = dh[j] + down * reset
