"""Configurations of a layer, the numbers each is run on, and running them here and in torch."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import xprnn
from xprnn.backend import Backend

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

    @property
    def state_names(self) -> tuple[str, ...]:
        return ("h", "c") if self.cell == "lstm" else ("h",)

    @property
    def seed(self) -> int:
        return zlib.crc32(repr(self).encode())

    def __str__(self) -> str:
        flags = {"batch_first": self.batch_first, "nobias": not self.bias, "h0": self.states}
        words = [self.cell, f"{self.layers}x{self.directions}", self.dtype, self.lengths]
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
    """Normal numbers everywhere: states non-zero and distinct, a gradient on every output."""
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(case.dtype)

    outer = (case.N, case.T) if case.batch_first else (case.T, case.N)
    state = (case.layers * case.directions, case.N, case.H)
    orders = LENGTHS[case.lengths]
    return Problem(
        x=normal(*outer, case.I),
        initial=tuple(normal(*state) for _ in case.state_names),
        lengths=None if orders is None else orders[case.seed % 2],
        doutput=normal(*outer, case.directions * case.H),
        dfinal=tuple(normal(*state) for _ in case.state_names),
    )


def build(case: Case, backend: str = "numpy") -> Any:
    """The layer of a case in train mode, with the parameters that its seed draws."""
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
        seed=case.seed,
    )
    return layer.train()


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


def torch_run(case: Case, parameters: Results, problem: Problem) -> Results:
    """The same through torch's layer, in float64 on the same numbers, widened."""
    import torch

    kinds = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    _, options = LAYERS[case.cell]
    layer = kinds[case.cell.partition("_")[0]](
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == 2,
        **options,
    ).double()
    layer.load_state_dict({name: torch.tensor(array) for name, array in parameters.items()})

    def leaf(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array.astype(np.float64), requires_grad=True)

    x = leaf(problem.x)
    initial = [leaf(state if case.states else np.zeros_like(state)) for state in problem.initial]
    given = x
    if problem.lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(problem.lengths), case.batch_first, enforce_sorted=False
        )
    output, final = layer(given, tuple(initial) if len(initial) > 1 else initial[0])
    if problem.lengths is not None:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(
            output, case.batch_first, total_length=case.T
        )
    ends = final if isinstance(final, tuple) else (final,)
    upstream = [torch.tensor(d.astype(np.float64)) for d in (problem.doutput, *problem.dfinal)]
    torch.autograd.backward([output, *ends], upstream)
    found = {"output": output, "dx": x.grad}
    found |= by_name(case, tuple(ends), tuple(state.grad for state in initial))
    found |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in found.items()}
