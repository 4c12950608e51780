"""Definitions of cells, from their papers, and one that calls every function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import xprnn
from xprnn.cells.definition import Definition


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


_NORMED = tuple(f"{kind}{k}_{gate}" for k in (1, 2) for kind in "ab" for gate in "ifgo")


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"), vectors=(*_NORMED, "a3", "b3"))
def layer_norm_lstm(f: Any, x: Any, s: Any) -> Any:
    def vectors(kind: str) -> list[Any]:
        return [getattr(f, f"{kind}_{gate}") for gate in "ifgo"]

    recurrent = f.norm([*f.recurrent(s.h, bias=False)], vectors("a1"), vectors("b1"))
    inputs = f.norm([x.i, x.f, x.g, x.o], vectors("a2"), vectors("b2"))
    i, forget, g, o = (a + b for a, b in zip(recurrent, inputs, strict=True))
    c = f.sigmoid(forget) * s.c + f.sigmoid(i) * f.tanh(g)
    (normed,) = f.norm([c], [f.a3], [f.b3])
    return f.sigmoid(o) * f.tanh(normed), c


@xprnn.cell(gates=("r", "z", "n"), vectors=("a_r", "a_z", "a_n", "b_r", "b_z", "b_n"))
def layer_norm_gru(f: Any, x: Any, s: Any) -> Any:
    r, z = f.norm([*f.recurrent(s.h, "r", "z")], [f.a_r, f.a_z], [f.b_r, f.b_z])
    r, z = f.sigmoid(x.r + r), f.sigmoid(x.z + z)
    (n,) = f.norm([f.recurrent(s.h, "n").n], [f.a_n], [f.b_n])
    n = f.tanh(x.n + r * n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("m", "i", "f", "g", "o"), states=("h", "c"))
def multiplicative_lstm(f: Any, x: Any, s: Any) -> Any:
    m = x.m * f.recurrent(s.h, "m", bias=False).m
    gh = f.recurrent(m, "i", "f", "g", "o")
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    return f.sigmoid(x.o + gh.o) * f.tanh(c), c


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"), options={"rate": 0.3})
def recurrent_dropout(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h * f.keep(f.rate, per="sequence") / (1 - f.rate))
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    return f.sigmoid(x.o + gh.o) * f.tanh(c), c


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def zoneout(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    h = f.sigmoid(x.o + gh.o) * f.tanh(c)
    return s.h + f.keep(0.1) * (h - s.h), s.c + f.keep(0.5) * (c - s.c)


@xprnn.cell(gates=("i", "g", "o"), states=("h", "c"), vectors=("p_i", "p_o"))
def onnx_lstm(f: Any, x: Any, s: Any) -> Any:
    """Clip, coupled gates and peepholes."""
    gh = f.recurrent(s.h)
    i = f.sigmoid(f.clip(x.i + gh.i + f.p_i * s.c, -0.5, 0.5))
    c = (1 - i) * s.c + i * f.tanh(f.clip(x.g + gh.g, -0.5, 0.5))
    return f.sigmoid(f.clip(x.o + gh.o + f.p_o * c, -0.5, 0.5)) * f.tanh(c), c


@xprnn.cell(gates=("z", "n"))
def li_gru(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    z = f.sigmoid(x.z + gh.z)
    n = f.relu(x.n + gh.n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("r", "z", "n"))
def hard_gru(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    r, z = f.hard_sigmoid(x.r + gh.r), f.hard_sigmoid(x.z + gh.z)
    n = f.relu(x.n + r * gh.n)
    return n + z * (s.h - n)


@xprnn.cell(gates=("z", "i", "f", "o"), states={"h": 0.0, "c": 0.0, "n": 0.0, "m": -math.inf})
def slstm(f: Any, x: Any, s: Any) -> Any:
    gh = f.recurrent(s.h)
    z, o, i = f.tanh(x.z + gh.z), f.sigmoid(x.o + gh.o), x.i + gh.i
    kept = s.m - f.softplus(-(x.f + gh.f))
    m = f.maximum(kept, i)
    i, forget = f.exp(i - m), f.exp(kept - m)
    c, n = forget * s.c + i * z, forget * s.n + i
    return o * c / n, c, n, m


@xprnn.cell(gates=("z", "n"))
def min_gru(f: Any, x: Any, s: Any) -> Any:
    return s.h + f.sigmoid(x.z) * (x.n - s.h)


@xprnn.cell(gates=("h", "f", "i"))
def min_lstm(f: Any, x: Any, s: Any) -> Any:
    forget, i = f.sigmoid(x.f), f.sigmoid(x.i)
    return (forget * s.h + i * x.h) / (forget + i)


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
