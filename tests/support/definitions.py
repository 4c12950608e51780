"""Definitions of cells: those that the documentation shows, and ones for the tests alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import xprnn
from xprnn.cells.definition import Definition

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def example(name: str) -> ModuleType:
    """A script of the gallery as a module, which pickles can name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAPERS: dict[str, Definition] = {
    name: value
    for name, value in vars(example("plot_6_cells_of_papers")).items()
    if isinstance(value, Definition)
}
globals().update(PAPERS)


@xprnn.cell(gates=("r", "z", "n"))
def gru(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    r, z = f.sigmoid(x.r + gh.r), f.sigmoid(x.z + gh.z)
    n = f.tanh(x.n + r * gh.n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("r", "z", "n"))
def gru2014(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h, "r", "z")
    r, z = f.sigmoid(x.r + gh.r), f.sigmoid(x.z + gh.z)
    n = f.tanh(x.n + f.recurrent(r * s.h, "n").n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def lstm(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    i, forget, o = f.sigmoid(x.i + gh.i), f.sigmoid(x.f + gh.f), f.sigmoid(x.o + gh.o)
    c = forget * s.c + i * f.tanh(x.g + gh.g)
    return o * f.tanh(c), c


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"), sizes={"h": "proj_size"})
def projected(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    i, forget, o = f.sigmoid(x.i + gh.i), f.sigmoid(x.f + gh.f), f.sigmoid(x.o + gh.o)
    c = forget * s.c + i * f.tanh(x.g + gh.g)
    return f.linear("proj", o * f.tanh(c), "proj_size", bias=True), c


@xprnn.cell(gates=("m", "i", "f", "g", "o"), states=("h", "c"))
def multiplicative_lstm(f: Any, x: Any, s: Any) -> Any:
    m = x.m * f.recurrent(s.h, "m", bias=False).m
    gh = f.recurrent(m, "i", "f", "g", "o")
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    return f.sigmoid(x.o + gh.o) * f.tanh(c), c


@xprnn.cell(gates=("i", "g", "o"), states=("h", "c"), vectors=("p_i", "p_o"))
def onnx_lstm(f: Any, x: Any, s: Any) -> Any:
    """Clip, coupled gates and peepholes."""
    gh = f.recurrent(s.h)
    i = f.sigmoid(f.clip(x.i + gh.i + f.p_i * s.c, -0.5, 0.5))
    c = (1 - i) * s.c + i * f.tanh(f.clip(x.g + gh.g, -0.5, 0.5))
    return f.sigmoid(f.clip(x.o + gh.o + f.p_o * c, -0.5, 0.5)) * f.tanh(c), c


@xprnn.cell(gates=("r", "z", "n"))
def hard_gru(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    r, z = f.hard_sigmoid(x.r + gh.r), f.hard_sigmoid(x.z + gh.z)
    n = f.relu(x.n + r * gh.n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("n",), inputs=("dt",), vectors=("tau",), options={"leak": 0.1})
def continuous(f: Any, x: Any, s: Any) -> Any:
    """Decay by the time between two observations."""
    n = f.tanh(x.n + f.recurrent(s.h).n)
    decay = f.exp(-x.dt * f.softplus(f.tau))
    return decay * s.h + (1 - decay) * n - f.leak * s.h


@xprnn.cell(gates=("a", "b", "c", "d"), states=("h", "k"), vectors=("v",), sizes={"k": 1})
def every_function(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h, "d", "a")
    a = f.leaky_relu(x.a, 0.2) + f.elu(x.b, 1.5) + f.softsign(x.c) + f.hard_sigmoid(x.d, 0.3, 0.4)
    b = f.log(abs(x.a) + 1.5) * f.sqrt(f.exp(x.b) + 1.0) - f.softplus(x.c + gh.d)
    c = f.minimum(x.a, gh.a) + f.maximum(f.v, x.d * s.k) + f.clip(x.b - gh.d, -1.0, 0.5)
    d = f.where(x.c > gh.a, f.tanh(a), f.relu(b) / (1.0 + abs(c)))
    e = f.where(s.h <= 0.25, 1.0, np.float64(-0.5)) * f.sigmoid(d - 2)
    (normed,) = f.norm([e + c * 0.1], [1.0])
    more = f.recurrent(normed, "c", "b", bias=False)
    return more.c + d * more.b, f.linear("to_k", -f.tanh(e), 1) + s.k


@xprnn.cell(gates=("a", "b", "c", "d"), states={"h": 0.5, "k": 0.0, "m": -1.0, "n": 0.0})
def awkward(f: Any, x: Any, s: Any) -> Any:
    """States that change places or are not read, equal gradients, none, and blocks apart."""
    gh = f.recurrent(s.k, "c", "a")
    t = f.tanh(x.a + x.b + gh.a)
    u = f.where(x.c > 0.0, t, -t) + gh.c  # x.c has no gradient
    v = f.recurrent(x.d, "d", "b")  # the operand is a pre-activation
    return s.k, s.m, f.linear("w", u * v.b, "H", bias=True) + v.d, s.h


DEFINITIONS: dict[str, Definition] = {
    value.name: value for value in list(globals().values()) if isinstance(value, Definition)
}
SIZES = {"projected": {"proj_size": 3}}
