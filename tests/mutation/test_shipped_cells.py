"""Faults in shipped definitions, and in layers whose directions differ: each is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xprnn.cells
from tests.layers import test_shipped_cells as shipped_cells
from tests.mutation.test_definitions import faulty
from xprnn import kernels
from xprnn.cells import activations, shipped
from xprnn.engine import by_direction, stack
from xprnn.kernels import shared
from xprnn.nn import variants


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is kept of cells that are equal to faulty ones."""

    def forget() -> None:
        kernels.forget_plans()
        shared.activation_shapes.cache_clear()

    forget()
    yield
    forget()


def layer(name: str) -> Callable[[Any], None]:
    return lambda backend: shipped_cells.test_equal_autograd(name, backend)


def definition(name: str, threshold: float = 0.0) -> Callable[[Any], None]:
    def check(backend: Any) -> None:
        shipped_cells.test_definitions_equal_autograd(
            getattr(xprnn.cells.shipped, name), threshold, backend
        )

    return check


SHIPPED = {
    "the candidate by the gates' function": (
        layer("gru"),
        "n = candidate(x.n + r * gh.n)",
        "n = gate(x.n + r * gh.n)",
    ),
    "z by the candidate's function": (
        layer("gru of 2014"),
        "r, z = gate(x.r + gh.r), gate(x.z + gh.z)\n    n = candidate(x.n + f",
        "r, z = gate(x.r + gh.r), candidate(x.z + gh.z)\n    n = candidate(x.n + f",
    ),
    "c by the function of g": (layer("lstm"), "* output(c), c", "* candidate(c), c"),
    "c clipped": (
        definition("lstm", 0.5),
        "[*map(clipped, functions[:2]), *functions[2:]]",
        "[*map(clipped, functions)]",
    ),
    "g not clipped": (
        definition("lstm", 0.5),
        "[*map(clipped, functions[:2]), *functions[2:]]",
        "[*map(clipped, functions[:1]), *functions[1:]]",
    ),
    "o sees the last c": (
        definition("peephole_lstm"),
        'gate(seeing("o", c))',
        'gate(seeing("o", s.c))',
    ),
    "f = i": (definition("coupled_lstm"), "forget = 1 - i", "forget = i"),
}


@pytest.mark.parametrize("fault", SHIPPED)
def test_a_faulty_definition_is_detected(
    fault: str, fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, old, new = SHIPPED[fault]
    monkeypatch.setattr(xprnn.cells, "shipped", faulty(shipped, old, new))
    with pytest.raises(AssertionError, match=r": \d"):
        check(fake_cupy)


ACTIVATIONS = {
    "a threshold at 0": ("thresholded_relu", "value > alpha", "value > 0.0"),
    "a scale within tanh": ("scaled_tanh", "alpha * f.tanh(beta", "f.tanh(alpha * beta"),
    "alpha for beta": ("affine", "alpha * value + beta", "beta * value + alpha"),
}


@pytest.mark.parametrize("fault", ACTIVATIONS)
def test_a_faulty_activation_is_detected(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new = ACTIVATIONS[fault]
    wrong = faulty(activations, old, new)
    monkeypatch.setattr(shipped, "activation", wrong.activation)
    shipped.rnn._traces.clear()
    shipped.rnn._bound.cache_clear()
    (value, *_) = [each for each in shipped_cells.EVERY if name in each]
    try:
        with pytest.raises(AssertionError, match=r": \d"):
            shipped_cells.test_every_function(value)
    finally:
        shipped.rnn._traces.clear()
        shipped.rnn._bound.cache_clear()


DIRECTIONS = {
    "functions exchanged": (
        variants,
        "xprnn.nn.layers.variants",
        "(chosen[:n], chosen[-n:])",
        "(chosen[-n:], chosen[:n])",
    ),
    "the reverse direction as the forward one": (
        by_direction,
        stack,
        "self.runners[direction.reverse].forward",
        "self.runners[0].forward",
    ),
    "the gradient of the other cell": (
        by_direction,
        stack,
        "self.runners[direction.reverse].backward",
        "self.runners[not direction.reverse].backward",
    ),
}


@pytest.mark.parametrize("fault", DIRECTIONS)
def test_a_fault_between_directions_is_detected(
    fault: str, fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, target, old, new = DIRECTIONS[fault]
    wrong = faulty(module, old, new)
    if target is stack:
        monkeypatch.setattr(stack, "ByDirection", wrong.ByDirection)
    else:
        monkeypatch.setattr(
            target, SimpleNamespace(with_options=wrong.with_options, plain=wrong.plain)
        )
    error = AssertionError, ValueError, IndexError
    with pytest.raises(error, match=r": (\d|nan)|shape|broadcast"):
        layer("lstm, six")(fake_cupy)


def test_a_step_loop_of_one_cell_for_both_directions_is_detected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = faulty(stack, "if spec.reverse_cell is None else spec.cells", "if True else ()")
    monkeypatch.setattr(stack, "with_step_loop", wrong.with_step_loop)
    with pytest.raises((AssertionError, ValueError), match=r"tolerance|shape|broadcast"):
        shipped_cells.test_norms_are_measured_in_the_same_backward_pass("gru, four")


def test_a_file_whose_definition_is_not_looked_for_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "DEFINITIONS", ())
    with pytest.raises(ValueError, match=r"pass it with cells=\[lstm\]"):
        shipped_cells.test_definitions_are_those_of_files_and_pickles(shipped.lstm, tmp_path)
