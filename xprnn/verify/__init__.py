"""Every implementation that serves on this machine against the float64 equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from .. import kernels
from ..backend import asarray
from ..cell_modules import _CellModule
from ..checks import check_seed, check_shape
from ..floating_point import environment
from ..gradcheck import _Function
from ..layer import _Layer
from .equations import Equations, Given, Module, packed
from .report import GRADCHECK, Absent, Row, VerifyReport


def verify(
    layer: Module, shape: tuple[int, ...], *, lengths: Any = None, seed: int = 0
) -> VerifyReport:
    """Compare every implementation that can serve a layer or cell with the float64 equations.

    Each one, the plain code first, is forced by `xprnn.use_kernels` and has to be the one that
    serves; it makes a call, unrecorded and recorded, and undoes it. All results and gradients
    are compared with those of the plain code in float64 on NumPy, on the same numbers: the
    layer's own parameters, and x, states and upstream gradients drawn from `seed`, all rounded
    to the layer's compute dtype. The limits are those of `xprnn/tolerances.py`, raised where the
    equations themselves magnify a change of their numbers. Then a `gradcheck`. The report says
    what is not compared: the gradients of relu where rounding decides on which side of its kink
    a number falls; the steps from which on numbers outgrow the compute dtype, as those of relu may,
    with the call cut short before them; and what has no implementation here.

    The plain code in float64 on NumPy is the equations themselves and has only the gradcheck.
    Everything happens on copies, and other threads keep the kernels that they request.

    :param layer: an RNN, GRU, LSTM, RNNCell, GRUCell or LSTMCell, on any backend.
    :param shape: x's shape, as for a call.
    :param lengths: as for a call of a layer; a cell has none.
    :param seed: of the numbers.
    :return: a report whose `str` is a table; `ok` says whether every check passed.
    :raises TypeError, ValueError: `layer` is none of these, an argument is not as it should be,
        or a call of this shape magnifies rounding so much that nothing can be told.

    >>> import xprnn
    >>> report = xprnn.verify(xprnn.GRU(3, 4, seed=0), (5, 2, 3), lengths=[5, 3])
    >>> [(row.implementation, row.check, row.ok) for row in report.rows][:2]
    [('reference', 'float32', True), ('reference', 'gradcheck', True)]
    """
    if not isinstance(layer, (_Layer, _CellModule)):
        raise TypeError(
            f"layer: expected an RNN, GRU, LSTM or one of their cells, got {type(layer).__name__}"
        )
    if isinstance(layer, _CellModule) and lengths is not None:
        raise TypeError(f"lengths: expected None, a {type(layer).__name__} takes one step")
    shape = check_shape(shape, layer._stack.input_size)
    layer._steps_and_batch(shape)
    seed = check_seed(seed)
    with environment():
        rows, absent = check(layer, shape, lengths, seed)
    title = f"{type(layer).__name__} on {layer.backend.name}, {layer.arithmetic}, x {shape}"
    return VerifyReport(title, tuple(rows), tuple(absent))


def check(
    layer: Module, shape: tuple[int, ...], lengths: Any, seed: int, differences: bool = True
) -> tuple[list[Row], list[Absent]]:
    """The rows of every implementation that serves `layer`, and those that do not.

    With `differences` they have a gradcheck each.
    """
    subject, cell = copy.copy(layer), layer._stack.cell.name
    with kernels.use_kernels("reference"):
        equations = Equations(subject, shape, lengths, seed)
    rows: list[Row] = []
    absent: list[Absent] = []
    if equations.kinked:
        why = "rounding decides on which side of its kink relu falls"
        absent.append(Absent(f"{equations.numbers} gradients", cell, why))
    whole, batch = subject._steps_and_batch(shape)
    if (steps := equations.steps) < whole:
        which = f"{equations.numbers}, steps {steps} to {whole - 1}"
        why = f"sums may exceed {equations.largest:.2g} there"
        absent.append(Absent(which, cell, why))
    net = layer._stack.cell, layer.backend
    untried = kernels.has_sequences(*net) and kernels.untried(layer.backend)
    for implementation in kernels.IMPLEMENTATIONS:
        if implementation == "sequence" and untried:
            absent.append(Absent(implementation, cell, kernels.UNTRIED))
            continue
        with kernels.use_kernels(implementation):
            try:
                serving = subject._plan(steps, batch).implementation
                if serving != implementation:
                    what = f"{serving} served instead"
                    rows.append(Row(cell, implementation, equations.numbers, math.inf, what, 1.0))
                    continue
                if equations.are_those_of(layer, implementation):
                    absent.append(Absent("float64", cell, "the plain code is the equations"))
                else:
                    rows.append(equations.compare(subject, implementation))
                if differences:
                    rows.append(_gradcheck(subject, equations.given, implementation, seed))
            except kernels.KernelUnavailableError as error:
                absent.append(Absent(implementation, cell, str(error).partition(": ")[2]))
    return rows, absent


def _gradcheck(layer: Module, given: Given, implementation: str, seed: int) -> Row:
    """Where a gradcheck of `layer`, on the same numbers, comes nearest to its tolerance."""
    rng = np.random.default_rng(seed)

    def place(array: np.ndarray) -> Any:
        return asarray(array, backend=layer.backend.name)

    with layer.backend.activate():
        hx = packed([place(state) for state in given.states])
        function = _Function(layer, place(given.x), hx, given.options.get("lengths"), rng)
        worst = max((function.compare(name, rng) for name in function.at), key=lambda r: r.excess)
    return Row(layer._stack.cell.name, implementation, GRADCHECK, worst.excess, worst.name, 1.0)
