"""The norm of the gradient at each time step: does it vanish or explode?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import AnyArray, Lengths, StatesLike, to_numpy
from ..backend.exports import exported_from
from ..backend.floating_point import environment
from ..core.spec import StackSpec
from ..nn.arguments import check_upstream
from ..nn.layers import _Layer
from .gradient_check import as_float64, float64_copy

VANISHING, EXPLODING = 1e-2, 1e2  # norm at the first state / norm at the last state


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The results of `gradient_flow` by layer and direction, in float64; `str` is a table."""

    #: L*D names: l0, l0_reverse, l1, ...
    names: tuple[str, ...]
    #: (L*D, T), the norm of the gradient of the state after step t.
    norms: np.ndarray
    #: (L*D,), the first state's norm / the last one's, per row.
    ratios: np.ndarray
    #: (L*D,), the geometric mean of the factors per step.
    factors: np.ndarray
    #: (L*D, G), of each gate's block of weight_hh.
    spectral_radius: np.ndarray
    #: G names.
    gates: tuple[str, ...]
    #: L*D times "vanishing", "stable" or "exploding".
    verdicts: tuple[str, ...]

    def __str__(self) -> str:
        """One line per layer and direction."""
        radii = [f"radius {gate}".rstrip() for gate in self.gates]
        width = max(len(name) for name in self.names)
        head = [f"{'':{width}}", "per step", "last to first", *radii, "verdict"]
        lines = ["  ".join(head)]
        for k, name in enumerate(self.names):
            cells = [
                f"{name:{width}}",
                f"{self.factors[k]:8.4f}",
                f"{self.ratios[k]:13.3g}",
                *(f"{r:{len(t)}.4f}" for r, t in zip(self.spectral_radius[k], radii, strict=True)),
                self.verdicts[k],
            ]
            lines.append("  ".join(cells))
        return "\n".join(lines)


@exported_from("xprnn")
def gradient_flow(
    layer: _Layer[StatesLike, Any],
    x: AnyArray,
    hx: StatesLike | None = None,
    *,
    lengths: Lengths | None = None,
    doutput: AnyArray | None = None,
    dhx: StatesLike | None = None,
) -> GradientFlow:
    """Measure the norm of the gradient at each time step of each layer and direction.

    For a scalar L with the gradients dL/doutput and dL/dh_n, and s_t the state after step t (h_t;
    for an LSTM (h_t, c_t) jointly) of one layer and direction, over all rows of the batch::

        norms[t] = ‖dL/ds_t‖ = ‖∂L/∂h_t + (∂s_{t+1}/∂s_t)' dL/ds_{t+1}‖

    In each direction the gradient flows from the last state to the first: t runs from T-1 to 0, in
    the reverse direction from 0 to T-1. Norms are divided by the square root of the number of rows
    that run at step t; the ratio is that of the first state to the last, and the factor is its
    (T-1)th root. Steps before the first gradient enters are not counted. The verdict is
    "vanishing" if the ratio is below 1/100, "exploding" above 100, and "stable" between. A norm
    beyond the range of float64 is infinite or NaN, as are ratio and factor: "exploding".

    Gradients that enter later, from outputs, from the layer above or at the ends of shorter rows,
    are included in ratio and factor. Without any step both are 1.

    For an Elman layer the spectral radius of W_hh, the largest modulus of its
    eigenvalues, would be the factor per step
    without the nonlinearity; for gated layers it is given for each gate's block.

    All computations use a copy in float64, in train mode; the layer is not changed.

    :param layer: an RNN, GRU or LSTM, in any dtype and mode.
    :param x: as for a call of the layer; float32 or float64, independent of the layer's dtype.
    :param hx: the initial states, as for a call; None: zeros.
    :param lengths: as for a call.
    :param doutput: dL/doutput, of the output's shape; None: zeros.
    :param dhx: dL/dh_n, of h_n's shape, for an LSTM (dh_n, dc_n); None: zeros. Without doutput and
        dhx, each layer and direction is measured separately, with a fixed random dh_n of norm 1 in
        every row and no gradient from the layer above.
    :return: the norms and the quantities derived from them; `str` of it is a table.
    :raises TypeError, ValueError: `layer` is none of these, it has parameters that are not finite
        (its training has diverged), or an argument is invalid.

    R. Pascanu, T. Mikolov, Y. Bengio, "On the difficulty of training recurrent neural networks"
    (2013).

    >>> import numpy as np, xprnn
    >>> rnn = xprnn.RNN(3, 2, dtype="float64", seed=0)
    >>> rnn.parameters["weight_hh_l0"] = 0.5 * np.eye(2)
    >>> flow = xprnn.gradient_flow(rnn, np.zeros((9, 1, 3)))
    >>> flow.norms.shape, flow.spectral_radius.tolist(), flow.verdicts
    ((1, 9), [[0.5]], ('vanishing',))
    """
    if not isinstance(layer, _Layer):
        raise TypeError(f"layer: expected an RNN, GRU or LSTM, got {type(layer).__name__}")
    layer = float64_copy(layer)
    x, hx = as_float64(layer, x), as_float64(layer, hx)
    # overflow is a valid result here; the host computes too, whatever the layer's backend
    with layer.backend.activate(), environment():
        if doutput is None and dhx is None:
            upstream = _separate_upstreams(layer, layer.eval()(x, hx, lengths=lengths)[1])
            measured = [_measure(layer, x, hx, lengths, None, dhx) for dhx in upstream]
            norms = np.stack([each[k] for k, (each, _) in enumerate(measured)])
            rows = measured[0][1]
        else:
            doutput, dhx = as_float64(layer, doutput), as_float64(layer, dhx)
            norms, rows = _measure(layer, x, hx, lengths, doutput, dhx)
        return _report(layer, norms, norms / np.sqrt(np.maximum(rows, 1)))


def _measure(
    layer: _Layer, x: AnyArray, hx: Any, lengths: Any, doutput: Any, dhx: Any
) -> tuple[np.ndarray, Sequence[int]]:
    """The norms (L*D, T) for one upstream gradient, and the number of rows of each step."""
    calls = layer._calls
    layer.train()(x, hx, lengths=lengths)
    layer._calls = calls  # the same dropout masks in every call
    spec, record = layer._spec, layer._last_record()
    tape, batched = record.tape, record.batched
    doutput, dfinal = check_upstream(spec, layer.backend, layer.dtype, tape, batched, doutput, dhx)
    flow = layer.backend.xp.zeros((spec.num_layers * spec.num_directions, tape.batch.steps))
    layer._run_backward(record, doutput, dfinal, False, flow)
    return to_numpy(flow), tape.batch.counts


def _separate_upstreams(layer: _Layer, ends: Any) -> Iterator[Any]:
    """For each layer and direction a dh_n with norm 1 in its rows and 0 elsewhere."""
    h_n = ends[0] if isinstance(ends, tuple) else ends
    drawn = np.random.default_rng(0).standard_normal(h_n.shape)
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    for k in range(len(drawn)):
        dh_n = np.zeros_like(drawn)
        dh_n[k] = drawn[k]
        moved = layer.backend.from_host(dh_n)
        yield (moved, *[None] * (len(ends) - 1)) if isinstance(ends, tuple) else moved


def _report(layer: _Layer, norms: np.ndarray, per_row: np.ndarray) -> GradientFlow:
    spec = layer._spec
    measured = [
        _ratio_and_factor(norm if k % spec.num_directions else norm[::-1])
        for k, norm in enumerate(per_row)
    ]
    ratios, factors = np.array(measured).T
    return GradientFlow(
        names=tuple(
            name.removeprefix("weight_ih_") for name in layer.parameters if "weight_ih" in name
        ),
        norms=norms,
        ratios=ratios,
        factors=factors,
        spectral_radius=_spectral_radius(spec, layer),
        gates=_square_blocks(spec),
        verdicts=tuple(_verdict(ratio) for ratio in ratios),
    )


def _ratio_and_factor(norms: np.ndarray) -> tuple[float, float]:
    """The last norm / the first nonzero one, and the geometric mean of the factors per step.

    :param norms: (T,) in the order of the gradient's flow.
    """
    nonzero = np.flatnonzero(norms)
    if nonzero.size == 0 or nonzero[0] == norms.size - 1:
        return 1.0, 1.0  # no step
    ratio = norms[-1] / norms[nonzero[0]]
    return ratio, ratio ** (1 / (norms.size - 1 - nonzero[0]))


def _square_blocks(spec: StackSpec) -> tuple[str, ...]:
    """The gates with an H x H block in W_hh."""
    square = spec.state_sizes[0] == spec.hidden_size
    return spec.cell.recurrent_blocks if square else ()


def _spectral_radius(spec: StackSpec, layer: _Layer) -> np.ndarray:
    """The largest |eigenvalue| of each gate's H x H block of each W_hh, (L*D, G)."""
    gates, H = len(_square_blocks(spec)), spec.hidden_size
    if not gates:
        return np.empty((spec.num_layers * spec.num_directions, 0))
    weights = [to_numpy(p) for name, p in layer.parameters.items() if "weight_hh" in name]
    blocks = np.stack(weights).reshape(-1, gates, H, H)
    radius: np.ndarray = np.abs(np.linalg.eigvals(blocks)).max(axis=-1)
    return radius


def _verdict(ratio: float) -> str:
    if ratio < VANISHING:
        return "vanishing"
    return "exploding" if not ratio <= EXPLODING else "stable"  # not finite: "exploding"
