"""A long run needs no more memory than a short one, and long sequences run.

Tracing allocations makes a call five times slower. So only the beginning and the end of a long
run are traced; in between Python's own count of small blocks is compared: an array or any other
object left behind is at least one of them. Growth that is not an object of its own, such as that
of a buffer, is visible in the traced ends.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.targets import (
    CELLS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    backward,
    forward,
    make,
)
from tests.support.tolerances import assert_close

LIMIT = 64_000  # bytes
BLOCK = 512  # bytes, the largest block in Python's count


def traced(step: Callable[[], Any], count: int, warm: int = 1) -> int:
    """The bytes by which memory grows over `count` calls after `warm` ones."""
    tracemalloc.start()
    try:
        for _ in range(warm):
            step()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            step()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def counted(step: Callable[[], Any], count: int) -> int:
    """The blocks by which memory grows over `count` calls."""
    before = sys.getallocatedblocks()
    for _ in range(count):
        step()
    return sys.getallocatedblocks() - before


def check_growth(step: Callable[[], Any], count: int, window: int) -> None:
    """Fail if `count` calls after the first grow by LIMIT; `window` are traced at each end."""
    step()
    first = traced(step, window)
    assert first < LIMIT, f"{first} bytes in the first {window} calls"
    gc.collect()  # it empties CPython's free lists, which the next calls fill again
    counted(step, window)
    blocks = counted(step, count - 3 * window)
    assert blocks * BLOCK < LIMIT, f"{blocks} blocks in {count - 3 * window} calls"
    last = traced(step, window)
    assert last * count / window < LIMIT, f"{last} bytes in the last {window} calls"


def stepper(name: str) -> tuple[Any, Callable[[], Any]]:
    """A cell, and a call that feeds it its own state."""
    cell = make(name, 2, 2).eval()
    x, state = np.ones((1, 2)), [cell(np.ones((1, 2)))]

    def step() -> None:
        state[0] = cell(x, state[0])

    return cell, step


def test_a_million_steps_of_a_cell() -> None:
    check_growth(stepper("rnn_tanh_cell")[1], 1_000_000, window=5_000)


def test_a_thousand_calls_of_a_layer_with_a_thousand_steps() -> None:
    layer = make("rnn_tanh", 2, 2).eval()
    x = np.ones((1000, 1, 2))
    check_growth(lambda: layer(x), 1_000, window=30)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_calls_leave_nothing_behind(name: str) -> None:
    """In train mode, with a backward per call, and in eval mode: not one object per call."""
    subject = make(name, 2, 2)
    inputs = arguments(subject)

    def cycle() -> None:
        forward(subject, inputs)
        backward(subject, inputs)

    smallest = sys.getsizeof(object())
    assert traced(cycle, 200, warm=200) < 200 * smallest
    subject.eval()
    assert traced(lambda: forward(subject, inputs), 200, warm=200) < 200 * smallest


@pytest.mark.parametrize("leak", ["record", "array", "bytes"])
def test_a_leak_is_detected(leak: str) -> None:
    cell, step = stepper("rnn_tanh_cell")
    if leak == "record":  # recorded calls without a backward are a leak by design
        cell.train()
    kept: list[np.ndarray] = []
    buffer = bytearray()

    def leaking() -> None:
        step()
        if leak == "array":
            kept.append(np.empty(0))
        if leak == "bytes":
            buffer.extend(b"x" * 16)

    with pytest.raises(AssertionError, match=r"bytes|blocks"):
        check_growth(leaking, 3_000, window=500)


# -- long sequences

T, CHUNK = 100_000, 12_500


@pytest.mark.parametrize("name", ["rnn_tanh", "lstm"])
def test_a_hundred_thousand_steps(name: str) -> None:
    """Forward and backward equal shorter calls, each started from the end of the previous one."""
    single, parts = make(name, 2, 3), make(name, 2, 3)
    inputs = arguments(single, T, 1)
    output, final = forward(single, inputs)
    dx, dinitial = backward(single, inputs)

    names = {"rnn_tanh": ("h",), "lstm": ("h", "c")}[name]
    state = {f"{n}0": inputs[f"{n}0"] for n in names}
    pieces = []
    starts = range(0, T, CHUNK)
    for start in starts:
        piece, end = forward(parts, {"x": inputs["x"][start : start + CHUNK], **state})
        pieces.append(piece)
        state = dict(zip(state, arrays(end), strict=True))
    assert_same(np.concatenate(pieces), output)
    assert_same(list(state.values()), final)

    dpieces = []
    dstate = {f"d{n}_n": inputs[f"d{n}_n"] for n in names}
    for start in reversed(starts):
        doutput = inputs["doutput"][start : start + CHUNK]
        dpiece, carried = backward(parts, {"doutput": doutput, **dstate})
        dpieces.append(dpiece)
        dstate = dict(zip(dstate, arrays(carried), strict=True))
    assert_same(np.concatenate(dpieces[::-1]), dx)
    assert_same(list(dstate.values()), dinitial)
    for parameter, grad in single.grads.items():  # sums in another order
        assert_close(parts.grads[parameter], grad, "float64", parameter)


def test_a_long_row_beside_a_short_one() -> None:
    layer, lengths = make("rnn_tanh", 2, 3, bidirectional=True), [7, T]
    inputs = arguments(layer, T, 2)
    output, h_n = forward(layer, inputs, lengths=lengths)
    dx, dh0 = backward(layer, inputs)
    for row, length in enumerate(lengths):
        one = {
            n: a[:length, row] if n in ("x", "doutput") else a[:, row] for n, a in inputs.items()
        }
        alone, end = forward(layer, one)
        dalone, dstart = backward(layer, one)
        assert_close(output[:length, row], alone, "float64", "output")
        assert_close(h_n[:, row], end, "float64", "h_n")
        assert_close(dx[:length, row], dalone, "float64", "dx")
        assert_close(dh0[:, row], dstart, "float64", "dh0")
