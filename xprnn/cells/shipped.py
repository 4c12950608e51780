"""The definitions that are part of xprnn, `xprnn.cell_definitions`: cells that files ask for.

`xprnn/cell_definitions.py` describes their options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..backend.exports import exported_from
from .activations import activation, check_activations
from .definition import Definition, cell
from .definition.defined_cell import DefinedCell

_LSTM = ("sigmoid", "tanh", "tanh")


def _options(*activations: str) -> dict[str, Any]:
    return {"activations": activations, "clip_threshold": 0.0}


def _functions(f: Any, count: int) -> list[Callable[[Any], Any]]:
    """The activation functions; the arguments of f and g, the first two, are clipped."""
    functions = [activation(f, each) for each in check_activations(f.activations, count)]
    bound = f.clip_threshold
    if not bound >= 0.0:
        raise ValueError(f"clip_threshold: expected a number from 0, got {bound!r}")

    def clipped(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda value: function(f.clip(value, -bound, bound))

    return [*map(clipped, functions[:2]), *functions[2:]] if bound else functions


@exported_from("xprnn.cell_definitions")
@cell(gates=("h",), options=_options("tanh"))
def rnn(f: Any, x: Any, s: Any) -> Any:
    """The Elman cell."""
    (activate,) = _functions(f, 1)
    return activate(x.h + f.recurrent(s.h).h)


@exported_from("xprnn.cell_definitions")
@cell(gates=("r", "z", "n"), options=_options("sigmoid", "tanh"))
def gru(f: Any, x: Any, s: Any) -> Any:
    """The GRU with r after the product: `xprnn.GRU(..., reset_after=True)`."""
    gate, candidate = _functions(f, 2)
    gh = f.recurrent(s.h)
    r, z = gate(x.r + gh.r), gate(x.z + gh.z)
    n = candidate(x.n + r * gh.n)
    return n + z * (s.h - n)


@exported_from("xprnn.cell_definitions")
@cell(gates=("r", "z", "n"), options=_options("sigmoid", "tanh"))
def gru_reset_before(f: Any, x: Any, s: Any) -> Any:
    """The GRU with r before the product: `xprnn.GRU(..., reset_after=False)`."""
    gate, candidate = _functions(f, 2)
    gh = f.recurrent(s.h, "r", "z")
    r, z = gate(x.r + gh.r), gate(x.z + gh.z)
    n = candidate(x.n + f.recurrent(r * s.h, "n").n)
    return n + z * (s.h - n)


def _lstm_step(f: Any, x: Any, s: Any, coupled: bool = False, peepholes: bool = False) -> Any:
    """The next h and c.

    :param coupled: whether f = 1 - i.
    :param peepholes: whether i and f see the last c, and o the next one.
    """
    gate, candidate, output = _functions(f, 3)
    gh = f.recurrent(s.h)

    def seeing(name: str, c: Any) -> Any:
        value = getattr(x, name) + getattr(gh, name)
        return value + getattr(f, f"p_{name}") * c if peepholes else value

    i = gate(seeing("i", s.c))
    forget = 1 - i if coupled else gate(seeing("f", s.c))
    c = forget * s.c + i * candidate(x.g + gh.g)
    return gate(seeing("o", c)) * output(c), c


@exported_from("xprnn.cell_definitions")
@cell(gates=("i", "f", "g", "o"), states=("h", "c"), options=_options(*_LSTM))
def lstm(f: Any, x: Any, s: Any) -> Any:
    """The LSTM."""
    return _lstm_step(f, x, s)


@exported_from("xprnn.cell_definitions")
@cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    sizes={"h": "proj_size"},
    options=_options(*_LSTM),
)
def projected_lstm(f: Any, x: Any, s: Any) -> Any:
    """The LSTM with a projection of its output: `xprnn.LSTM(..., proj_size=...)`.

    H. Sak, A. Senior, F. Beaufays (2014), https://arxiv.org/abs/1402.1128.
    """
    h, c = _lstm_step(f, x, s)
    return f.linear("weight_hr", h, "proj_size"), c


@exported_from("xprnn.cell_definitions")
@cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    vectors=("p_i", "p_f", "p_o"),
    options=_options(*_LSTM),
)
def peephole_lstm(f: Any, x: Any, s: Any) -> Any:
    """The LSTM whose gates see c: F. A. Gers, J. Schmidhuber (2000).

    ONNX's P holds p_i, p_o and p_f in this order.
    """
    return _lstm_step(f, x, s, peepholes=True)


@exported_from("xprnn.cell_definitions")
@cell(gates=("i", "g", "o"), states=("h", "c"), options=_options(*_LSTM))
def coupled_lstm(f: Any, x: Any, s: Any) -> Any:
    """The LSTM with f = 1 - i, ONNX's `input_forget`: K. Greff et al. (2015)."""
    return _lstm_step(f, x, s, coupled=True)


@exported_from("xprnn.cell_definitions")
@cell(
    gates=("i", "g", "o"),
    states=("h", "c"),
    vectors=("p_i", "p_o"),
    options=_options(*_LSTM),
)
def coupled_peephole_lstm(f: Any, x: Any, s: Any) -> Any:
    """The LSTM with f = 1 - i whose gates see c."""
    return _lstm_step(f, x, s, coupled=True, peepholes=True)


DEFINITIONS: tuple[Definition, ...] = (
    rnn,
    gru,
    gru_reset_before,
    lstm,
    projected_lstm,
    peephole_lstm,
    coupled_lstm,
    coupled_peephole_lstm,
)


# The definition of each built-in cell, and its options
BUILTIN: dict[str, tuple[Definition, dict[str, Any]]] = {
    "rnn_tanh": (rnn, {}),
    "rnn_relu": (rnn, {"activations": ("relu",)}),
    "gru": (gru, {}),
    "gru_reset_before": (gru_reset_before, {}),
    "lstm": (lstm, {}),
}


@lru_cache(64)
def builtin_cell(name: str, hidden_size: int) -> DefinedCell:
    """The definition of a built-in cell, with biases, for a hidden size."""
    definition, options = BUILTIN[name]
    return definition.cell(hidden_size, {}, options, True)
