"""Any arguments are either computed correctly or refused with a clear error and no side effect.

hypothesis draws the target (layers, cells, functions), sizes that include T and N of 0 and 1,
lengths of zero, the memory layout of the arrays, and the defect of one of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xprnn
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    assert_same,
    backward,
    copies,
    forward,
    is_cell,
    is_lstm,
    make,
    module_of,
    run,
    state_of,
)

many = settings(deadline=None, derandomize=True, max_examples=150)
few = settings(many, max_examples=20)


@dataclass(frozen=True)
class Call:
    """The target of a call, its options, and the sizes of the arrays."""

    name: str
    options: dict[str, Any]
    I: int  # noqa: E741
    H: int
    T: int
    N: int
    batched: bool
    lengths: tuple[int, ...] | None

    def build(self) -> Any:
        return make(self.name, self.I, self.H, **self.options)

    def arguments(self, subject: Any) -> dict[str, np.ndarray]:
        return arguments(subject, self.T, self.N, batched=self.batched)

    @property
    def keywords(self) -> dict[str, Any]:
        return {} if self.lengths is None else {"lengths": self.lengths}


@st.composite
def calls(draw: st.DrawFn, names: tuple[str, ...] = (*LAYERS, *CELLS, *FUNCTIONS)) -> Call:
    name = draw(st.sampled_from(names))
    options = {"bias": draw(st.booleans()), "dtype": draw(st.sampled_from(["float32", "float64"]))}
    if not is_cell(name):
        options["batch_first"] = draw(st.booleans())
    if name in LAYERS:
        options["num_layers"] = draw(st.integers(1, 3))
        options["bidirectional"] = draw(st.booleans())
    T, N = draw(st.integers(0, 6)), draw(st.integers(0, 5))
    batched = draw(st.booleans())
    rows = N if batched else 1
    lengths = None
    if not is_cell(name) and draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.integers(0, T), min_size=rows, max_size=rows)))
    sizes = {"I": draw(st.integers(1, 4)), "H": draw(st.integers(1, 5))}
    return Call(name, options, **sizes, T=T, N=N, batched=batched, lengths=lengths)


# -- the same values in any memory layout


def strided(array: np.ndarray) -> np.ndarray:
    spread = np.full([2 * size + 1 for size in array.shape], np.nan, array.dtype)
    view = spread[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def reversed_(array: np.ndarray) -> np.ndarray:
    backwards = tuple(slice(None, None, -1) for _ in array.shape)
    return array[backwards].copy()[backwards]


def transposed(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.moveaxis(array, -1, 0).copy(), 0, -1)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array: np.ndarray) -> np.ndarray:
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


class Subclass(np.ndarray):
    """An array class of the caller's own that changes nothing."""


LAYOUTS = {
    "strided": strided,
    "reversed": reversed_,
    "transposed": transposed,
    "fortran": np.asfortranarray,
    "read-only": read_only,
    "unaligned": unaligned,
    "subclass": lambda array: array.view(Subclass),
}


@pytest.mark.usefixtures("implementation")
@many
@given(calls(), st.data())
def test_any_memory_layout_gives_the_same_bits(call: Call, data: st.DataObject) -> None:
    subject = call.build()
    clean = call.arguments(subject)
    expected = run(subject, clean, **call.keywords)
    layouts = {name: data.draw(st.sampled_from(sorted(LAYOUTS)), label=name) for name in clean}
    laid_out = {name: LAYOUTS[layouts[name]](array) for name, array in clean.items()}
    before = copies(list(laid_out.values()))
    actual = run(subject, laid_out, **call.keywords)
    assert all(type(array) is np.ndarray for array in actual)
    assert_same(actual, expected)
    assert_same([np.asarray(array) for array in laid_out.values()], before, "an argument")


@pytest.mark.parametrize("name", [*LAYERS, *CELLS, *FUNCTIONS])
def test_broadcast_arguments(name: str, implementation: str) -> None:
    """Arrays whose rows are one row in memory, as np.broadcast_to makes them."""
    subject = make(name)
    rows = {n: np.broadcast_to(a[..., :1, :], a.shape) for n, a in arguments(subject).items()}
    expected = run(subject, {n: a.copy() for n, a in rows.items()})
    assert_same(run(subject, rows), expected)


# -- arrays of a wrong type or shape


def wider(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, array[..., :1]], axis=-1)


DEFECTS = {
    "float16": lambda a: a.astype(np.float16),
    "other float": lambda a: a.astype({"float32": "float64", "float64": "float32"}[a.dtype.name]),
    "long double": lambda a: a.astype(np.longdouble),
    "int": lambda a: a.astype(np.int64),
    "bool": lambda a: a > 0,
    "complex": lambda a: a.astype(np.complex128),
    "object": lambda a: a.astype(object),
    "string": lambda a: a.astype(str),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "record": lambda a: np.zeros(a.shape, [("re", a.dtype)]),
    "masked": lambda a: np.ma.array(a, mask=a > 0),
    "list": lambda a: a.tolist(),
    "scalar": lambda a: 1.0,
    "text": lambda a: "x",
    "memoryview": lambda a: memoryview(a),
    "0-d": lambda a: a.dtype.type(1.0) * np.ones((), a.dtype),
    "wider": wider,
    "one more axis": lambda a: a[None, None],
    "no features": lambda a: a[..., :0],
}


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("defect", DEFECTS)
@few
@given(calls(), st.data())
def test_a_wrong_array_is_refused_without_side_effects(
    defect: str, call: Call, data: st.DataObject
) -> None:
    subject = call.build()
    clean = call.arguments(subject)
    argument = data.draw(st.sampled_from(sorted(clean)), label="argument")
    check_refused(subject, clean, argument, DEFECTS[defect](clean[argument]), **call.keywords)


@pytest.mark.usefixtures("implementation")
@many
@given(calls(), st.data())
def test_a_wrong_shape_is_refused_without_side_effects(call: Call, data: st.DataObject) -> None:
    subject = call.build()
    clean = call.arguments(subject)
    argument = data.draw(st.sampled_from(sorted(clean)), label="argument")
    right = clean[argument].shape
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4), label="shape"))
    if argument == "x":  # any T and N will do, with or without N
        ranks = (1, 2) if is_cell(call.name) else (2, 3)
        if len(shape) in ranks and shape[-1] == right[-1]:
            shape = (*shape[:-1], shape[-1] + 1)
    elif shape == right:
        shape = (*shape, 1)
    check_refused(subject, clean, argument, np.ones(shape, clean[argument].dtype), **call.keywords)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS, *FUNCTIONS])
def test_no_x_is_refused(name: str) -> None:
    subject = make(name)
    check_refused(subject, arguments(subject), "x", None)


@pytest.mark.parametrize("name", [n for n in (*LAYERS, *CELLS, *FUNCTIONS) if is_lstm(n)])
@pytest.mark.parametrize("wrong", ["one array", "three", "a stack of both"])
def test_an_lstm_requires_a_pair_of_states(name: str, wrong: str) -> None:
    subject = make(name)
    clean = arguments(subject)
    names = ("h", "c") if is_cell(name) else ("h0", "c0")
    h, c = (clean[n] for n in names)
    pairs = {"one array": h, "three": (h, c, c)}
    hx = pairs.get(wrong, np.stack([h, c]))
    expected = run(subject, clean)
    with pytest.raises((TypeError, ValueError), match=names[1]) as caught:
        subject(clean["x"], hx)
    assert str(h.shape) in str(caught.value)
    assert_same(run(subject, clean), expected)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [n for n in (*LAYERS, *CELLS, *FUNCTIONS) if is_lstm(n)])
def test_either_state_of_a_pair_may_be_none(
    name: str, training: bool, batched: bool, implementation: str
) -> None:
    subject = make(name)
    if not training and name not in FUNCTIONS:
        subject.eval()
    inputs = arguments(subject, batched=batched)
    names = ("h", "c") if is_cell(name) else ("h0", "c0")
    x, h, c = inputs["x"], *(inputs[n] for n in names)
    zeros = np.zeros_like(h)
    for hx, full in (((h, None), (h, zeros)), ((None, c), (zeros, c)), ((None, None), None)):
        assert_same(subject(x, hx), subject(x, full))


# -- arrays of other libraries


def test_arrays_of_another_backend_are_refused(fake_cupy: Any) -> None:
    subject = make("gru")
    clean = arguments(subject)
    for argument in clean:
        foreign = fake_cupy.from_host(clean[argument])
        check_refused(subject, clean, argument, foreign)
    with pytest.raises(TypeError, match=r"x: .* on backend 'numpy', got .* on backend 'fake_cupy'"):
        subject(fake_cupy.from_host(clean["x"]))


def test_torch_tensors_are_refused_with_a_conversion() -> None:
    torch = pytest.importorskip("torch")
    subject = make("gru")
    clean = arguments(subject)
    with pytest.raises(TypeError, match=r"x: .*got Tensor on the CPU; .*xprnn\.asarray\(x, "):
        subject(torch.tensor(clean["x"]))


@pytest.mark.parametrize("wrong", [np.ma.ones((4, 3, 3)), np.ones((4, 3, 3), "float16")])
def test_the_conversion_in_the_error_works(wrong: Any) -> None:
    """The call suggested by the message makes an array that is accepted."""
    subject = make("gru")
    with pytest.raises(TypeError) as caught:
        subject(wrong)
    advice = str(caught.value).rpartition("convert it with ")[2].replace("...", "x")
    advice = f"x{advice}" if advice.startswith(".") else advice
    converted = eval(advice, {"xprnn": xprnn, "x": wrong})
    assert_same(subject(converted), subject(np.ones((4, 3, 3))))


def check_refused(
    subject: Any, clean: dict[str, Any], argument: str, value: Any, **keywords: Any
) -> None:
    """Check that `value` for `argument` is refused by name and that the call has no effect."""
    module = module_of(subject)
    expected = run(subject, clean, **keywords)
    forward(subject, clean, **keywords)  # a recorded call that must be kept
    module.grads.flat[...] = 0.25
    before = state_of(subject)

    upstream = argument.startswith("d")
    with pytest.raises((TypeError, ValueError)) as caught:
        if upstream:
            backward(subject, {**clean, argument: value})
        else:
            forward(subject, {**clean, argument: value}, **keywords)
    message = str(caught.value)
    assert re.search(rf"\b{argument}\b", message), message
    assert "expected" in message, message
    features = rf"\b{clean[argument].shape[-1]},?\)"  # the end of the expected shape
    assert module.dtype.name in message or re.search(features, message), message

    assert_same(state_of(subject), before, "the state")
    module.zero_grad()
    actual = copies(backward(subject, clean)) + copies(list(module.grads.values()))
    assert_same(actual, expected[-len(actual) :], "the recorded call")
    assert_same(run(subject, clean, **keywords), expected, "the next call")
