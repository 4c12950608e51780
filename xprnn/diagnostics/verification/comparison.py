"""Compare every implementation available on this machine with the float64 equations."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from ... import kernels
from ...backend import Lengths, asarray
from ...backend.exports import exported_from
from ...backend.floating_point import environment
from ...core.checks import check_seed, check_shape
from ...nn.cells import _CellModule
from ...nn.layers import _Layer
from ..gradient_check import _Function
from .equations import CallArguments, Equations, Module, packed
from .report import GRADCHECK, Absent, Row, VerifyReport


@exported_from("xprnn")
def verify(
    layer: Module, shape: tuple[int, ...], *, lengths: Lengths | None = None, seed: int = 0
) -> VerifyReport:
    """Compare every implementation that supports a layer or cell with the float64 equations.

    Each one, the plain code first, is forced by `use_kernels`, and it is an error if another one
    runs. It makes a call without and with recording, then a backward pass. All results and
    gradients are compared with those of the plain code in float64 on NumPy, for the same values:
    the layer's own parameters, and x, states and upstream gradients drawn from `seed`, all rounded
    to the layer's compute dtype. The limits are those of `xprnn.diagnostics.tolerances`, increased
    where the equations themselves amplify a change of their inputs. Then a `gradcheck` follows. The
    report lists what is not compared: the gradients of relu where rounding decides on which side of
    its kink a value lies; the steps from the first one in which a value may exceed the range of the
    compute dtype, as with relu; and implementations that are not available.

    The plain code in float64 on NumPy is the equations themselves and has only the gradcheck.
    All computations use copies, and other threads keep the kernels that they request.

    :param layer: an RNN, GRU, LSTM, Recurrent or one of their cells, on any backend.
    :param shape: x's shape, as for a call.
    :param lengths: as for a call of a layer; None for a cell.
    :param seed: of the random values.
    :return: a report whose `str` is a table; `ok` is True if every check passed.
    :raises TypeError, ValueError: `layer` is none of these, an argument is invalid, or a call of
        this shape amplifies rounding so much that a comparison is meaningless.

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
        raise TypeError(f"lengths: expected None, a {type(layer).__name__} runs one step")
    if layer._spec.cell.extra_inputs:
        raise TypeError("layer: a cell with inputs beside x is not verified; see gradcheck")
    shape = check_shape(shape, layer._spec.input_size)
    layer._steps_and_batch(shape)
    seed = check_seed(seed)
    with environment():
        rows, absent = check(layer, shape, lengths, seed)
    title = f"{type(layer).__name__} on {layer.backend.name}, {layer.arithmetic}, x {shape}"
    return VerifyReport(title, tuple(rows), tuple(absent))


def check(
    layer: Module, shape: tuple[int, ...], lengths: Any, seed: int, differences: bool = True
) -> tuple[list[Row], list[Absent]]:
    """The rows of every implementation that supports `layer`, and the checks not made.

    With `differences`, each implementation has a gradcheck.
    """
    tested, cell = copy.copy(layer), layer._spec.cell.name
    with kernels.use_kernels("reference"):
        equations = Equations(tested, shape, lengths, seed)
    rows: list[Row] = []
    absent: list[Absent] = []
    if equations.kinked:
        reason = "rounding decides on which side of relu's kink a value lies"
        absent.append(Absent(f"{equations.operand_type} gradients", cell, reason))
    all_steps, batch = tested._steps_and_batch(shape)
    if (steps := equations.steps) < all_steps:
        omitted = f"{equations.operand_type}, steps {steps} to {all_steps - 1}"
        reason = f"sums may exceed {equations.largest:.2g} there"
        absent.append(Absent(omitted, cell, reason))
    spec, backend = layer._spec, layer.backend
    why_not = kernels.experimental(spec.cell, backend, layer.arithmetic)
    for implementation in kernels.IMPLEMENTATIONS:
        if implementation == "sequence" and why_not:
            absent.append(Absent(implementation, cell, str(why_not)))
            continue
        with kernels.use_kernels(implementation):
            try:
                selected = tested._plan(steps, batch).implementation
                if selected != implementation:
                    what, check = f"{selected} ran instead", equations.operand_type
                    rows.append(Row(cell, implementation, check, math.inf, what, 1.0))
                    continue
                if equations.are_those_of(layer, implementation):
                    absent.append(Absent("float64", cell, "the plain code is the equations"))
                else:
                    rows.append(equations.compare(tested, implementation))
                if differences:
                    rows.append(_gradcheck(tested, equations.arguments, implementation, seed))
            except kernels.KernelUnavailableError as error:
                absent.append(Absent(implementation, cell, str(error).partition(": ")[2]))
    return rows, absent


def _gradcheck(layer: Module, arguments: CallArguments, implementation: str, seed: int) -> Row:
    """The row of a gradcheck of `layer`, for the same values, with the largest excess."""
    rng = np.random.default_rng(seed)

    def on_backend(array: np.ndarray) -> Any:
        return asarray(array, backend=layer.backend.name)

    with layer.backend.activate():
        hx = packed([on_backend(state) for state in arguments.states])
        x, lengths = on_backend(arguments.x), arguments.options.get("lengths")
        function = _Function(layer, x, hx, lengths, rng)
        worst = max((function.compare(name, rng) for name in function.at), key=lambda r: r.excess)
    return Row(layer._spec.cell.name, implementation, GRADCHECK, worst.excess, worst.name, 1.0)
