"""The cells: one step and its gradient each, in plain `xp`. The mathematics of the project.

To add a cell: a definition (`definition/`), which needs no file here. The cells below are written
by hand, as the readable mathematics and the reference of what is derived: one file, and one line in
`CELLS`.

Back-propagation through time
-----------------------------
A layer applies one step T times with the same weights θ = (W_ih, W_hh, b_ih, b_hh)::

    a_t = f(gx_t, gh_t)       gx_t = x_t W_ih' + b_ih       gh_t = h_{t-1} W_hh' + b_hh
    h_t = φ(a_t, h_{t-1})

(' after a matrix transposes it; rows are batch entries, so weights multiply from the right; the
LSTM's second state c_t accompanies h_t and adds a term of the same form.) Let L be any
scalar function of the h_t, and y̅_t its direct derivative with respect to h_t, which the caller
passes as `doutput[t]`: it counts h_t as output t and ignores that later states depend on it too.
Write dv for the total derivative dL/dv.

1.  *The recursion.* h_t reaches L as output t and through step t+1, and in no other way::

        dh_t = y̅_t + (∂h_{t+1}/∂h_t)' dh_{t+1}        dh_T = y̅_T + dh_n

    so one pass from the last step to the first computes all dh_t. Each `Cell.backward` is the
    map dh_{t+1} -> (∂h_{t+1}/∂h_t)' dh_{t+1}: directly through φ, and through gh by

        dgh = (∂h_{t+1}/∂gh)' dh_{t+1}        dh += dgh W_hh.

2.  *The weights.* θ enters every step, so its derivative is a sum over steps, and the term of one
    step does not depend on those of the others::

        dW_hh = Σ_t dgh_t' h_{t-1}        db_hh = Σ_t Σ_rows dgh_t
        dW_ih = Σ_t dgx_t' x_t            db_ih = Σ_t Σ_rows dgx_t        dx_t = dgx_t W_ih

    With the rows of all T steps stacked in one matrix, each sum over t and rows *is* a matrix
    product: dW_hh = dGH' H_prev. The backward pass therefore stores dgh_t and multiplies
    afterwards: three large products in all instead of one small product per step and weight.

3.  *The initial state.* dh_0 is the result of the last backward step.

4.  *Rows of different lengths.* The backward pass of a row starts at the row's last step, with its
    own row of dh_n; a row of length zero has h_n = h_0, so dh_0 = dh_n.

5.  *Why gradients vanish or explode.* Unrolled, dh_t contains the product of T-t factors
    ∂h_{k+1}/∂h_k. For the Elman cell a factor is diag(1 - h²) W_hh, so its norm behaves like the
    spectral radius of W_hh to the power T-t, damped where tanh saturates. The gated cells
    have the direct path z (GRU) or f (LSTM), a factor that can stay near one.

Sources: R. J. Williams, D. Zipser, "Gradient-based learning algorithms for recurrent
networks and their computational complexity" (1995); R. Pascanu, T. Mikolov, Y. Bengio, "On
the difficulty of training recurrent neural networks" (2013).
"""

from ..core.cell import Buffers, Cell, Weights
from .registry import CELLS

__all__ = ["CELLS", "Buffers", "Cell", "Weights"]
