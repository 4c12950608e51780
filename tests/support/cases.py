"""Configurations of layers, their input values, and functions that run them."""

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
TORCH_CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")  # those of torch
LENGTHS = {
    "full": None,
    "ragged": ((2, 6, 1, 4), (3, 1, 5, 3)),  # unsorted; with and without a row of length T
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
    states: bool = True  # whether initial states are passed
    dropout: float = 0.0
    T: int = 6
    N: int = 4
    I: int = 3  # noqa: E741
    H: int = 5
    compute_dtype: str | None = field(default=None, repr=False)  # not part of the seed

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
    """The arrays of one call and its backward, on the host; states are tuples."""

    x: np.ndarray
    initial: tuple[np.ndarray, ...]  # used only if the case has states
    lengths: tuple[int, ...] | None
    doutput: np.ndarray | None
    dfinal: tuple[np.ndarray | None, ...]


def draw(case: Case) -> Problem:
    """Normally distributed values: distinct non-zero states, a gradient of every output.

    x and the states are already rounded to the compute dtype.
    """
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(case.dtype)

    outer = (case.N, case.T) if case.batch_first else (case.T, case.N)
    state = (case.layers * case.directions, case.N, case.H)
    orders = LENGTHS[case.lengths]
    return Problem(
        x=rounded(normal(*outer, case.I), case),
        initial=tuple(rounded(normal(*state), case) for _ in case.state_names),
        lengths=None if orders is None else orders[case.seed % 2],
        doutput=normal(*outer, case.directions * case.H),
        dfinal=tuple(normal(*state) for _ in case.state_names),
    )


def rounded(array: np.ndarray, case: Case) -> np.ndarray:
    """The values rounded to the compute dtype of a case, in the dtype of the case."""
    compute_dtype = check_precision_policy(case.dtype, case.compute_dtype, "ieee").compute_dtype
    return array.astype(compute_dtype).astype(case.dtype)


def build(case: Case, backend: str = "numpy") -> Any:
    """The layer of a case in train mode, with parameters drawn from its seed.

    They are already rounded to the compute dtype. With a 16-bit one a ReLU has biases far from
    zero, of both signs, and small weights: near the kink rounding would decide.
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
        values = {n: rounded(xprnn.to_numpy(p), case) for n, p in layer.parameters.items()}
        if case.cell == "rnn_relu":
            values = {n: _apart(v) if n.startswith("bias_ih") else v / 8 for n, v in values.items()}
        layer.load_state_dict(values)
    return layer.train()


def _apart(bias: np.ndarray) -> np.ndarray:
    return np.where(np.arange(bias.size) % 3 == 0, -9.0, 9.0).astype(bias.dtype)


def numpy_run(case: Case, layer: Any, problem: Problem) -> Results:
    """As `run`, with the plain code on NumPy in float64, from the same values."""
    reference_case = replace(case, dtype="float64", compute_dtype=None)
    other = type(layer)(**layer.options, dtype="float64", backend="numpy").train()
    other.load_state_dict(layer.state_dict())
    other._calls = layer._calls  # the counter of the dropout masks
    with xprnn.use_kernels("reference"):
        return run(other, reference_case, as_float64(problem))


def as_float64(problem: Problem) -> Problem:
    """The same values in float64."""
    return Problem(
        x=problem.x.astype(np.float64),
        initial=tuple(state.astype(np.float64) for state in problem.initial),
        lengths=problem.lengths,
        doutput=problem.doutput.astype(np.float64),
        dfinal=tuple(d.astype(np.float64) for d in problem.dfinal),
    )


def run(layer: Any, case: Case, problem: Problem) -> Results:
    """All results and gradients of a layer's forward and backward, on the host."""

    hx = move(layer.backend, *problem.initial) if case.states else None
    output, final = layer(move(layer.backend, problem.x), hx, lengths=problem.lengths)
    doutput, dfinal = move(layer.backend, problem.doutput), move(layer.backend, *problem.dfinal)
    dx, dinitial = layer.backward(doutput, dfinal)
    results = {"output": output, "dx": dx, **by_name(case, final, dinitial)}
    results |= {f"d{name}": gradient for name, gradient in layer.grads.items()}
    return {name: xprnn.to_numpy(array) for name, array in results.items()}


def move(backend: Backend, *arrays: np.ndarray | None) -> Any:
    """Arrays on a backend: a single one unpacked, several as a tuple; None stays None."""
    moved = tuple(None if array is None else backend.from_host(array) for array in arrays)
    return moved if len(moved) > 1 else moved[0]


def by_name(case: Case, final: Any, dinitial: Any) -> dict[str, Any]:
    """Final states and gradients of initial states by name: h_n, c_n, dh0, dc0."""
    ends, starts = (
        states if isinstance(states, tuple) else (states,) for states in (final, dinitial)
    )
    results = {f"{name}_n": end for name, end in zip(case.state_names, ends, strict=True)}
    return results | {f"d{name}0": d for name, d in zip(case.state_names, starts, strict=False)}


def run_functional(case: Case, layer: Any, problem: Problem) -> Results:
    """As `run`, by `xprnn.functional` with the weights of a layer of one direction."""
    backend, kind = layer.backend, case.cell.partition("_")[0]
    call = getattr(xprnn.functional, f"{kind}_forward")
    backward = getattr(xprnn.functional, f"{kind}_backward")
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
    results = {"output": output, **by_name(case, final, ())}
    for name, gradient in backward(doutput, dfinal, cache).items():
        results[name if f"{name[1:]}_l0" not in layer.parameters else f"{name}_l0"] = gradient
    return {name: xprnn.to_numpy(array) for name, array in results.items()}


def unroll(
    cell: Any, x: np.ndarray, initial: tuple[np.ndarray, ...] | None, upstream: Any
) -> Results:
    """Call a cell once per step, then backward: h, c (T, N, H), dx, dh0, dc0 and the others.

    `x` is (T, N, I); `upstream` has an array (T, N, H) per state, dL/dh_t without later steps.
    """
    names, backend = ("h", "c")[: len(upstream)], cell.backend
    hx = None if initial is None else move(backend, *initial)
    states, dx = [], []
    for x_t in x:
        hx = cell(move(backend, x_t), hx)
        states.append(hx if isinstance(hx, tuple) else (hx,))
    dstates: tuple[Any, ...] = ()
    for share in zip(*(d[::-1] for d in upstream), strict=True):
        total = tuple(move(backend, d) for d in share)
        if dstates:
            total = tuple(d + later for d, later in zip(total, dstates, strict=True))
        dx_t, dstates = cell.backward(total if len(total) > 1 else total[0])
        dstates = dstates if isinstance(dstates, tuple) else (dstates,)
        dx.append(dx_t)
    to_numpy = xprnn.to_numpy
    results = {name: np.stack([to_numpy(s[k]) for s in states]) for k, name in enumerate(names)}
    results |= {f"d{name}0": to_numpy(dstates[k]) for k, name in enumerate(names)}
    results |= {f"d{name}": to_numpy(gradient) for name, gradient in cell.grads.items()}
    return results | {"dx": np.stack([to_numpy(d) for d in dx[::-1]])}


def parameters_of(layer: Any) -> Results:
    """A layer's parameters in float64, on the host."""
    return {n: xprnn.to_numpy(p).astype(np.float64) for n, p in layer.parameters.items()}
