"""Lengths in any integer form are accepted, anything else is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.targets import FUNCTIONS, LAYERS, arguments, assert_same, make, run, state_of


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


GOOD_LENGTHS = {
    "list": list,
    "tuple": tuple,
    "int8": lambda v: np.array(v, np.int8),
    "uint64": lambda v: np.array(v, np.uint64),
    "big-endian": lambda v: np.array(v, ">i4"),
    "strided": lambda v: np.repeat(np.array(v, np.int64), 2)[::2],
    "read-only": lambda v: read_only(np.array(v, np.int64)),
    "NumPy scalars": lambda v: [np.int32(value) for value in v],
}
BAD_LENGTHS = {
    "float": lambda v: np.array(v, np.float64),
    "half": lambda v: [0.5] * len(v),
    "bool": lambda v: [True] * len(v),
    "complex": lambda v: np.array(v, np.complex64),
    "object": lambda v: np.array(v, object),
    "strings": lambda v: [str(value) for value in v],
    "None inside": lambda v: [None, *v[1:]],
    "nan": lambda v: [float("nan"), *v[1:]],
    "masked": lambda v: np.ma.array(v, mask=[True] + [False] * (len(v) - 1)),
    "iterator": iter,
    "set": set,
    "mapping": lambda v: dict(enumerate(v)),
    "number": lambda v: 1,
    "text": lambda v: "1" * len(v),
    "one too many": lambda v: [*v, 0],
    "one too few": lambda v: v[1:],
    "nested": lambda v: [[value] for value in v],
    "ragged": lambda v: [[1, 2], *v[1:]],
    "0-d": lambda v: np.array(1),
    "negative": lambda v: [-1, *v[1:]],
    "too long": lambda v: [7, *v[1:]],
    "far too long": lambda v: np.array([2**63 + 1, *v[1:]], np.uint64),
    "huge": lambda v: [2**80, *v[1:]],
}
LENGTHS = (3, 0, 6, 1)


@pytest.mark.parametrize("form", GOOD_LENGTHS)
@pytest.mark.parametrize("name", [*LAYERS, *FUNCTIONS])
def test_lengths_in_any_integer_form(name: str, form: str, implementation: str) -> None:
    subject = make(name)
    clean = arguments(subject, T=6, N=4)
    expected = run(subject, clean, lengths=LENGTHS)
    assert_same(run(subject, clean, lengths=GOOD_LENGTHS[form](LENGTHS)), expected)
    assert not np.array_equal(run(subject, clean)[0], expected[0]), "lengths had no effect"


@pytest.mark.parametrize("form", BAD_LENGTHS)
@pytest.mark.parametrize("name", ["rnn_tanh", "lstm", "gru_function"])
def test_wrong_lengths_are_refused(name: str, form: str, implementation: str) -> None:
    subject = make(name)
    clean = arguments(subject, T=6, N=4)
    expected = run(subject, clean, lengths=LENGTHS)
    before = state_of(subject)
    with pytest.raises((TypeError, ValueError), match="lengths: expected"):
        subject(clean["x"], lengths=BAD_LENGTHS[form](LENGTHS))
    assert_same(state_of(subject), before)
    assert_same(run(subject, clean, lengths=LENGTHS), expected)


def test_lengths_on_a_device_are_refused(fake_cupy: Any) -> None:
    with pytest.raises(TypeError, match="lengths: expected host integers"):
        make("gru")(np.zeros((6, 4, 3)), lengths=fake_cupy.from_host(np.array(LENGTHS)))
