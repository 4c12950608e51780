"""The cells with compiled pointwise ops, one function each; products stay NumPy's.

The equations and buffers are those of the plain cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from ...backend import Array
from ...cells import Buffers, Cell, gru, lstm, rnn
from . import gates as by_element
from . import reset_before
from .jit import compile_for, number_of, read, written


class RNN(rnn.RNN):
    """`cells.RNN` with compiled pointwise ops; `gates` is in for `forward_gates`."""

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (h_next,) = step.next_states
        _op(f"{self.name}_forward", gh.dtype)(step.gates, gh, h_next)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (h_next,), (dh,) = step.next_states, step.dstates
        _op(f"{self.name}_backward", dh.dtype)(step.gates, h_next, dh)


class GRU(gru.GRU):
    """`cells.GRU` with compiled pointwise ops."""

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (h,), (h_next,) = step.states, step.next_states
        bias = _no_bias(gh.shape[1], gh.dtype) if bias_hh is None else bias_hh
        _op("gru_forward", gh.dtype)(step.gates, gh, bias, h, h_next, step.saved)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (h,), (dh,) = step.states, step.dstates
        _op("gru_backward", dh.dtype)(step.gates, step.saved, h, dh)


class GRUResetBefore(gru.GRUResetBefore):
    """`cells.GRUResetBefore` with compiled pointwise ops."""

    def forward_reset(self, xp: Any, gh_rz: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,) = step.states
        _op("forward_reset", gh_rz.dtype)(step.gates, gh_rz, h, step.saved)

    def forward_candidate(self, xp: Any, gh_n: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (h_next,) = step.states, step.next_states
        _op("forward_candidate", gh_n.dtype)(step.gates, gh_n, h, h_next)

    def backward_candidate(self, xp: Any, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = step.states, step.dstates
        _op("backward_candidate", dh.dtype)(step.gates, h, dh)

    def backward_reset(self, xp: Any, dq: Array, step: Buffers) -> None:
        """See `cells.GRUResetBefore`."""
        (h,), (dh,) = step.states, step.dstates
        _op("backward_reset", dh.dtype)(step.gates, dq, h, dh)


class LSTM(lstm.LSTM):
    """`cells.LSTM` with compiled pointwise ops."""

    def forward_gates(self, xp: Any, bias_hh: Array | None, gh: Array, step: Buffers) -> None:
        """See `Cell`."""
        (_, c), (h_next, c_next) = step.states, step.next_states
        _op("lstm_forward", gh.dtype)(step.gates, gh, c, h_next, c_next, step.saved)

    def backward_gates(self, xp: Any, step: Buffers) -> None:
        """See `Cell`."""
        (_, c), (dh, dc) = step.states, step.dstates
        _op("lstm_backward", dh.dtype)(step.gates, step.saved, c, dh, dc)


POINTWISE: dict[str, Cell] = {
    cell.name: cell for cell in (RNN("tanh"), RNN("relu"), GRU(), GRUResetBefore(), LSTM())
}


# One function per op, with the arrays it needs as arguments. The functions in `gates.py` take all
# states; in place of those that they do not read they get None or another array.


def _rnn_tanh_forward(gates: Any, gh: Any, h_next: Any) -> None:
    by_element.rnn_tanh_forward(gates, gh, None, None, (h_next,), None)


def _rnn_relu_forward(gates: Any, gh: Any, h_next: Any) -> None:
    by_element.rnn_relu_forward(gates, gh, None, None, (h_next,), None)


def _rnn_tanh_backward(gates: Any, h_next: Any, dh: Any) -> None:
    by_element.rnn_tanh_backward(gates, None, None, (h_next,), (dh,))


def _rnn_relu_backward(gates: Any, h_next: Any, dh: Any) -> None:
    by_element.rnn_relu_backward(gates, None, None, (h_next,), (dh,))


def _gru_forward(gates: Any, gh: Any, bias: Any, h: Any, h_next: Any, saved: Any) -> None:
    by_element.gru_forward(gates, gh, bias, (h,), (h_next,), saved)


def _gru_backward(gates: Any, saved: Any, h: Any, dh: Any) -> None:
    by_element.gru_backward(gates, saved, (h,), None, (dh,))


def _forward_reset(gates: Any, gh_rz: Any, h: Any, saved: Any) -> None:
    reset_before.forward_reset(gates, gh_rz, h, saved)


def _forward_candidate(gates: Any, gh_n: Any, h: Any, h_next: Any) -> None:
    reset_before.forward_candidate(gates, gh_n, h, h_next)


def _backward_candidate(gates: Any, h: Any, dh: Any) -> None:
    reset_before.backward_candidate(gates, h, dh)


def _backward_reset(gates: Any, dq: Any, h: Any, dh: Any) -> None:
    reset_before.backward_reset(gates, dq, h, dh)


def _lstm_forward(gates: Any, gh: Any, c: Any, h_next: Any, c_next: Any, saved: Any) -> None:
    by_element.lstm_forward(gates, gh, None, (c, c), (h_next, c_next), saved)


def _lstm_backward(gates: Any, saved: Any, c: Any, dh: Any, dc: Any) -> None:
    by_element.lstm_backward(gates, saved, (c, c), None, (dh, dc))


# how each op accesses its arguments, in order: r in, w out or inout, v in, a vector
OPS: dict[str, tuple[Callable[..., None], str]] = {
    "rnn_tanh_forward": (_rnn_tanh_forward, "rrw"),
    "rnn_relu_forward": (_rnn_relu_forward, "rrw"),
    "rnn_tanh_backward": (_rnn_tanh_backward, "wrr"),
    "rnn_relu_backward": (_rnn_relu_backward, "wrr"),
    "gru_forward": (_gru_forward, "wrvrww"),
    "gru_backward": (_gru_backward, "wwrw"),
    "forward_reset": (_forward_reset, "wrrw"),
    "forward_candidate": (_forward_candidate, "wrrw"),
    "backward_candidate": (_backward_candidate, "wrw"),
    "backward_reset": (_backward_reset, "wrrw"),
    "lstm_forward": (_lstm_forward, "wrrwww"),
    "lstm_backward": (_lstm_backward, "wrrrw"),
}


@cache
def _op(name: str, dtype: np.dtype[Any]) -> Any:
    """Return an op compiled for float32 or float64."""
    number = number_of(dtype)
    kinds = {"r": read(number, 2), "v": read(number, 1), "w": written(number, 2)}
    function, accesses = OPS[name]
    return compile_for(function, tuple([kinds[access] for access in accesses]))


@cache
def _no_bias(width: int, dtype: np.dtype[Any]) -> np.ndarray:
    return np.zeros(width, dtype)


def needed(cell: str, dtype: np.dtype[Any], record: bool) -> list[Callable[[], Any]]:
    """Return functions that compile the ops of a cell; with `record` the backward ops too."""
    prefixes = ("forward", "backward") if cell == "gru_reset_before" else (f"{cell}_",)
    names = [name for name in OPS if name.startswith(prefixes) and (record or "forward" in name)]
    return [partial(_op, name, dtype) for name in names]


def compilations() -> list[Callable[[], Any]]:
    """Return functions that compile each op, one for every dtype."""
    return [partial(_op, name, np.dtype(t)) for name in OPS for t in ("float32", "float64")]
