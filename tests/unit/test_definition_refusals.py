"""What is no definition is refused when it is decorated, with file and line."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.definitions import gru, li_gru

HERE = __file__


def define(step: Any, **arguments: Any) -> Any:
    return xprnn.cell(**{"gates": ("a",), **arguments})(step)


def line_of(function: Any) -> int:
    """The line of the code of a lambda, or the second one of a function."""
    return function.__code__.co_firstlineno


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "branch": (lambda f, x, s: x.a if x.a > 0 else s.h, TypeError, "branches on a value"),
    "and": (lambda f, x, s: f.where(0 < x.a < 1, x.a, s.h), TypeError, "branches on a value"),
    "math": (lambda f, x, s: math.exp(x.a) + s.h, TypeError, "reads a value as a number"),
    "float": (lambda f, x, s: float(x.a) + s.h, TypeError, "reads a value as a number"),
    "numpy": (lambda f, x, s: np.exp(x.a) + s.h, TypeError, "calls numpy.exp on a value"),
    "numpy.where": (
        lambda f, x, s: np.where(x.a > 0, x.a, s.h),
        TypeError,
        "calls numpy.where on a value",
    ),
    "numpy.clip": (lambda f, x, s: np.clip(x.a, 0, 1) + s.h, TypeError, "on a value"),
    "asarray": (lambda f, x, s: np.asarray(x.a) + s.h, TypeError, "makes a NumPy array"),
    "array": (lambda f, x, s: x.a + np.ones(3), TypeError, "computes with a ndarray"),
    "power": (lambda f, x, s: x.a**2 + s.h, TypeError, "to a power"),
    "index": (lambda f, x, s: x.a[0] + s.h, TypeError, "indexes a value"),
    "iteration": (lambda f, x, s: sum(x.a) + s.h, TypeError, "iterates over a value"),
    "text": (lambda f, x, s: x.a + "1", TypeError, "computes with a str"),
    "bool": (lambda f, x, s: x.a * True, TypeError, "computes with a bool"),
    "comparison": (lambda f, x, s: x.a * (s.h > 0), TypeError, "computes with a comparison"),
    "selection": (lambda f, x, s: f.where(x.a, x.a, s.h), TypeError, "is a comparison"),
    "function": (lambda f, x, s: f.sine(x.a), AttributeError, "f.sine: there is no such"),
    "gate": (lambda f, x, s: x.b, AttributeError, "x.b: there is none; there are a"),
    "state": (lambda f, x, s: x.a + s.c, AttributeError, "s.c: there is none; there are h"),
    "block": (lambda f, x, s: f.recurrent(s.h, "b").b, ValueError, "there is no gate 'b'"),
    "twice": (
        lambda f, x, s: x.a + f.recurrent(s.h).a + f.recurrent(x.a).a,
        ValueError,
        "reads the block 'a' of weight_hh twice",
    ),
    "matrix twice": (
        lambda f, x, s: f.linear("m", x.a, "H") + f.linear("m", s.h, "H"),
        ValueError,
        "reads the matrix 'm' twice",
    ),
    "matrix name": (
        lambda f, x, s: f.linear("weight_hh", x.a, "H"),
        ValueError,
        "cannot be the name of a matrix",
    ),
    "size": (lambda f, x, s: f.linear("m", x.a, 0), ValueError, "expected a size"),
    "widths": (
        lambda f, x, s: f.linear("m", x.a, "P") + s.h,
        TypeError,
        "combines values of width P and H",
    ),
    "clip": (lambda f, x, s: f.clip(x.a, s.h, 1.0), ValueError, "its bounds are numbers"),
    "slope": (lambda f, x, s: f.leaky_relu(x.a, -1.0), ValueError, "a number from 0"),
    "rate": (lambda f, x, s: x.a * f.keep(1.0), ValueError, "a rate from 0 to below 1"),
    "per": (lambda f, x, s: x.a * f.keep(0.5, "row"), ValueError, "'step' or 'sequence'"),
    "gains": (lambda f, x, s: f.norm([x.a], [])[0], ValueError, "1 values and 0 gains"),
    "number": (lambda f, x, s: f.recurrent(1.0).a + x.a, ValueError, "a value that rows have"),
    # at the definition as a whole
    "too many": (lambda f, x, s: (x.a, s.h), ValueError, "returns 2 states, expected h"),
    "none": (lambda f, x, s: None, ValueError, "returns a NoneType as h"),
    "constant": (lambda f, x, s: x.a * 0 if False else 1.0, ValueError, "returns a float as h"),
    "condition": (lambda f, x, s: x.a > s.h, ValueError, "returns a comparison as h"),
    "unread": (lambda f, x, s: s.h * 2, ValueError, "the gate 'a' is never read"),
    "lost": (lambda f, x, s: (x.a + 1, s.h)[1], ValueError, "the gate 'a' is never read"),
    "unread block": (
        lambda f, x, s: (f.recurrent(s.h), x.a)[1],
        ValueError,
        "the block of weight_hh 'a' is never read",
    ),
    "unread matrix": (
        lambda f, x, s: (f.linear("m", s.h, "H"), x.a)[1],
        ValueError,
        "the matrix 'm' is never read",
    ),
    "two arguments": (lambda f, x: x.a, ValueError, "takes 2 arguments, expected three"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_file_and_line(name: str) -> None:
    step, error, message = REFUSED[name]
    with pytest.raises(error, match=r":\d+: ") as caught:
        define(step)
    text = str(caught.value)
    place, _, rest = text.partition(": ")
    assert message in rest, text
    file, _, line = place.rpartition(":")
    assert file == HERE
    assert line_of(step) <= int(line) <= line_of(step) + 3


SIGNATURES: dict[str, tuple[dict[str, Any], str]] = {
    "vector": ({"vectors": ("p",)}, "the vector 'p' is never read"),
    "input": ({"inputs": ("dt",)}, "the input 'dt' is never read"),
    "name": ({"gates": ("a", "1b")}, "has gate '1b', expected a name"),
    "private": ({"states": ("_h",)}, "has state '_h', expected a name"),
    "repeated": ({"gates": ("a", "a")}, "has gate 'a' twice"),
    "both": ({"inputs": ("a",)}, "has input 'a' twice"),
    "function": ({"vectors": ("tanh",)}, "as a function of f"),
    "argument": ({"options": {"dropout": 0.5}}, "as an argument of layers"),
    "parameter": ({"vectors": ("bias_hh",)}, "as another parameter"),
    "size": ({"sizes": {"c": 3}}, "gives 'c' the size 3"),
    "zero": ({"sizes": {"h": 0}}, "gives 'h' the size 0"),
    "initial": ({"states": {"h": math.nan}}, "the initial value nan"),
    "option": ({"options": {"k": [1]}}, "gives option 'k' [1]"),
    "no gate": ({"gates": ()}, "has no gates"),
}


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signatures_are_checked(name: str) -> None:
    arguments, message = SIGNATURES[name]
    with pytest.raises(ValueError, match=r"test_definition_refusals.py:\d+: .*") as caught:
        define(lambda f, x, s: x.a + s.h, **arguments)
    assert message in str(caught.value)


def test_options_are_plain_values() -> None:
    """A definition may branch on them; each set of values is traced."""

    @xprnn.cell(gates=("a",), options={"kind": "relu", "k": 2.0})
    def chosen(f: Any, x: Any, s: Any) -> Any:
        return getattr(f, f.kind)(x.a) * math.sqrt(f.k) + s.h

    digests = {chosen.digest(), chosen.digest({"k": 3.0}), chosen.digest({"kind": "tanh"})}
    assert len(digests) == 3
    assert chosen.digest({"k": 2.0}) == chosen.digest()
    with pytest.raises(TypeError, match="there is no option 'x'"):
        chosen.trace({"x": 1})


def test_numbers_of_numpy_are_constants() -> None:
    one = define(lambda f, x, s: np.float64(2.0) * x.a + s.h / np.int64(2))
    two = define(lambda f, x, s: 2.0 * x.a + s.h / 2)
    assert one.digest() == two.digest()


def test_a_digest_depends_on_the_equations_alone() -> None:
    def written_otherwise(f: Any, x: Any, s: Any) -> Any:
        gates = f.recurrent(s.h)
        f.exp(x.z)  # not used
        candidate = f.relu(x.n + gates.n)
        update = f.sigmoid(x.z + gates.z)
        return candidate + update * (s.h - candidate)

    def another(f: Any, x: Any, s: Any) -> Any:
        gh = f.recurrent(s.h)
        z, n = f.sigmoid(x.z + gh.z), f.tanh(x.n + gh.n)
        return n + z * (s.h - n)

    same = xprnn.cell(gates=("z", "n"))(written_otherwise)
    assert same.digest() == li_gru.digest()
    assert xprnn.cell(gates=("z", "n"))(another).digest() != li_gru.digest()
    assert xprnn.cell(gates=("n", "z"))(written_otherwise).digest() != li_gru.digest()
    # a new version of the hash would refuse every file: DIGEST_VERSION must then change too
    assert gru.digest() == GRU_DIGEST


GRU_DIGEST = "1:f5e66cbba586e9a501fa5e6d4010dfd6267f4633e0b98c8668cefef94e14433c"


def test_copies_and_pickles_are_the_definition_itself() -> None:
    assert copy.copy(gru) is gru
    assert copy.deepcopy([gru])[0] is gru
    assert pickle.loads(pickle.dumps(gru)) is gru


def test_a_definition_is_not_called() -> None:
    with pytest.raises(TypeError, match=r"xprnn.Recurrent\(gru, input_size, hidden_size\)"):
        gru(1, 2, 3)
