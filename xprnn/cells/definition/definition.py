"""`xprnn.cell`: makes a definition of a function, and refuses what is not one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, update_wrapper
from typing import Any, NoReturn

from ...backend.exports import exported_from
from .defined_cell import DefinedCell
from .derived_step import DerivedStep
from .tracing import (
    DIGEST_VERSION,
    RESERVED,
    Functions,
    Location,
    Signature,
    StepFunction,
    TracedCell,
    _is_name,
    _is_size,
    trace,
)

# Arguments of a layer or a call, which sizes, options and inputs must not be named as
ARGUMENTS = (
    "cell",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "backend",
    "dtype",
    "precision",
    "compute_dtype",
    "recompute",
    "seed",
    "x",
    "hx",
    "lengths",
    "self",
)


class Definition:
    """A cell that is defined by its equations: what `xprnn.cell` makes of a function.

    Its gradient is derived, and `xprnn.Recurrent` and `xprnn.RecurrentCell` run it. It is pickled
    and copied like a function: by its name, which must lead to it.
    """

    __qualname__: str

    def __init__(self, step: StepFunction, signature: Signature) -> None:
        update_wrapper(self, step)
        self._step = step
        self.name: str = step.__name__
        self.signature: Signature = signature
        _check(signature, Location(step))
        self._bound = lru_cache(64)(self._bind)
        self._traces: dict[tuple[tuple[str, Any], ...], TracedCell] = {}
        self.trace({})

    def trace(self, options: Mapping[str, Any]) -> TracedCell:
        """The graph for some values of options; the others have their defaults."""
        if unknown := [name for name in options if name not in self.signature.options]:
            raise TypeError(f"{self.name}: there is no option {unknown[0]!r}")
        values = {**self.signature.options, **options}
        key = tuple(values.items())
        if key not in self._traces:
            self._traces[key] = trace(self._step, self.signature, values)
        return self._traces[key]

    def cell(
        self, hidden_size: int, sizes: Mapping[str, int], options: Mapping[str, Any], bias: bool
    ) -> DefinedCell:
        """The cell for these sizes and values of options."""
        return self._bound(hidden_size, tuple(sizes.items()), tuple(options.items()), bias)

    def derive(
        self, hidden_size: int, sizes: Mapping[str, int], options: Mapping[str, Any], bias: bool
    ) -> DerivedStep:
        """Its forward and backward step."""
        return self.cell(hidden_size, sizes, options, bias).derived

    def _bind(
        self,
        hidden_size: int,
        sizes: tuple[tuple[str, int], ...],
        options: tuple[tuple[str, Any], ...],
        bias: bool,
    ) -> DefinedCell:
        traced = self.trace(dict(options))
        derived = DerivedStep(traced, {"H": hidden_size, **dict(sizes)}, bias)
        return DefinedCell(f"{self.name} {traced.digest[:8]}", derived)

    def digest(self, options: Mapping[str, Any] | None = None) -> str:
        """The version and a hash of the equations, which files contain."""
        return f"{DIGEST_VERSION}:{self.trace(options or {}).digest}"

    def __reduce__(self) -> str:
        """The name by which its module knows it."""
        return self.__qualname__

    def __repr__(self) -> str:
        """The name, as in the call of a layer's constructor."""
        return self.name

    def __call__(self, *arguments: Any) -> NoReturn:
        """Refused."""
        raise TypeError(
            f"{self.name} is the definition of a cell; xprnn.Recurrent({self.name}, input_size, "
            "hidden_size) makes a layer of it"
        )


@exported_from("xprnn")
def cell(
    *,
    gates: Iterable[str],
    states: Iterable[str] | Mapping[str, float] = ("h",),
    sizes: Mapping[str, int | str] | None = None,
    vectors: Iterable[str] = (),
    inputs: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Callable[[StepFunction], Definition]:
    """Define a cell by the equations of one step; its gradient is derived.

    The function gets `f`, `x` and `s`: the functions, products, vectors and options below; the
    pre-activations x W_ih' + b_ih by gate, and the inputs of a step; and the states. It returns the
    next states, one or a tuple, in order; the first one is the output. It is called once, when it
    is decorated, with values that are no numbers: it cannot branch on them.

    ============================================  ==================================================
    `f.recurrent(value, *gates, bias=True)`       blocks of W_hh, default all, times a value, plus
                                                  b_hh; by gate, and each block once
    `f.linear(name, value, size, bias=False)`     a further learned matrix times a value; `size` is
                                                  "H", a number or the name of a layer's argument
    `f.norm(values, gains, biases=None, eps)`     layer norm over all values of a row together
    `f.keep(rate, per="step")`                    0 or 1 in train mode, 1 - rate in eval mode; drawn
                                                  for each step or each "sequence"
    `f.sigmoid`, `tanh`, `relu`, `leaky_relu`,    functions of a value
    `hard_sigmoid`, `softsign`, `softplus`,
    `elu`, `exp`, `log`, `sqrt`, `abs`
    `f.minimum`, `maximum`, `clip`, `where`       selections; comparisons are for `where` alone
    ============================================  ==================================================

    :param gates: the names of the blocks of W_ih, H rows each.
    :param states: their names, or a mapping from names to initial values.
    :param sizes: the widths of states other than H: a number, or the name of a layer's argument.
    :param vectors: the names of learned vectors of H numbers, read as `f.name`.
    :param inputs: the names of numbers for each step and row, which a call passes, read as
        `x.name`.
    :param options: numbers, strings, bools or tuples of these by name, read as `f.name`: a layer's
        arguments, with their defaults.
    :raises TypeError, ValueError, AttributeError: the function is not a definition; the message
        names the line.

    >>> import numpy as np, xprnn
    >>> @xprnn.cell(gates=("z", "n"))
    ... def ligru(f, x, s):  # M. Ravanelli et al., 2018
    ...     gh = f.recurrent(s.h)
    ...     z = f.sigmoid(x.z + gh.z)
    ...     n = f.relu(x.n + gh.n)
    ...     return n + z * (s.h - n)
    >>> [node.op for node in ligru.derive(4, {}, {}, bias=True).saved]
    ['sigmoid', 'relu']
    """
    if not isinstance(states, Mapping):
        states = dict.fromkeys(states, 0.0)
    signature = Signature(
        tuple(gates),
        dict(states),
        dict(sizes or {}),
        tuple(vectors),
        tuple(inputs),
        dict(options or {}),
    )

    def define(step: StepFunction) -> Definition:
        return Definition(step, signature)

    return define


def _check(signature: Signature, where: Location) -> None:
    """Refuse names that are invalid or occur twice, and other values."""
    gates, states, sizes, vectors, inputs, options = signature
    named = {str(size) for size in sizes.values() if isinstance(size, str) and size != "H"}
    for kind, names in (("gate", gates), ("state", states), ("vector", vectors)):
        _check_names(kind, [*names], where)
    _check_names("input", [*gates, *inputs], where)
    _check_names("option", [*vectors, *options], where)
    _check_names("argument", [*named, *options], where)
    if not gates or not states:
        where.refuse("has no gates or no states")
    for name in (*vectors, *options):
        if hasattr(Functions, name):
            where.refuse(f"names a vector or option {name!r} as a function of f")
    for name in (*named, *options, *inputs):
        if name in ARGUMENTS:
            where.refuse(f"names a size, option or input {name!r} as an argument of layers")
    for name in vectors:
        if name in RESERVED:
            where.refuse(f"names a vector {name!r} as another parameter")
    for name, size in sizes.items():
        if name not in states or isinstance(size, bool) or not _is_size(size):
            where.refuse(
                f"gives {name!r} the size {size!r}, expected a state, and a number or name"
            )
    for name, value in states.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            where.refuse(f"gives state {name!r} the initial value {value!r}, expected a number")
    for name, value in options.items():
        if not _is_plain(value):
            where.refuse(
                f"gives option {name!r} {value!r}, expected a number, string, bool or tuple of them"
            )
    parameters = [p.kind for p in inspect.signature(where.step).parameters.values()]
    if len(parameters) != 3:
        where.refuse(f"takes {len(parameters)} arguments, expected three: f, x and s")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))


def _check_names(kind: str, names: list[Any], where: Location) -> None:
    for name in names:
        if not _is_name(name):
            where.refuse(f"has {kind} {name!r}, expected a name")
        if names.count(name) > 1:
            where.refuse(f"has {kind} {name!r} twice, or as another one of its names")
