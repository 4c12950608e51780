"""Compare one layer or cell with the float64 equations, for the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backend import asarray, to_numpy
from ...nn.cells import _CellModule
from ...nn.layers import _Layer
from ..tolerances import EPSILON, LARGEST, error_of, tolerance
from .report import Row, worst_of

Module = _Layer | _CellModule
Results = dict[str, np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]

NUDGE = 2.0**-40  # relative change of all values: visible in float64 results, too small for kinks
MAX_AMPLIFICATION = 4.0  # of a relative change of the values within `tolerance`
MAX_LIMIT = 0.5  # a limit above this would accept results unrelated to the equations
SQUARE = 2.0**511  # sums of squares of values up to this are finite in float64, for the gradcheck
REACH, TRIES = 2, 5  # changes by this many ε, in this many directions, cross all relevant kinks


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a call and of its backward pass, on the host in float64."""

    x: np.ndarray
    states: list[np.ndarray]
    upstream: list[np.ndarray]  # one for each result
    options: dict[str, Any]  # a layer's lengths

    def changed(self, change: Change) -> CallArguments:
        """A copy with all arrays changed."""
        states, upstream = ([change(a) for a in arrays] for arrays in (self.states, self.upstream))
        return CallArguments(change(self.x), states, upstream, self.options)

    def first(self, steps: int, axis: int) -> CallArguments:
        """A copy with only the first steps, along this axis, of a layer's call."""
        at = (slice(None),) * axis + (slice(steps),)
        output, *ends = self.upstream
        lengths = self.options["lengths"]
        cut = None if lengths is None else np.minimum(lengths, steps)
        upstream = [output[at], *ends]
        return CallArguments(self.x[at], self.states, upstream, {"lengths": cut})


class Equations:
    """The results of the float64 equations on NumPy for one call of a layer and its backward pass.

    The values are those that the layer's products read: its parameters rounded to its compute
    dtype, and normally distributed values drawn from `seed`, rounded likewise, for everything else.
    `limits` are those of `tolerance`, times the factor by which the equations amplify a small
    change of their values more than MAX_AMPLIFICATION. If a kink of relu is so near that rounding
    decides on which side of it a value lies, the gradients, which are discontinuous there, are
    omitted. If values exceed the type's range, the call ends before the first step in which a sum
    may overflow, because later results depend on the order of summation; `steps` is the number of
    steps compared.

    :raises ValueError: `shape` is invalid, no step can be compared, or the limits would be
        meaningless.
    """

    def __init__(self, layer: Module, shape: tuple[int, ...], lengths: Any, seed: int) -> None:
        precision = layer.arithmetic
        self.operand_type: str = (
            "tf32" if precision.precision == "tf32" else str(precision.compute_dtype.name)
        )
        self._compute_dtype = precision.compute_dtype
        self.largest: float = min(LARGEST[self.operand_type], SQUARE)
        self._layer = copy.copy(layer).to(
            "numpy", dtype="float64", compute_dtype="float64", precision="ieee"
        )
        options = {"lengths": lengths} if isinstance(layer, _Layer) else {}
        self.parameters: dict[str, np.ndarray] = {
            n: self._rounded(p) for n, p in self._layer.parameters.items()
        }
        with np.errstate(over="ignore", invalid="ignore"):
            self.arguments: CallArguments = self._draw(shape, options, np.random.default_rng(seed))
            self.expected: dict[str, np.ndarray] = self._before_overflow()
        self.steps: int
        self.steps, batch = layer._steps_and_batch(self.arguments.x.shape)
        slopes = self._slopes(NUDGE, 0)
        self.kinked: bool = any(c.has_kinks for c in layer._spec.cells) and self._is_kinked()
        if self.kinked:
            self.expected = {n: a for n, a in self.expected.items() if not n.startswith("d")}
        self.limits: dict[str, float] = self._limits(slopes, self.steps, batch)

    def compare(self, layer: Module, implementation: str) -> Row:
        """The array with the largest excess; `layer`, a copy, gets these parameters."""
        layer.load_state_dict(self.parameters)
        unit, cell = EPSILON[self.operand_type], layer._spec.cell.name
        results = results_of(layer, self.arguments)
        rows = [
            Row(
                cell,
                implementation,
                self.operand_type,
                error_of(results[name], expected) / unit,
                name,
                self.limits[name] / unit,
            )
            for name, expected in self.expected.items()
        ]
        return worst_of(rows)[0]

    def unrecorded(self, arguments: CallArguments) -> Results:
        """The results of a call in eval mode with other arguments, in float64."""
        self._layer.eval().parameters.update(self.parameters)
        return unrecorded_results(self._layer, arguments)

    @staticmethod
    def are_those_of(layer: Module, implementation: str) -> bool:
        """Whether the layer with this implementation is itself the reference of the comparison."""
        float64 = layer.arithmetic.compute_dtype == np.float64
        return implementation == "reference" and layer.backend.name == "numpy" and float64

    def _rounded(self, values: Any) -> np.ndarray:
        return values.astype(self._compute_dtype).astype(np.float64)

    def _draw(
        self, shape: tuple[int, ...], options: dict[str, Any], rng: np.random.Generator
    ) -> CallArguments:
        def normal(shape: tuple[int, ...]) -> np.ndarray:
            return self._rounded(rng.standard_normal(shape))

        x = normal(shape)
        results = flat(self._layer.eval()(x, **options))
        states = results[-len(self._layer._spec.cell.state_names) :]
        if any(self._layer._spec.cell.initial_values):
            # not every state can occur: a divisor may be positive in all of them
            drawn = [self._rounded(np.where(np.isfinite(a), a, 0.0)) for a in states]
        else:
            drawn = [normal(a.shape) for a in states]
        return CallArguments(x, drawn, [normal(a.shape) for a in results], options)

    def _before_overflow(self) -> Results:
        """The results of the steps within the type's range; truncates `arguments` to them."""
        complete, layer = self.arguments, self._layer
        expected = self._at(lambda values: values)
        if self._stays_finite(expected):
            return expected
        axis = int(complete.x.ndim == 3 and layer.options.get("batch_first", False))
        fits, beyond = 0, layer._steps_and_batch(complete.x.shape)[0]
        while isinstance(layer, _Layer) and beyond - fits > 1:
            middle = (fits + beyond) // 2
            self.arguments = complete.first(middle, axis)
            if self._stays_finite(self._at(lambda values: values)):
                fits = middle
            else:
                beyond = middle
        if isinstance(layer, _Layer):
            self.arguments = complete.first(max(fits, 1), axis)
        expected = self._at(lambda values: values)
        if not fits and not self._is_within(expected):
            name = layer._spec.cell.name
            for result, array in expected.items():
                if not np.isfinite(array).all():
                    raise ValueError(f"layer: {name}'s float64 {result} is not finite")
            raise ValueError(
                f"layer: {name} may overflow {self.operand_type} in its first step, expected "
                f"values whose sums stay below {self.largest:.2g}"
            )
        return expected

    def _is_within(self, results: Results) -> bool:
        """Whether the sums of a call of one step, with these results, cannot overflow."""
        inputs = [self.arguments.x, *self.arguments.states, *self.arguments.upstream]
        sums = [self._growth() * np.abs(array).max(initial=0.0) for array in inputs]
        sums += [np.abs(array).max(initial=0.0) for array in results.values()]
        return all(each <= self.largest for each in sums)  # False for NaN

    def _growth(self) -> float:
        """An upper bound of a step's sums of products / the largest element of x and state."""
        sums = [
            abs(p).sum(axis) for p in self.parameters.values() if p.ndim == 2 for axis in (0, 1)
        ]
        return max(1.0, *[2 * float(each.max()) for each in sums])

    def _stays_finite(self, results: Results) -> bool:
        """Whether no sum in a step of this call can overflow, in any order of summation."""
        growth = self._growth()
        for name, array in results.items():
            # gradients of weights are accumulated at least in float32
            float32 = self._compute_dtype.itemsize < 4 and name.startswith(("dweight", "dbias"))
            largest = LARGEST["float32"] if float32 else self.largest
            if not growth * float(np.abs(array).max(initial=0.0)) <= largest:
                return False
        return True

    def _at(self, change: Change) -> Results:
        """The results with all parameters and arguments changed."""
        self._layer.eval().parameters.update({n: change(p) for n, p in self.parameters.items()})
        return results_of(self._layer, self.arguments.changed(change))

    def _slopes(self, size: float, direction: int) -> dict[str, float]:
        """The relative change of each result / that of all values."""
        rng = np.random.default_rng(direction)
        nudged = self._at(lambda a: a * (1 + size * rng.choice((-1, 1), a.shape)))
        return {name: error_of(nudged[name], a) / size for name, a in self.expected.items()}

    def _is_kinked(self) -> bool:
        """Whether rounding can reach a discontinuity of a gradient."""
        reach = max(REACH * EPSILON[self.operand_type], NUDGE)
        for direction in range(TRIES):
            near, far = self._slopes(NUDGE, direction), self._slopes(reach, direction)
            if any(far[name] > 1.5 * near[name] + NUDGE for name in far if name.startswith("d")):
                return True
        return False

    def _limits(self, slopes: dict[str, float], steps: int, batch: int) -> dict[str, float]:
        spec = self._layer._spec
        between = spec.num_directions * spec.output_size if spec.num_layers > 1 else 0
        width = max(max(spec.input_size, between) + spec.hidden_size, batch)
        base = tolerance(
            self.operand_type, steps=max(steps, 1), width=width, layers=spec.num_layers
        )
        limits = {name: base * max(1.0, slopes[name] / MAX_AMPLIFICATION) for name in self.expected}
        worst = max(limits, key=lambda name: limits[name])
        if limits[worst] > MAX_LIMIT:
            raise ValueError(
                f"shape: rounding to {self.operand_type} alone may change {worst} by "
                f"{limits[worst]:.0%} of its largest element, which would hide any error; "
                "expected a smaller shape, or a type of higher precision"
            )
        return limits


def results_of(layer: Module, arguments: CallArguments) -> Results:
    """Every result and every gradient by name, on the host; gradients of weights by gate.

    The call is made without and with recording, with the same dropout masks; the layer is in train
    mode afterwards.
    """
    calls = layer._calls
    unrecorded = unrecorded_results(layer, arguments)
    results = recorded_results(layer, arguments)
    layer._calls = calls  # the counter that selects the dropout masks
    return {**results, **unrecorded}


def unrecorded_results(layer: Module, arguments: CallArguments) -> Results:
    """The results of a call in eval mode, by name."""
    x, hx, _ = _on_backend(layer, arguments)
    results = flat(layer.eval()(x, hx, **arguments.options))
    names = [f"{name} (eval)" for name in _result_names(layer)]
    return {name: np.array(to_numpy(a)) for name, a in zip(names, results, strict=True)}


def recorded_results(layer: Module, arguments: CallArguments) -> Results:
    """The results and gradients of a call in train mode, by name; weights by gate."""
    cell, names = layer._spec.cell, layer._spec.cell.state_names
    x, hx, upstream = _on_backend(layer, arguments)
    results = flat(layer.train()(x, hx, **arguments.options))
    layer.zero_grad()
    dfinal = packed(upstream[-len(names) :])
    if isinstance(layer, _Layer):
        gradients = flat(layer.backward(upstream[0], dfinal))
        starts = [f"d{name}0" for name in names]
    else:
        gradients = flat(layer.backward(dfinal))
        starts = [f"d{name}" for name in names]
    named = dict(zip(_result_names(layer), results, strict=True))
    named |= dict(zip(["dx", *starts], gradients, strict=True))
    H = layer._spec.hidden_size
    for name, gradient in layer.grads.items():
        if not name.startswith(("weight_", "bias_")):
            named[f"d{name}"] = gradient  # of a definition
            continue
        gates = cell.recurrent_blocks if name.startswith("weight_hh") else cell.gate_names
        if len(gates) * H != len(gradient):  # the biases of some gates
            gates = tuple(map(str, range(len(gradient) // H)))
        for k, gate in enumerate(gates):
            named[f"d{name}[{gate}]" if gate else f"d{name}"] = gradient[k * H : (k + 1) * H]
    return {name: np.array(to_numpy(array)) for name, array in named.items()}


def _on_backend(layer: Module, arguments: CallArguments) -> tuple[Any, Any, list[Any]]:
    """x, the states and the upstream gradients as the layer's arrays."""

    def moved(arrays: Iterable[np.ndarray]) -> list[Any]:
        return [asarray(a, backend=layer.backend.name, dtype=layer.dtype) for a in arrays]

    return moved([arguments.x])[0], packed(moved(arguments.states)), moved(arguments.upstream)


def _result_names(layer: Module) -> list[str]:
    names = layer._spec.cell.state_names
    if isinstance(layer, _Layer):
        return ["output", *(f"{name}_n" for name in names)]
    return [f"{name}_next" for name in names]


def flat(values: Any) -> list[Any]:
    """The arrays in nested tuples, in order."""
    if isinstance(values, tuple):
        return [array for value in values for array in flat(value)]
    return [values]


def packed(states: list[Any]) -> Any:
    """States in the form of a call's argument: a single array, or a pair."""
    return tuple(states) if len(states) > 1 else states[0]
