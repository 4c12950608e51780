"""Compare the gradients of `backward` with finite differences of the forward call."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..backend import AnyArray, Array, Lengths, StatesLike, asarray, to_numpy
from ..backend.exports import exported_from
from ..core.checks import check_seed, check_size
from ..nn.cells import _CellModule
from ..nn.layers import _Layer
from ..nn.recurrent import _Recurrent

R = TypeVar("R", bound=_Recurrent)
STEPS = tuple(2.0**-k for k in (7, 10, 13, 16, 19))  # of the difference, largest first
SHARE = 1e-6  # largest truncation error allowed for, relative to the derivative
ROUNDINGS = 8  # in a step's activations, in addition to those of the sums before them


@exported_from("xprnn")
class GradientError(AssertionError):
    """A gradient differs from the derivative; the message contains the table."""


class Row(NamedTuple):
    """One input, state or parameter: the direction with the largest excess."""

    #: "x", "h0", or the name of a parameter.
    name: str
    #: <gradient, d>, from `backward`.
    analytic: float
    #: The difference quotient along d.
    numeric: float
    #: abs(analytic - numeric).
    error: float
    #: A bound of the difference quotient's own error.
    tolerance: float

    @property
    def excess(self) -> float:
        """The error in units of the tolerance: above 1 the gradient is wrong."""
        excess = self.error / self.tolerance
        return math.inf if math.isnan(excess) else excess


@dataclass(frozen=True)
class GradcheckReport:
    """The results of `gradcheck`; `str` is a table."""

    #: One for each input, state and parameter.
    rows: tuple[Row, ...]

    @property
    def worst(self) -> Row:
        """The row with the largest error in units of its tolerance."""
        return max(self.rows, key=lambda row: row.excess)

    def __str__(self) -> str:
        """One line per name, wrong ones marked."""
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
    layer: _Layer[StatesLike, Any] | _CellModule[StatesLike, Any],
    x: AnyArray,
    hx: StatesLike | None = None,
    *,
    lengths: Lengths | None = None,
    directions: int = 3,
    seed: int = 0,
    **inputs: AnyArray,
) -> GradcheckReport:
    """Compare every gradient of a layer or cell with finite differences in random directions.

    With fixed random u and v, let L = <u, output> + <v, h_n> (+ <w, c_n>; a cell has no
    output). For x, each state and each parameter θ that is not frozen, and random d with
    ‖d‖ = 1, `backward` gives <dL/dθ, d>; the central difference of fourth order is::

        D(s) = (8 (L(θ+sd) - L(θ-sd)) - (L(θ+2sd) - L(θ-2sd))) / 12s

    They may differ by the error of D. Its truncation error is s⁴ L⁽⁵⁾/30 + O(s⁶), so the error of
    D(2s) is 16 times as large, and D(2s) - D(s) is 15 times the error of D(s). Its rounding
    error is 18/12s times that of one L. A computed L is close to the exact value for arguments
    changed by K units of rounding ε/2, where K is the length of the sums in a step; the norm of
    the displaced argument is at most ‖θ‖ + 1. So, summed over all θ in R::

        R = K ε/2 (Σ|u output| + Σ|v h_n| + Σ ‖dL/dθ‖ (‖θ‖ + 1))
        |<dL/dθ, d> - D(s)| <= min(|D(2s) - D(s)|, 1e-6 |D(s)|) + 1.5 R / s

    Steps s from 2⁻⁷ down to 2⁻¹⁹ are tried until one agrees: a shorter step may avoid a kink of
    relu that a longer one crosses, and the term 1e-6 prevents a kink from increasing the
    tolerance. A wrong gradient disagrees for all of them. Errors below the rounding error of L,
    for example in the gradient of h0 after it has vanished over many steps, are not detected.

    All computations use a copy in float64, in train mode, with one dropout mask; the layer is not
    changed.

    :param layer: an RNN, GRU, LSTM, Recurrent or one of their cells, in any dtype and mode.
    :param x: as for a call of the layer; float32 or float64, independent of the layer's dtype.
    :param hx: the states, as for a call; None: zeros, whose gradients are checked too.
    :param lengths: as for a call of a layer; None for a cell.
    :param directions: number of random directions for each name, at least 1.
    :param seed: of the directions and of u and v.
    :param inputs: the inputs of a defined cell besides x, as for a call; they have no gradient.
    :return: one row for each name; `worst` is the one with the largest error / tolerance.
    :raises GradientError: gradients are wrong; the message names them and contains the table.
    :raises TypeError, ValueError: `layer` is none of these, it has parameters that are not finite,
        or an argument is invalid.

    B. Fornberg, "Generation of finite difference formulas on arbitrarily spaced grids" (1988);
    N. J. Higham, "Accuracy and stability of numerical algorithms" (2002), chapter 3.

    >>> import numpy as np, xprnn
    >>> x = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 2, 3)
    >>> report = xprnn.gradcheck(xprnn.GRU(3, 4, seed=0), x, lengths=[5, 3])
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
        raise TypeError(f"lengths: expected None, a {type(layer).__name__} runs one step")
    directions = check_size("directions", directions)
    rng = np.random.default_rng(check_seed(seed))
    with layer.backend.activate():
        function = _Function(layer, x, hx, lengths, rng, inputs)
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

    :raises ValueError: a parameter is not finite, as after a training run that diverged: there is
        no derivative to compare with.
    """
    for name, parameter in layer.parameters.items():
        if wrong := int((~np.isfinite(to_numpy(parameter))).sum()):
            raise ValueError(
                f"layer: expected finite parameters, got {name} with {wrong} of {parameter.size} "
                "elements infinite or NaN; its training has diverged"
            )
    float64 = copy.copy(layer).to(dtype="float64", compute_dtype="float64", precision="ieee")
    return float64.train()


def as_float64(layer: _Recurrent, value: Any) -> Any:
    """Floating-point arrays on the layer's backend in float64; other values, which calls reject."""
    if isinstance(value, (tuple, list)):
        return tuple(as_float64(layer, item) for item in value)
    array = layer.backend.from_dlpack(value)
    if array is not None and array.dtype.kind == "f":
        return asarray(array, backend=layer.backend.name, dtype="float64")
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
        inputs: Mapping[str, Any] | None = None,
    ) -> None:
        self._layer = float64_copy(layer)
        self._xp = layer.backend.xp
        self._calls = layer._calls
        self._options: dict[str, Any] = {n: as_float64(layer, a) for n, a in (inputs or {}).items()}
        if not isinstance(layer, _CellModule):
            self._options["lengths"] = lengths
        self._states = layer._spec.cell.state_names
        names = [name if isinstance(layer, _CellModule) else f"{name}0" for name in self._states]
        x, hx = as_float64(layer, x), as_float64(layer, hx)

        results = self._call(x, hx)  # rejects invalid arguments
        ends = results[-len(names) :]
        initial = (None,) * len(names) if hx is None else _as_tuple(hx)
        begin = layer._spec.cell.initial_values
        starts = [
            self._xp.zeros_like(end) + first if start is None else start
            for start, end, first in zip(initial, ends, begin, strict=True)
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
        direction /= max(float(_norm(direction)), 1e-300)  # 0 for an empty array
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
        self._layer.eval()  # discards the recorded call
        self._layer.parameters.update({name: at[name] for name in self._trained})
        x, *states = list(at.values())[: 1 + len(self._states)]
        return self._call(x, states if len(states) > 1 else states[0])

    def _call(self, x: Array, hx: Any) -> list[Array]:
        self._layer.train()
        self._layer._calls = self._calls  # the same dropout masks in every call
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
        """An estimate of the rounding error of a computed L, derived in `gradcheck`."""
        spec, unit = self._layer._spec, np.finfo(np.float64).eps / 2
        terms = max(spec.input_size, spec.num_directions * spec.output_size) + spec.hidden_size
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
