"""The GRU cell in its two forms, which differ in where the reset gate is applied.

K. Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array
from ..core.cell import Buffers, Cell, GradientTerm, Weights
from .numerics import sigmoid


class GRU(Cell):
    """The GRU cell of torch and cuDNN: reset after the product. Gate order r z n.

    forward::

        gx = x W_ih' + b_ih                   (b_hh of r and z already added)
        gh = h W_hh' + b_hh
        r = σ(gx_r + gh_r)   z = σ(gx_z + gh_z)
        n = tanh(gx_n + r gh_n)               saved: gh_n
        h_next = n + z (h - n)

    backward::

        dn = dh_next (1 - z)
        dgx_n = dn (1 - n^2)
        dgx_z = dn (h - n) z                  = dh_next (h - n) z (1 - z)
        dh = dh_next z
        dr = dgx_n gh_n
        dgx_r = dr r (1 - r)
        dgh_n = dgx_n r
        dgh = [dgx_r dgx_z dgh_n]             saved: gh_n -> dgx_n
        dh += dgh W_hh
    """

    name: str = "gru"
    gate_names: tuple[str, ...] = ("r", "z", "n")
    bias_folded_gates: int = 2
    saved: int = 1
    forward_scratch: tuple[int, ...] = (3,)
    backward_scratch: tuple[int, ...] = (1, 1)
    backward_reads: tuple[str, ...] = ("gates", "saved", "h")
    backward_writes: tuple[str, ...] = ("gates", "saved")
    kernel_launches: tuple[int, int] | None = (14, 17)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """Compute the gates and h_next from gx and gh; see `Cell` for the buffers."""
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
        """Compute the gradient of one step; see `Cell` for the buffers."""
        self.backward_gates(xp, step)
        (dh,), (_, t) = step.dstates, step.scratch
        xp.matmul(step.gates, weights.weight_hh, out=t)
        dh += t

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """Compute dgh, dgx_n and the direct term of dh from dnext; see `Cell` for the buffers."""
        (h,), (dh,), (dgx_n, t) = step.states, step.dstates, step.scratch
        gates, saved, H = step.gates, step.saved, h.shape[1]
        r, n = gates[:, :H], gates[:, 2 * H :]
        _update_backward(xp, gates, h, dh, dgx_n, t)

        saved *= dgx_n  # dr = dgx_n gh_n
        xp.subtract(1.0, r, out=t)
        t *= saved
        xp.multiply(dgx_n, r, out=n)  # dgh_n = dgx_n r, before r is overwritten
        r *= t  # dgx_r = dr r (1 - r)
        saved[...] = dgx_n

    def to_input_side(self, dgates: Array, saved: Array) -> None:
        """Replace dgh_n by dgx_n; the other blocks of dgh and dgx are equal."""
        dgates[:, 2 * saved.shape[1] :] = saved


class GRUResetBefore(Cell):
    """The GRU cell of the original paper and ONNX's default: reset before the product.

    forward::

        gx = x W_ih' + b_ih + b_hh
        r = σ(gx_r + h W_hr')   z = σ(gx_z + h W_hz')
        q = r h                               saved: q
        n = tanh(gx_n + q W_hn')
        h_next = n + z (h - n)

    backward::

        dn = dh_next (1 - z)
        dgx_n = dn (1 - n^2)
        dgx_z = dn (h - n) z                  = dh_next (h - n) z (1 - z)
        dh = dh_next z
        dq = dgx_n W_hn
        dgx_r = dq h r (1 - r)
        dh += dq r + dgx_r W_hr + dgx_z W_hz
        dgh = dgx
        dW_hn = dgx_n' q                      (the other rows of dW_hh as in the GRU)
    """

    name: str = "gru_reset_before"
    gate_names: tuple[str, ...] = ("r", "z", "n")
    bias_folded_gates: int = 3
    saved: int = 1
    forward_scratch: tuple[int, ...] = (2, 1)
    backward_scratch: tuple[int, ...] = (1, 1)
    backward_reads: tuple[str, ...] = ("gates", "h")
    kernel_launches: tuple[int, int] | None = (14, 20)
    pointwise_ops: tuple[str, ...] = (
        "forward_reset",
        "forward_candidate",
        "backward_candidate",
        "backward_reset",
    )

    def forward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute one step; see `Cell` for the buffers."""
        (h,), (gh_rz, gh_n) = step.states, step.scratch
        H = h.shape[1]
        xp.matmul(h, weights.weight_hh[: 2 * H].T, out=gh_rz)
        self.forward_reset(xp, gh_rz, step)
        xp.matmul(step.saved, weights.weight_hh[2 * H :].T, out=gh_n)
        self.forward_candidate(xp, gh_n, step)

    def backward(self, xp: Any, weights: Weights, step: Buffers) -> None:
        """Compute the gradient of one step; see `Cell` for the buffers."""
        (dh,), (_, t) = step.dstates, step.scratch
        gates, H = step.gates, dh.shape[1]
        self.backward_candidate(xp, step)
        dq = t
        xp.matmul(gates[:, 2 * H :], weights.weight_hh[2 * H :], out=dq)
        self.backward_reset(xp, dq, step)
        xp.matmul(gates[:, : 2 * H], weights.weight_hh[: 2 * H], out=t)
        dh += t

    def forward_reset(self, xp: Any, gh_rz: Array, step: Buffers) -> None:
        """Compute r, z and q = r h.

        :param gh_rz: in, (N, 2*H).
        :param step: `states` in; r and z blocks of `gates` inout: gx -> r, z; `saved` out: q.
        """
        (h,) = step.states
        H = h.shape[1]
        rz, r = step.gates[:, : 2 * H], step.gates[:, :H]
        rz += gh_rz
        sigmoid(xp, rz)
        xp.multiply(r, h, out=step.saved)

    def forward_candidate(self, xp: Any, gh_n: Array, step: Buffers) -> None:
        """Compute n and h_next.

        :param gh_n: in, (N, H).
        :param step: `states` in; z block of `gates` in, n block inout: gx -> n; `next_states` out.
        """
        (h,), (h_next,) = step.states, step.next_states
        n = step.gates[:, 2 * h.shape[1] :]
        n += gh_n
        xp.tanh(n, out=n)
        _update(xp, step.gates, h, h_next)

    def backward_candidate(self, xp: Any, step: Buffers) -> None:
        """Compute dgx_n, dgx_z and dh = dh_next z.

        :param step: `states` in; z and n blocks of `gates` inout: z, n -> dgx_z, dgx_n;
            `dstates` inout: dh_next -> dh; `scratch` workspace.
        """
        (h,), (dh,), (dgx_n, t) = step.states, step.dstates, step.scratch
        _update_backward(xp, step.gates, h, dh, dgx_n, t)
        step.gates[:, 2 * h.shape[1] :] = dgx_n

    def backward_reset(self, xp: Any, dq: Array, step: Buffers) -> None:
        """Compute dgx_r = dq h r (1 - r) and add dq r to dh.

        :param dq: inout, (N, H); its contents are lost.
        :param step: `states` in; r block of `gates` inout: r -> dgx_r; `dstates` inout;
            `scratch[0]` workspace.
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

    def gradient_terms(
        self,
        states: tuple[Callable[[int], Array], Callable[[int], Array]],
        dgh: Array,
        saved: Array,
        dweights: Weights,
    ) -> list[GradientTerm]:
        """The rows of n are computed from q = r h, the others from h."""
        H, (dweight, dbias) = saved.shape[1], (dweights.weight_hh, dweights.bias_hh)
        return [
            GradientTerm(
                dgh[:, rows],
                inputs,
                None if dweight is None else dweight[rows],
                None if dbias is None else dbias[rows],
            )
            for rows, inputs in (
                (slice(0, 2 * H), states[0](0)),
                (slice(2 * H, 3 * H), saved),
            )
        ]


def _update(xp: Any, gates: Array, h: Array, h_next: Array) -> None:
    """Compute h_next = n + z (h - n).

    in: `gates` (N, 3*H), `h` (N, H). out: `h_next` (N, H).
    """
    H = h.shape[1]
    z, n = gates[:, H : 2 * H], gates[:, 2 * H :]
    xp.subtract(h, n, out=h_next)
    h_next *= z
    h_next += n


def _update_backward(xp: Any, gates: Array, h: Array, dh: Array, dgx_n: Array, t: Array) -> None:
    """Backward of `_update` and of the activations of z and n.

    in: `h` (N, H). inout: `gates` (N, 3*H), z -> dgx_z, n -> undefined, r unchanged; `dh` (N, H),
    dh_next -> dh_next z. out: `dgx_n` (N, H). workspace: `t` (N, H).
    """
    H = h.shape[1]
    z, n = gates[:, H : 2 * H], gates[:, 2 * H :]
    xp.subtract(1.0, z, out=t)
    t *= dh  # dn = dh_next (1 - z)
    xp.multiply(n, n, out=dgx_n)  # dgx_n = dn (1 - n^2)
    xp.subtract(1.0, dgx_n, out=dgx_n)
    dgx_n *= t

    xp.subtract(h, n, out=n)  # dgx_z = dn (h - n) z, and dh = dh_next z
    n *= t
    dh *= z
    z *= n
