"""The GRU cell in its two forms, which differ in where the reset gate acts.

K. Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014).
"""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..numerics import sigmoid
from .base import Buffers, Cell, Weights


class GRU(Cell):
    """The GRU cell as torch and cuDNN have it: reset after the product. Gate order r z n.

    forward::

        gx = x W_ih' + b_ih                   (b_hh of r and z already added)
        gh = h W_hh' + b_hh
        r = σ(gx_r + gh_r)   z = σ(gx_z + gh_z)
        n = tanh(gx_n + r gh_n)               saved: gh_n
        h' = n + z (h - n)

    backward::

        dgx_n = dh' (1 - z) (1 - n^2)
        dgx_z = dh' (h - n) z (1 - z)
        dgx_r = dgx_n gh_n r (1 - r)
        dgh = [dgx_r dgx_z (r dgx_n)]         saved becomes dgx_n
        dh = dh' z + dgh W_hh
    """

    name: str = "gru"
    gate_names: tuple[str, ...] = ("r", "z", "n")
    folded: int = 2
    saved: int = 1
    forward_scratch: tuple[int, ...] = (3,)
    backward_scratch: tuple[int, ...] = (1, 1)
    undoing_reads: tuple[str, ...] = ("gates", "saved", "h")
    undoing_writes: tuple[str, ...] = ("gates", "saved")
    launches: tuple[int, int] | None = (14, 17)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """From gx and gh to the gates and the next states; see `Cell` for the buffers."""
        (h,), (h_next,), gates, gh_n = step.states, step.next_states, step.gates, step.saved
        H = h.shape[1]
        rz, r, n = gates[:, : 2 * H], gates[:, :H], gates[:, 2 * H :]
        rz += gh[:, : 2 * H]
        sigmoid(xp, rz)

        if bias_hh is None:
            gh_n[...] = gh[:, 2 * H :]
        else:
            xp.add(gh[:, 2 * H :], bias_hh[..., 2 * H :], out=gh_n)
        r_gh_n = gh[:, :H]
        xp.multiply(r, gh_n, out=r_gh_n)
        n += r_gh_n
        xp.tanh(n, out=n)
        _update(xp, gates, h, h_next)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Invert one step; see `Cell` for the buffers."""
        self.backward_gates(xp, step)
        (dh,), (_, t) = step.dstates, step.scratch
        xp.matmul(step.gates, weights.weight_hh, out=t)
        dh += t

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """From dnext to dgh; see `Cell` for the buffers."""
        (h,), (dh,), (dgx_n, t) = step.states, step.dstates, step.scratch
        gates, saved, H = step.gates, step.saved, h.shape[1]
        r, n = gates[:, :H], gates[:, 2 * H :]
        _update_backward(xp, gates, h, dh, dgx_n, t)

        saved *= dgx_n  # dgx_r = dgx_n gh_n r (1 - r)
        xp.subtract(1.0, r, out=t)
        t *= saved
        xp.multiply(dgx_n, r, out=n)  # dgh_n
        r *= t
        saved[...] = dgx_n

    def to_input_side(self, dgates: Array, saved: Array) -> None:
        """dgx differs from dgh in n: there the reset gate stands between them."""
        dgates[:, 2 * saved.shape[1] :] = saved


class GRUResetBefore(Cell):
    """The GRU cell of the original paper and ONNX's default: reset before the product.

    forward::

        gx = x W_ih' + b_ih + b_hh
        r = σ(gx_r + h W_hr')   z = σ(gx_z + h W_hz')
        q = r h                               saved: q
        n = tanh(gx_n + q W_hn')
        h' = n + z (h - n)

    backward::

        dgx_n = dh' (1 - z) (1 - n^2)
        dgx_z = dh' (h - n) z (1 - z)
        dq = dgx_n W_hn
        dgx_r = dq h r (1 - r)
        dgh = dgx
        dh = dh' z + dq r + dgx_r W_hr + dgx_z W_hz
        dW_hn = dgx_n' q                      (the other rows of dW_hh as ever)
    """

    name: str = "gru_reset_before"
    gate_names: tuple[str, ...] = ("r", "z", "n")
    folded: int = 3
    saved: int = 1
    forward_scratch: tuple[int, ...] = (2, 1)
    backward_scratch: tuple[int, ...] = (1, 1)
    undoing_reads: tuple[str, ...] = ("gates", "h")
    launches: tuple[int, int] | None = (14, 20)
    parts: tuple[str, ...] = (
        "forward_reset",
        "forward_candidate",
        "backward_candidate",
        "backward_reset",
    )

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Take one step; see `Cell` for the buffers."""
        (h,), (gh_rz, gh_n) = step.states, step.scratch
        H = h.shape[1]
        xp.matmul(h, weights.weight_hh[: 2 * H].T, out=gh_rz)
        self.forward_reset(xp, gh_rz, step)
        xp.matmul(step.saved, weights.weight_hh[2 * H :].T, out=gh_n)
        self.forward_candidate(xp, gh_n, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Invert one step; see `Cell` for the buffers."""
        (dh,), (_, t) = step.dstates, step.scratch
        gates, H = step.gates, dh.shape[1]
        self.backward_candidate(xp, step)
        dq = t
        xp.matmul(gates[:, 2 * H :], weights.weight_hh[2 * H :], out=dq)
        self.backward_reset(xp, dq, step)
        xp.matmul(gates[:, : 2 * H], weights.weight_hh[: 2 * H], out=t)
        dh += t

    def forward_reset(self, xp: Any, gh_rz: Array, step: Buffers) -> None:
        """r and z into `gates`, where gx is read, and q = r h to `saved`.

        `gh_rz` (N, 2*H) and `states` are read.
        """
        (h,) = step.states
        H = h.shape[1]
        rz, r = step.gates[:, : 2 * H], step.gates[:, :H]
        rz += gh_rz
        sigmoid(xp, rz)
        xp.multiply(r, h, out=step.saved)

    def forward_candidate(self, xp: Any, gh_n: Array, step: Buffers) -> None:
        """n into `gates`, where gx is read, and h' to `next_states`.

        `gh_n` (N, H) and `states` are read.
        """
        (h,), (h_next,) = step.states, step.next_states
        n = step.gates[:, 2 * h.shape[1] :]
        n += gh_n
        xp.tanh(n, out=n)
        _update(xp, step.gates, h, h_next)

    def backward_candidate(self, xp: Any, step: Buffers) -> None:
        """In `gates` n becomes dgx_n and z dgx_z, in `dstates` dh' becomes dh' z.

        `states` are read, `scratch` written.
        """
        (h,), (dh,), (dgx_n, t) = step.states, step.dstates, step.scratch
        _update_backward(xp, step.gates, h, dh, dgx_n, t)
        step.gates[:, 2 * h.shape[1] :] = dgx_n

    def backward_reset(self, xp: Any, dq: Array, step: Buffers) -> None:
        """In `gates` r becomes dgx_r = dq h r (1 - r); dq r is added to `dstates`.

        `dq` (N, H) is used up, `states` are read, the first of `scratch` is written.
        """
        (h,), (dh,), (dgx_r, _) = step.states, step.dstates, step.scratch
        r = step.gates[:, : h.shape[1]]
        xp.subtract(1.0, r, out=dgx_r)
        dgx_r *= h
        dgx_r *= dq
        dgx_r *= r
        dq *= r
        dh += dq
        r[...] = dgx_r

    def recurrent_gradient(
        self, xp: Any, dgh: Array, states: Array, saved: Array, dweight_hh: Array
    ) -> None:
        """The rows of n saw q = r h instead of h."""
        H = states.shape[1]
        xp.matmul(dgh[:, : 2 * H].T, states, out=dweight_hh[: 2 * H])
        xp.matmul(dgh[:, 2 * H :].T, saved, out=dweight_hh[2 * H :])


def _update(xp: Any, gates: Array, h: Array, h_next: Array) -> None:
    """h' = n + z (h - n). `gates` (N, 3*H) and `h` (N, H) are read, `h_next` (N, H) written."""
    H = h.shape[1]
    z, n = gates[:, H : 2 * H], gates[:, 2 * H :]
    xp.subtract(h, n, out=h_next)
    h_next *= z
    h_next += n


def _update_backward(xp: Any, gates: Array, h: Array, dh: Array, dgx_n: Array, t: Array) -> None:
    """Invert `_update` and the two activations before it.

    In `gates` z becomes dgx_z, n is used up and r stays; `dh` (N, H) becomes dh' z;
    `dgx_n` (N, H) is written; `t` (N, H) is scratch.
    """
    H = h.shape[1]
    z, n = gates[:, H : 2 * H], gates[:, 2 * H :]
    xp.subtract(1.0, z, out=t)
    t *= dh  # dn = dh' (1 - z)
    xp.multiply(n, n, out=dgx_n)
    xp.subtract(1.0, dgx_n, out=dgx_n)
    dgx_n *= t

    xp.subtract(h, n, out=n)
    n *= t
    dh *= z
    z *= n
