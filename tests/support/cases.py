"""Configurations of a layer, the numbers each is run on, and running them."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import xprnn
from xprnn.backend import Backend
from xprnn.core.precision import check_precision_policy

LAYERS = {
    "rnn_tanh": (xprnn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (xprnn.RNN, {"nonlinearity": "relu"}),
    "gru": (xprnn.GRU, {}),
    "gru_reset_before": (xprnn.GRU, {"reset_after": False}),
    "lstm": (xprnn.LSTM, {}),
}
CELLS = {
    "rnn_tanh": (xprnn.RNNCell, {"nonlinearity": "tanh"}),
    "rnn_relu": (xprnn.RNNCell, {"nonlinearity": "relu"}),
    "gru": (xprnn.GRUCell, {}),
    "gru_reset_before": (xprnn.GRUCell, {"reset_after": False}),
    "lstm": (xprnn.LSTMCell, {}),
}
TORCH_CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # torch has no other
LENGTHS = {
    "full": None,
    "ragged": ((2, 6, 1, 4), (3, 1, 5, 3)),  # in no order; with and without a row of all T
    "zero": ((0, 5, 0, 3), (4, 0, 6, 1)),
}

Results = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One configuration: a layer's options, and how it is called."""

    cell: str
    layers: int = 1
    directions: int = 1
    batch_first: bool = False
    bias: bool = True
    dtype: str = "float64"
    lengths: str = "full"
    states: bool = True  # whether the initial states are given
    dropout: float = 0.0
    T: int = 6
    N: int = 4
    I: int = 3  # noqa: E741
    H: int = 5
    compute_dtype: str | None = field(default=None, repr=False)  # seeds are those without it

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("h", "c") if self.cell == "lstm" else ("h",)

    @property
    def seed(self) -> int:
        return zlib.crc32(repr(self).encode())

    def __str__(self) -> str:
        flags = {"batch_first": self.batch_first, "nobias": not self.bias, "h0": self.states}
        dtype = self.compute_dtype or self.dtype
        words = [self.cell, f"{self.layers}x{self.directions}", dtype, self.lengths]
        if self.dropout:
            words.append(f"dropout{self.dropout}")
        return "-".join([*words, *(name for name, on in flags.items() if on)])


def product(**choices: Any) -> Iterator[Case]:
    """Every combination of these options."""
    for values in itertools.product(*choices.values()):
        yield Case(**dict(zip(choices, values, strict=True)))


@dataclass(frozen=True)
class Problem:
    """The arrays of one call and of its inverse, on the host; states are tuples."""

    x: np.ndarray
    initial: tuple[np.ndarray, ...]  # used only if the case gives states
    lengths: tuple[int, ...] | None
    doutput: np.ndarray | None
    dfinal: tuple[np.ndarray | None, ...]


def draw(case: Case) -> Problem:
    """Normal numbers everywhere: states non-zero and distinct, a gradient on every output.

    What a narrow compute dtype would round at once is rounded already: x and the states.
    """
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(case.dtype)

    outer = (case.N, case.T) if case.batch_first else (case.T, case.N)
    state = (case.layers * case.directions, case.N, case.H)
    orders = LENGTHS[case.lengths]
    return Problem(
        x=narrowed(normal(*outer, case.I), case),
        initial=tuple(narrowed(normal(*state), case) for _ in case.state_names),
        lengths=None if orders is None else orders[case.seed % 2],
        doutput=normal(*outer, case.directions * case.H),
        dfinal=tuple(normal(*state) for _ in case.state_names),
    )


def narrowed(array: np.ndarray, case: Case) -> np.ndarray:
    """The numbers as the compute dtype of a case holds them, in their own dtype."""
    narrow = check_precision_policy(case.dtype, case.compute_dtype, "ieee").compute_dtype
    return array.astype(narrow).astype(case.dtype)


def build(case: Case, backend: str = "numpy") -> Any:
    """The layer of a case in train mode, with the parameters that its seed draws.

    Those that a narrow compute dtype would round are rounded already. With such a type a relu has
    biases far from zero, on either side, and small weights: near the kink rounding would decide.
    """
    kind, options = LAYERS[case.cell]
    layer = kind(
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        dropout=case.dropout,
        bidirectional=case.directions == 2,
        **options,
        backend=backend,
        dtype=case.dtype,
        compute_dtype=case.compute_dtype,
        seed=case.seed,
    )
    if case.compute_dtype:
        values = {n: narrowed(xprnn.to_numpy(p), case) for n, p in layer.parameters.items()}
        if case.cell == "rnn_relu":
            values = {n: _apart(v) if n.startswith("bias_ih") else v / 8 for n, v in values.items()}
        layer.load_state_dict(values)
    return layer.train()


def _apart(bias: np.ndarray) -> np.ndarray:
    return np.where(np.arange(bias.size) % 3 == 0, -9.0, 9.0).astype(bias.dtype)


def numpy_run(case: Case, layer: Any, problem: Problem) -> Results:
    """The same as `run` through the plain code on NumPy in float64, on the same numbers."""
    wide = replace(case, dtype="float64", compute_dtype=None)
    other = type(layer)(**layer.options, dtype="float64", backend="numpy").train()
    other.load_state_dict(layer.state_dict())
    other._calls = layer._calls  # the clock of the dropout masks
    with xprnn.use_kernels("reference"):
        return run(other, wide, widened(problem))


def widened(problem: Problem) -> Problem:
    """The same numbers in float64."""
    return Problem(
        x=problem.x.astype(np.float64),
        initial=tuple(state.astype(np.float64) for state in problem.initial),
        lengths=problem.lengths,
        doutput=problem.doutput.astype(np.float64),
        dfinal=tuple(d.astype(np.float64) for d in problem.dfinal),
    )


def run(layer: Any, case: Case, problem: Problem) -> Results:
    """Forward and backward through a layer: every result and every gradient, on the host."""

    hx = move(layer.backend, *problem.initial) if case.states else None
    output, final = layer(move(layer.backend, problem.x), hx, lengths=problem.lengths)
    doutput, dfinal = move(layer.backend, problem.doutput), move(layer.backend, *problem.dfinal)
    dx, dinitial = layer.backward(doutput, dfinal)
    found = {"output": output, "dx": dx, **by_name(case, final, dinitial)}
    found |= {f"d{name}": gradient for name, gradient in layer.grads.items()}
    return {name: xprnn.to_numpy(array) for name, array in found.items()}


def move(backend: Backend, *arrays: np.ndarray | None) -> Any:
    """Arrays on a backend: one as it is, several as a tuple; None stays None."""
    moved = tuple(None if array is None else backend.from_host(array) for array in arrays)
    return moved if len(moved) > 1 else moved[0]


def by_name(case: Case, final: Any, dinitial: Any) -> dict[str, Any]:
    """Final states and gradients of initial ones as h_n, c_n, dh0, dc0."""
    ends, starts = (given if isinstance(given, tuple) else (given,) for given in (final, dinitial))
    found = {f"{name}_n": end for name, end in zip(case.state_names, ends, strict=True)}
    return found | {f"d{name}0": d for name, d in zip(case.state_names, starts, strict=False)}


def run_functional(case: Case, layer: Any, problem: Problem) -> Results:
    """The same through `xprnn.functional`, with the weights of a layer of one direction."""
    backend, kind = layer.backend, case.cell.partition("_")[0]
    call = getattr(xprnn.functional, f"{kind}_forward")
    undo = getattr(xprnn.functional, f"{kind}_backward")
    hx = move(backend, *problem.initial) if case.states else None
    output, final, cache = call(
        move(backend, problem.x),
        hx,
        *layer.parameters.values(),
        batch_first=case.batch_first,
        lengths=problem.lengths,
        **LAYERS[case.cell][1],
    )
    doutput, dfinal = move(backend, problem.doutput), move(backend, *problem.dfinal)
    found = {"output": output, **by_name(case, final, ())}
    for name, gradient in undo(doutput, dfinal, cache).items():
        found[name if f"{name[1:]}_l0" not in layer.parameters else f"{name}_l0"] = gradient
    return {name: xprnn.to_numpy(array) for name, array in found.items()}


def unroll(
    cell: Any, x: np.ndarray, initial: tuple[np.ndarray, ...] | None, upstream: Any
) -> Results:
    """Call a cell once a step and undo the calls: h, c (T, N, H), dx, dh0, dc0 and the rest.

    `x` is (T, N, I); `upstream` has an array (T, N, H) per state, dL/dh_t apart from later steps.
    """
    names, place = ("h", "c")[: len(upstream)], cell.backend
    hx = None if initial is None else move(place, *initial)
    states, dx = [], []
    for x_t in x:
        hx = cell(move(place, x_t), hx)
        states.append(hx if isinstance(hx, tuple) else (hx,))
    dstates: tuple[Any, ...] = ()
    for share in zip(*(d[::-1] for d in upstream), strict=True):
        total = tuple(move(place, d) for d in share)
        if dstates:
            total = tuple(d + later for d, later in zip(total, dstates, strict=True))
        dx_t, dstates = cell.backward(total if len(total) > 1 else total[0])
        dstates = dstates if isinstance(dstates, tuple) else (dstates,)
        dx.append(dx_t)
    to_numpy = xprnn.to_numpy
    found = {name: np.stack([to_numpy(s[k]) for s in states]) for k, name in enumerate(names)}
    found |= {f"d{name}0": to_numpy(dstates[k]) for k, name in enumerate(names)}
    found |= {f"d{name}": to_numpy(gradient) for name, gradient in cell.grads.items()}
    return found | {"dx": np.stack([to_numpy(d) for d in dx[::-1]])}


def parameters_of(layer: Any) -> Results:
    """A layer's parameters, widened to float64, on the host."""
    return {n: xprnn.to_numpy(p).astype(np.float64) for n, p in layer.parameters.items()}
