"""The GRU whose reset gate acts before the product, in a slow independent implementation.

From K. Cho et al., "Learning phrase representations using RNN encoder-decoder" (2014),
equations 5 to 8, and the GRU operator of ONNX with `linear_before_reset=0`: one row and one step
at a time, each gate with its own weights, gradients by torch's autograd, all in float64. No code
is shared with `xprnn`; torch has no such layer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from tests.support.cases import Case, Problem, Results
from tests.support.torch_cases import on_one_thread

torch = pytest.importorskip("torch")


class Gates(NamedTuple):
    """The parameters of one direction of one layer, by gate, named as in ONNX.

    W and Wb are the matrix and the bias for x, R and Rb those for h.
    """

    W_r: torch.Tensor  # (H, I)
    W_z: torch.Tensor
    W_h: torch.Tensor
    R_r: torch.Tensor  # (H, H)
    R_z: torch.Tensor
    R_h: torch.Tensor
    Wb_r: torch.Tensor  # (H,)
    Wb_z: torch.Tensor
    Wb_h: torch.Tensor
    Rb_r: torch.Tensor  # (H,)
    Rb_z: torch.Tensor
    Rb_h: torch.Tensor


def gates_of(parameters: dict[str, torch.Tensor], suffix: str) -> Gates:
    """Split torch's stacked parameters, gate order r z n; absent biases are zero."""
    W, R = parameters[f"weight_ih{suffix}"], parameters[f"weight_hh{suffix}"]
    zero = torch.zeros(len(R), dtype=R.dtype)
    Wb, Rb = (parameters.get(f"bias_{side}{suffix}", zero) for side in ("ih", "hh"))
    H = R.shape[1]
    return Gates(*(array[k * H : (k + 1) * H] for array in (W, R, Wb, Rb) for k in range(3)))


def step(p: Gates, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The next state (H,) of one row, from x (I,) and h (H,)."""
    r = torch.sigmoid(p.W_r @ x + p.R_r @ h + p.Wb_r + p.Rb_r)
    z = torch.sigmoid(p.W_z @ x + p.R_z @ h + p.Wb_z + p.Rb_z)
    candidate = torch.tanh(p.W_h @ x + p.R_h @ (r * h) + p.Wb_h + p.Rb_h)
    return (1 - z) * candidate + z * h


def run_direction(
    p: Gates, x: torch.Tensor, h0: torch.Tensor, lengths: list[int], reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (T, N, H) and final states (N, H) of x (T, N, I) from h0 (N, H)."""
    zero = torch.zeros_like(p.Rb_r)
    outputs, finals = [[zero] * x.shape[1] for _ in x], []
    for row, h in enumerate(h0):
        times = range(lengths[row])
        for t in reversed(times) if reverse else times:
            h = outputs[t][row] = step(p, x[t, row], h)
        finals.append(h)
    return torch.stack([torch.stack(rows) for rows in outputs]), torch.stack(finals)


@on_one_thread
def reference_run(case: Case, parameters: Results, problem: Problem) -> Results:
    """The results of `cases.run`, computed with the equations above."""

    def leaf(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array.astype(np.float64), requires_grad=True)

    weights = {name: leaf(array) for name, array in parameters.items()}
    x, (state,) = leaf(problem.x), problem.initial
    h0 = leaf(state if case.states else np.zeros_like(state))
    lengths = [case.T] * case.N if problem.lengths is None else list(problem.lengths)
    current, finals = x.transpose(0, 1) if case.batch_first else x, []
    for layer in range(case.layers):
        outputs = []
        for d in range(case.directions):
            p = gates_of(weights, f"_l{layer}" + "_reverse" * d)
            output, final = run_direction(p, current, h0[len(finals)], lengths, reverse=d == 1)
            outputs.append(output)
            finals.append(final)
        current = torch.cat(outputs, dim=2)
    output = current.transpose(0, 1) if case.batch_first else current
    h_n = torch.stack(finals)
    upstream = [torch.tensor(d.astype(np.float64)) for d in (problem.doutput, *problem.dfinal)]
    torch.autograd.backward([output, h_n], upstream)
    results = {"output": output, "h_n": h_n, "dx": x.grad, "dh0": h0.grad}
    results |= {f"d{name}": weight.grad for name, weight in weights.items()}
    return {name: tensor.detach().numpy() for name, tensor in results.items()}
