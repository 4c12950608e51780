"""Gradients against differences: is `backward` the derivative of the forward call?"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from .backend import AnyArray, Array, Given, Lengths, asarray, to_numpy
from .backend.exports import exported_from
from .cell_modules import _CellModule
from .checks import check_seed, check_size
from .layer import _Layer
from .recurrent import _Recurrent

R = TypeVar("R", bound=_Recurrent)
STEPS = tuple(2.0**-k for k in (7, 10, 13, 16, 19))  # of the difference, largest first
SHARE = 1e-6  # of the derivative: the most that a truncation error may be taken to be
ROUNDINGS = 8  # in a step's activations, beside those of the sums before them


@exported_from("xprnn")
class GradientError(AssertionError):
    """A gradient is not the derivative of what it claims; the message holds the table."""


class Row(NamedTuple):
    """One input, state or parameter: the direction in which it does worst."""

    name: str
    analytic: float  # <gradient, d>, from `backward`
    numeric: float  # the difference quotient along d
    error: float  # |analytic - numeric|
    tolerance: float  # what the difference may be wrong by

    @property
    def excess(self) -> float:
        """The error in units of the tolerance: above 1 the gradient is wrong."""
        excess = self.error / self.tolerance
        return math.inf if math.isnan(excess) else excess


@dataclass(frozen=True)
class GradcheckReport:
    """What `gradcheck` compared; `str` is a table."""

    rows: tuple[Row, ...]

    @property
    def worst(self) -> Row:
        """The row with the largest error in units of its tolerance."""
        return max(self.rows, key=lambda row: row.excess)

    def __str__(self) -> str:
        """One line a name, wrong ones marked."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}  {'analytic':>13}  {'numeric':>13}  {'error':>8}  {'tolerance':>9}"]
        lines += [
            f"{row.name:{width}}  {row.analytic:13.6e}  {row.numeric:13.6e}  {row.error:8.1e}  "
            f"{row.tolerance:9.1e}{'' if row.excess <= 1 else '  wrong'}"
            for row in self.rows
        ]
        return "\n".join(lines)


@exported_from("xprnn")
def gradcheck(
    layer: _Layer[Given, Any] | _CellModule[Given, Any],
    x: AnyArray,
    hx: Given | None = None,
    *,
    lengths: Lengths | None = None,
    directions: int = 3,
    seed: int = 0,
) -> GradcheckReport:
    """Compare every gradient of a layer or cell with a difference along random directions.

    With fixed random u and v, let L = <u, output> + <v, h_n> (+ <w, c_n>; a cell has no
    output). For x, each state and each parameter θ that is not frozen, and random d with
    ‖d‖ = 1, `backward` says <dL/dθ, d>; the central difference of fourth order says::

        D(s) = (8 (L(θ+sd) - L(θ-sd)) - (L(θ+2sd) - L(θ-2sd))) / 12s

    They may differ by the error of D. Its truncation error is s⁴ L⁽⁵⁾/30 + O(s⁶), so D(2s)
    is wrong by 16 times as much and |D(2s) - D(s)| is 15 times the error of D(s). Its rounding
    error is 18/12s times that of one L. A computed L is close to the exact one of arguments
    changed by K units of rounding ε/2, K the length of the sums in a step; the displaced
    argument is no longer than ‖θ‖ + 1. So, summed over all θ in R::

        R = K ε/2 (Σ|u output| + Σ|v h_n| + Σ ‖dL/dθ‖ (‖θ‖ + 1))
        |<dL/dθ, d> - D(s)| <= min(|D(2s) - D(s)|, 1e-6 |D(s)|) + 1.5 R / s

    Steps from 2⁻⁷ down to 2⁻¹⁹ are tried until one agrees: a kink of relu within reach of a
    long step is out of reach of a shorter one, and the 1e-6 keeps it from widening the
    tolerance. A gradient that is wrong disagrees at all of them. What the rounding of L
    hides, such as the gradient of h0 after so many steps that it has vanished, is not seen.

    Everything happens on a copy in float64, in train mode, with one dropout mask; the layer
    is not changed.

    :param layer: an RNN, GRU, LSTM, RNNCell, GRUCell or LSTMCell, in any dtype and mode.
    :param x: as for a call of the layer; float32 or float64, whichever the layer's dtype is.
    :param hx: the states, as for a call; None: zeros, and their gradients are checked too.
    :param lengths: as for a call of a layer; a cell has none.
    :param directions: how many random directions for each name, at least 1.
    :param seed: of the directions and of u and v.
    :return: one row for each name; `worst` is the one nearest to its tolerance, or past it.
    :raises GradientError: gradients are wrong; it names them and shows the table.
    :raises TypeError, ValueError: `layer` is none of these, it has parameters that are not finite,
        or an argument is not as it should be.

    B. Fornberg, "Generation of finite difference formulas on arbitrarily spaced grids" (1988);
    N. J. Higham, "Accuracy and stability of numerical algorithms" (2002), chapter 3.

    >>> import numpy as np, xprnn
    >>> from xprnn.gradcheck import gradcheck
    >>> x = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 2, 3)
    >>> report = gradcheck(xprnn.GRU(3, 4, seed=0), x, lengths=[5, 3])
    >>> [row.name for row in report.rows]
    ['x', 'h0', 'weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
    >>> report.worst.excess <= 1
    True
    """
    if not isinstance(layer, (_Layer, _CellModule)):
        raise TypeError(
            f"layer: expected an RNN, GRU, LSTM or one of their cells, got {type(layer).__name__}"
        )
    if isinstance(layer, _CellModule) and lengths is not None:
        raise TypeError(f"lengths: expected None, a {type(layer).__name__} takes one step")
    directions = check_size("directions", directions)
    rng = np.random.default_rng(check_seed(seed))
    with layer.backend.activate():
        function = _Function(layer, x, hx, lengths, rng)
        trials = [[function.compare(name, rng) for _ in range(directions)] for name in function.at]
    report = GradcheckReport(tuple(max(rows, key=lambda row: row.excess) for rows in trials))
    wrong = [row.name for row in report.rows if row.excess > 1]
    if wrong:
        raise GradientError(
            f"{type(layer).__name__}: wrong gradient of {', '.join(wrong)}\n{report}"
        )
    return report


def float64_copy(layer: R) -> R:
    """A copy of `layer` in float64 and train mode, on the same backend.

    :raises ValueError: a parameter is not finite, as after a training that diverged: there is no
        derivative at it, and nothing to be said of a gradient.
    """
    for name, parameter in layer.parameters.items():
        if wrong := int((~np.isfinite(to_numpy(parameter))).sum()):
            raise ValueError(
                f"layer: expected finite parameters, got {name} with {wrong} of {parameter.size} "
                "elements infinite or NaN; the training that gave it has diverged"
            )
    wide = copy.copy(layer).to(dtype="float64", compute_dtype="float64", precision="ieee")
    return wide.train()


def widened(layer: _Recurrent, value: Any) -> Any:
    """Floating arrays on the layer's backend in float64; others as they are: calls refuse them."""
    if isinstance(value, (tuple, list)):
        return tuple(widened(layer, item) for item in value)
    lent = layer.backend.adopt(value)
    if lent is not None and lent.dtype.kind == "f":
        return asarray(lent, backend=layer.backend.name, dtype="float64")
    return value


class _Function:
    """L as a function of a layer's inputs, states and parameters, with its gradient."""

    def __init__(
        self,
        layer: _Layer | _CellModule,
        x: Any,
        hx: Any,
        lengths: Any,
        rng: np.random.Generator,
    ) -> None:
        self._layer = float64_copy(layer)
        self._xp = layer.backend.xp
        self._calls = layer._calls
        self._options = {} if isinstance(layer, _CellModule) else {"lengths": lengths}
        self._states = layer._stack.cell.state_names
        names = [name if isinstance(layer, _CellModule) else f"{name}0" for name in self._states]
        x, hx = widened(layer, x), widened(layer, hx)

        results = self._call(x, hx)  # refuses arguments that are not as they should be
        ends = results[-len(names) :]
        given = (None,) * len(names) if hx is None else _as_tuple(hx)
        starts = [
            self._xp.zeros_like(end) if start is None else start
            for start, end in zip(given, ends, strict=True)
        ]
        trained = {n: p.copy() for n, p in self._layer.parameters.items() if n not in layer.frozen}
        self._trained = list(trained)
        self.at = {"x": x, **dict(zip(names, starts, strict=True)), **trained}

        self._upstream = [self._normal(result.shape, rng) for result in results]
        gradients = self._backward()
        self._gradients = dict(zip(("x", *names), gradients, strict=True))
        self._gradients |= {name: self._layer.grads[name] for name in trained}
        self._noise = self._rounding(results)

    def compare(self, name: str, rng: np.random.Generator) -> Row:
        """Gradient and difference along a random direction, at the first step that agrees."""
        direction = self._normal(self.at[name].shape, rng)
        direction /= max(float(_norm(direction)), 1e-300)  # an empty array stays one
        analytic = _dot(self._gradients[name], direction)
        rows = []
        for step in STEPS:
            near, middle, far = (self._slope(name, direction, k * step) for k in (1, 2, 4))
            numeric, coarse = (4 * near - middle) / 3, (4 * middle - far) / 3
            truncation = min(abs(coarse - numeric), SHARE * abs(numeric))
            tolerance = truncation + 1.5 / step * self._noise
            rows.append(Row(name, analytic, numeric, abs(analytic - numeric), tolerance))
            if rows[-1].excess <= 1:
                return rows[-1]
        return min(rows, key=lambda row: row.excess)

    def _slope(self, name: str, direction: Array, step: float) -> float:
        """The central difference of second order; results are subtracted before they are summed."""
        plus, minus = (self._results_at(name, sign * step * direction) for sign in (1, -1))
        rises = (_dot(u, p - m) for u, p, m in zip(self._upstream, plus, minus, strict=True))
        return sum(rises) / (2 * step)

    def _results_at(self, name: str, displacement: Array) -> list[Array]:
        at = {**self.at, name: self.at[name] + displacement}
        self._layer.eval()  # drops the last call's record
        self._layer.parameters.update({name: at[name] for name in self._trained})
        x, *states = list(at.values())[: 1 + len(self._states)]
        return self._call(x, states if len(states) > 1 else states[0])

    def _call(self, x: Array, hx: Any) -> list[Array]:
        self._layer.train()
        self._layer._calls = self._calls  # the clock of the dropout masks stands still
        results = self._layer(x, hx, **self._options)
        if isinstance(self._layer, _CellModule):
            return [*_as_tuple(results)]
        return [results[0], *_as_tuple(results[1])]

    def _backward(self) -> list[Array]:
        self._layer.zero_grad()
        ends: Any = tuple(self._upstream[-len(self._states) :])
        if len(ends) == 1:
            ends = ends[0]
        if isinstance(self._layer, _CellModule):
            dx, dhx = self._layer.backward(ends)
        else:
            dx, dhx = self._layer.backward(self._upstream[0], ends)
        return [dx, *_as_tuple(dhx)]

    def _rounding(self, results: list[Array]) -> float:
        """About what a computed L is wrong by; `gradcheck` says why."""
        net, unit = self._layer._stack, np.finfo(np.float64).eps / 2
        terms = max(net.input_size, net.num_directions * net.hidden_size) + net.hidden_size
        size = sum(_dot(abs(u), abs(r)) for u, r in zip(self._upstream, results, strict=True))
        size += sum(_norm(self._gradients[n]) * (_norm(value) + 1) for n, value in self.at.items())
        return float((terms + ROUNDINGS) * unit * size + np.finfo(np.float64).tiny)

    def _normal(self, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
        return self._layer.backend.from_host(rng.standard_normal(shape))


def _as_tuple(value: Any) -> tuple[Array, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _dot(a: Array, b: Array) -> float:
    return float(to_numpy((a * b).sum()))


def _norm(a: Array) -> float:
    return math.sqrt(_dot(a, a))
