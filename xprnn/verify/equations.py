"""One layer or cell beside the float64 equations on the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import asarray, to_numpy
from ..cell_modules import _CellModule
from ..layer import _Layer
from ..tolerances import EPSILON, LARGEST, error_of, tolerance
from .report import Row, worst_of

Module = _Layer | _CellModule
Results = dict[str, np.ndarray]
Change = Callable[[np.ndarray], np.ndarray]

NUDGE = 2.0**-40  # a relative change of the numbers that float64 results show, and no kink meets
CALM = 4.0  # times as much as its numbers may a result change where `tolerance` holds as it is
MOST = 0.5  # a limit above this would pass what has nothing to do with the equations
SQUARE = 2.0**511  # float64 holds sums of squares of numbers up to this, as the gradcheck needs
REACH, TRIES = 2, 5  # a change by so many ε, in so many directions, meets every kink that matters


@dataclass(frozen=True)
class Given:
    """The arguments of a call and of its inverse, on the host in float64."""

    x: np.ndarray
    states: list[np.ndarray]
    upstream: list[np.ndarray]  # one for each result
    options: dict[str, Any]  # a layer's lengths

    def changed(self, change: Change) -> Given:
        """All numbers changed."""
        states, upstream = ([change(a) for a in arrays] for arrays in (self.states, self.upstream))
        return Given(change(self.x), states, upstream, self.options)

    def first(self, steps: int, axis: int) -> Given:
        """The same but for a layer's steps, along this axis, after the first ones."""
        at = (slice(None),) * axis + (slice(steps),)
        output, *ends = self.upstream
        lengths = self.options["lengths"]
        cut = None if lengths is None else np.minimum(lengths, steps)
        return Given(self.x[at], self.states, [output[at], *ends], {"lengths": cut})


class Equations:
    """What the float64 equations on NumPy say of one call of a layer and of its inverse.

    The numbers are such as the layer's products read: its parameters rounded to its compute
    dtype, and normal ones drawn from `seed`, rounded likewise, for all else. `limits` are those
    of `tolerance`, times how much more than CALM the equations magnify a small change of their
    numbers. Where a kink of relu is so near that rounding decides on which side of it a number
    falls, the gradients are left out: they jump there. Where the numbers outgrow the type, the call
    ends before the first step in which a sum may overflow, and `steps` says how many are left: what
    comes later hangs on the order of sums.

    :raises ValueError: `shape` is not as it should be, no step is left, or the limits would say
        nothing.
    """

    def __init__(self, layer: Module, shape: tuple[int, ...], lengths: Any, seed: int) -> None:
        types = layer.arithmetic
        self.numbers: str = "tf32" if types.precision == "tf32" else str(types.compute_dtype.name)
        self._narrow = types.compute_dtype
        self.largest: float = min(LARGEST[self.numbers], SQUARE)
        self._layer = copy.copy(layer).to(
            "numpy", dtype="float64", compute_dtype="float64", precision="ieee"
        )
        options = {"lengths": lengths} if isinstance(layer, _Layer) else {}
        self.parameters: dict[str, np.ndarray] = {
            n: self._rounded(p) for n, p in self._layer.parameters.items()
        }
        with np.errstate(over="ignore", invalid="ignore"):
            self.given: Given = self._draw(shape, options, np.random.default_rng(seed))
            self.expected: dict[str, np.ndarray] = self._before_overflow()
        self.steps: int
        self.steps, batch = layer._steps_and_batch(self.given.x.shape)
        slopes = self._slopes(NUDGE, 0)
        self.kinked: bool = layer._stack.cell.name == "rnn_relu" and self._is_kinked()
        if self.kinked:
            self.expected = {n: a for n, a in self.expected.items() if not n.startswith("d")}
        self.limits: dict[str, float] = self._limits(slopes, self.steps, batch)

    def compare(self, layer: Module, implementation: str) -> Row:
        """The array in which a copy of the layer does worst; it takes these parameters."""
        layer.load_state_dict(self.parameters)
        unit, cell = EPSILON[self.numbers], layer._stack.cell.name
        found = results_of(layer, self.given)
        rows = [
            Row(
                cell,
                implementation,
                self.numbers,
                error_of(found[name], expected) / unit,
                name,
                self.limits[name] / unit,
            )
            for name, expected in self.expected.items()
        ]
        return worst_of(rows)[0]

    @staticmethod
    def are_those_of(layer: Module, implementation: str) -> bool:
        """Whether a layer served so computes them itself, so that a comparison says nothing."""
        wide = layer.arithmetic.compute_dtype == np.float64
        return implementation == "reference" and layer.backend.name == "numpy" and wide

    def _rounded(self, numbers: Any) -> np.ndarray:
        return numbers.astype(self._narrow).astype(np.float64)

    def _draw(
        self, shape: tuple[int, ...], options: dict[str, Any], rng: np.random.Generator
    ) -> Given:
        def normal(shape: tuple[int, ...]) -> np.ndarray:
            return self._rounded(rng.standard_normal(shape))

        x = normal(shape)
        results = flat(self._layer.eval()(x, **options))
        states = results[-len(self._layer._stack.cell.state_names) :]
        return Given(
            x, [normal(a.shape) for a in states], [normal(a.shape) for a in results], options
        )

    def _before_overflow(self) -> Results:
        """The results of as many steps as stay within the type; `given` is cut to them."""
        whole, layer = self.given, self._layer
        expected = self._at(lambda numbers: numbers)
        if self._stays_finite(expected):
            return expected
        axis = int(whole.x.ndim == 3 and layer.options.get("batch_first", False))
        fits, beyond = 0, layer._steps_and_batch(whole.x.shape)[0]
        while isinstance(layer, _Layer) and beyond - fits > 1:
            middle = (fits + beyond) // 2
            self.given = whole.first(middle, axis)
            if self._stays_finite(self._at(lambda numbers: numbers)):
                fits = middle
            else:
                beyond = middle
        self.given = whole.first(max(fits, 1), axis) if isinstance(layer, _Layer) else whole
        expected = self._at(lambda numbers: numbers)
        if not fits and not self._is_within(expected):
            name = layer._stack.cell.name
            for result, array in expected.items():
                if not np.isfinite(array).all():
                    raise ValueError(f"layer: {name}'s float64 {result} is not finite")
            raise ValueError(
                f"layer: {name} may outgrow {self.numbers} in its first step, expected numbers "
                f"whose sums stay below {self.largest:.2g}"
            )
        return expected

    def _is_within(self, results: Results) -> bool:
        """Whether the sums of a call of one step cannot overflow, for its inputs and results."""
        inputs = [self.given.x, *self.given.states, *self.given.upstream]
        sums = [self._growth() * np.abs(array).max(initial=0.0) for array in inputs]
        sums += [np.abs(array).max(initial=0.0) for array in results.values()]
        return all(each <= self.largest for each in sums)  # which NaN is not

    def _growth(self) -> float:
        """How many times the largest element a sum of the products of input and state can be."""
        sums = [
            abs(p).sum(axis) for p in self.parameters.values() if p.ndim == 2 for axis in (0, 1)
        ]
        return max(1.0, *[2 * float(each.max()) for each in sums])

    def _stays_finite(self, results: Results) -> bool:
        """Whether no sum of a step of this call can overflow, in whatever order it is added up."""
        growth = self._growth()
        for name, array in results.items():
            # weights' gradients are added up in float32 at least
            wide = self._narrow.itemsize < 4 and name.startswith(("dweight", "dbias"))
            largest = LARGEST["float32"] if wide else self.largest
            if not growth * float(np.abs(array).max(initial=0.0)) <= largest:
                return False
        return True

    def _at(self, change: Change) -> Results:
        """The results at the numbers that `change` makes of the given ones."""
        self._layer.eval().parameters.update({n: change(p) for n, p in self.parameters.items()})
        return results_of(self._layer, self.given.changed(change))

    def _slopes(self, size: float, direction: int) -> dict[str, float]:
        """How many times as much as all numbers each result changes, relatively."""
        rng = np.random.default_rng(direction)
        nudged = self._at(lambda a: a * (1 + size * rng.choice((-1, 1), a.shape)))
        return {name: error_of(nudged[name], a) / size for name, a in self.expected.items()}

    def _is_kinked(self) -> bool:
        """Whether a gradient jumps within reach of rounding."""
        reach = max(REACH * EPSILON[self.numbers], NUDGE)
        for direction in range(TRIES):
            near, far = self._slopes(NUDGE, direction), self._slopes(reach, direction)
            if any(far[name] > 1.5 * near[name] + NUDGE for name in far if name.startswith("d")):
                return True
        return False

    def _limits(self, slopes: dict[str, float], steps: int, batch: int) -> dict[str, float]:
        net = self._layer._stack
        between = net.num_directions * net.hidden_size if net.num_layers > 1 else 0
        width = max(max(net.input_size, between) + net.hidden_size, batch)
        calm = tolerance(self.numbers, steps=max(steps, 1), width=width, layers=net.num_layers)
        limits = {name: calm * max(1.0, slopes[name] / CALM) for name in self.expected}
        worst = max(limits, key=lambda name: limits[name])
        if limits[worst] > MOST:
            raise ValueError(
                f"shape: rounding to {self.numbers} alone may change {worst} by "
                f"{limits[worst]:.0%} of its largest element, which would hide every fault; "
                "expected a smaller one, or wider numbers"
            )
        return limits


def results_of(layer: Module, given: Given) -> Results:
    """Every result and every gradient by name, on the host; the gradients of weights by gate.

    The call is made twice, unrecorded and recorded, and always with the same dropout masks; the
    layer is left in train mode.
    """

    def place(arrays: Iterable[np.ndarray]) -> list[Any]:
        return [asarray(a, backend=layer.backend.name, dtype=layer.dtype) for a in arrays]

    cell, names = layer._stack.cell, layer._stack.cell.state_names
    (x,), states, upstream = place([given.x]), place(given.states), place(given.upstream)
    calls = layer._calls
    unrecorded = flat(layer.eval()(x, packed(states), **given.options))
    results = flat(layer.train()(x, packed(states), **given.options))
    layer._calls = calls  # the clock of the dropout masks
    layer.zero_grad()
    dfinal = packed(upstream[-len(names) :])
    if isinstance(layer, _Layer):
        gradients = flat(layer.backward(upstream[0], dfinal))
        ends, starts = ["output", *(f"{name}_n" for name in names)], [f"d{name}0" for name in names]
    else:
        gradients = flat(layer.backward(dfinal))
        ends, starts = [f"{name}_next" for name in names], [f"d{name}" for name in names]
    found = dict(zip(ends, results, strict=True))
    found |= {f"{name} (eval)": a for name, a in zip(ends, unrecorded, strict=True)}
    found |= dict(zip(["dx", *starts], gradients, strict=True))
    for name, gradient in layer.grads.items():
        for k, gate in enumerate(cell.gate_names):
            rows = slice(k * layer._stack.hidden_size, (k + 1) * layer._stack.hidden_size)
            found[f"d{name}[{gate}]" if gate else f"d{name}"] = gradient[rows]
    return {name: np.array(to_numpy(array)) for name, array in found.items()}


def flat(values: Any) -> list[Any]:
    """The arrays in nested tuples, in order."""
    if isinstance(values, tuple):
        return [array for value in values for array in flat(value)]
    return [values]


def packed(states: list[Any]) -> Any:
    """States as a call takes them: one as it is, two as a pair."""
    return tuple(states) if len(states) > 1 else states[0]
