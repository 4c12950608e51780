"""The LSTM cell: S. Hochreiter, J. Schmidhuber, "Long short-term memory" (1997), with
the forget gate of F. A. Gers, J. Schmidhuber, F. Cummins (2000)."""

from __future__ import annotations

from typing import Any

from ..backend import Array
from ..core.cell import Buffers, Cell
from .numerics import sigmoid


class LSTM(Cell):
    """The LSTM cell, in torch's gate order i f g o.

    forward::

        gx = x W_ih' + b_ih + b_hh
        gh = h W_hh'
        a = gx + gh
        i = σ(a_i)   f = σ(a_f)   g = tanh(a_g)   o = σ(a_o)
        c_next = f c + i g
        tanh_c = tanh(c_next)                 saved: tanh_c
        h_next = o tanh_c

    backward, where di df dg do are the gradients of the pre-activations a_i a_f a_g a_o::

        dc_next += dh_next o (1 - tanh_c^2)
        do = dh_next tanh_c o (1 - o)
        dg = dc_next i (1 - g^2)
        di = dc_next g i (1 - i)
        df = dc_next c f (1 - f)
        dc = dc_next f
        dgx = dgh = [di df dg do]
        dh = dgh W_hh
    """

    name: str = "lstm"
    gate_names: tuple[str, ...] = ("i", "f", "g", "o")
    bias_folded_gates: int = 4
    saved: int = 1
    state_names: tuple[str, ...] = ("h", "c")
    initial_values: tuple[float, ...] = (0.0, 0.0)
    forward_scratch: tuple[int, ...] = (4,)
    backward_scratch: tuple[int, ...] = (1, 1)
    backward_reads: tuple[str, ...] = ("gates", "saved", "c")
    kernel_launches: tuple[int, int] | None = (18, 24)

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """Compute the gates and the next states from gx and gh; see `Cell` for the buffers."""
        (_, c), (h_next, c_next), gates = step.states, step.next_states, step.gates
        H = c.shape[1]
        gates += gh
        i, f, g, o = (gates[:, k * H : (k + 1) * H] for k in range(4))
        sigmoid(xp, gates[:, : 2 * H])
        xp.tanh(g, out=g)
        sigmoid(xp, o)

        ig, tanh_c = gh[:, :H], step.saved
        xp.multiply(i, g, out=ig)
        xp.multiply(f, c, out=c_next)
        c_next += ig
        xp.tanh(c_next, out=tanh_c)
        xp.multiply(o, tanh_c, out=h_next)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """Compute dgh and dc from dnext; see `Cell` for the buffers."""
        (_, c), (dh, dc), (dg, t), gates = step.states, step.dstates, step.scratch, step.gates
        H = dh.shape[1]
        i, f, g, o = (gates[:, k * H : (k + 1) * H] for k in range(4))
        tanh_c = step.saved

        xp.multiply(tanh_c, tanh_c, out=t)  # dc_next += dh_next o (1 - tanh_c^2)
        xp.subtract(1.0, t, out=t)
        t *= o
        t *= dh
        dc += t

        xp.subtract(1.0, o, out=t)  # do
        o *= t
        o *= tanh_c
        o *= dh

        xp.multiply(g, g, out=dg)  # dg, in a separate array: di still needs g
        xp.subtract(1.0, dg, out=dg)
        dg *= i
        dg *= dc

        xp.subtract(1.0, i, out=t)  # di
        i *= t
        i *= g
        i *= dc
        g[...] = dg

        xp.subtract(1.0, f, out=t)  # df, and dc = dc_next f
        t *= c
        t *= dc
        dc *= f
        f *= t
