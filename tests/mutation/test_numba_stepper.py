"""Faults injected into the stepper's compiled step: its tests must detect each of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.numba import test_stepper as by_numba
from tests.layers import test_stepper_streams as in_streams
from tests.support.cases import LAYERS, Case, draw
from tests.support.numba_cases import faulty, needs_numba, uncached
from tests.support.streaming import assert_streams, assert_streams_apart, make, stream

pytestmark = needs_numba

compiled = by_numba.compiled

FAULTS = {
    "x of the layer below's last step": ("row if k == 0 else next_states[0][k - 1]",
                                         "row if k == 0 else states[0][k - 1]"),
    "one layer's weights for all": ("panels_in if k == 0 else panels_up[k - 1]",
                                    "panels_in if k == 0 else panels_up[0]"),
    "one layer's recurrent weights for all": ("_items(weights, k)", "_items(weights, 0)"),
    "one layer's vectors for all": ("_items(vectors, k)", "_items(vectors, 0)"),
    "one layer's bias for all": ("product(below, panels, bias[k], gx)",
                                 "product(below, panels, bias[0], gx)"),
    "the first layer's h given": ("copy_leading(next_states[0][layers - 1], out)",
                                  "copy_leading(next_states[0][0], out)"),
    "sides exchanged": ("x, now, after, out)", "x, after, now, out)"),
    "no bias of the input side": (".reshape(-1)[: both.size] = both", ".reshape(-1)[:0] = 0"),
    "weights packed once": ("        for k, weights in enumerate(self._weights):\n",
                            "        if old:\n            return old\n"
                            "        for k, weights in enumerate(self._weights):\n"),
    "matrices that are not packed": ("self._pack(loops.matrix(weights, each), target[k])", "pass"),
    "no recurrent bias of n": ("values[k] = loops.vector(weights, name)", "pass"),
}  # fmt: skip
SHOWN_BY = {"matrices that are not packed": "gru_reset_before"}


def check(cell: str) -> None:
    """What passes without a fault: three layers by value, before and after a write."""
    case = Case(cell, layers=3, N=3, I=5, H=33)
    layer, other = make(case), make(case)
    assert_streams(case, layer)
    stepper, x = layer.stepper(3), draw(case).x
    stream(stepper, x)
    for one in (layer, other):
        with one.writable() as flat:
            flat *= 0.5
    stepper.reset()
    expected, _ = other(x)
    np.testing.assert_allclose(stream(stepper, x), expected, rtol=1e-11, err_msg="relative error")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_step_shows(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xprnn.kernels.numba import step

    cell = SHOWN_BY.get(fault, "gru")
    check(cell)
    broken = faulty(step, FAULTS[fault])
    vars(broken)["compile_for"] = uncached
    monkeypatch.setattr(step, "FusedStep", broken.FusedStep)
    with pytest.raises(AssertionError, match=r"relative error|not finite"):
        check(cell)


@pytest.mark.parametrize("cell", LAYERS)
def test_rows_that_do_not_wait_are_detected(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: waiting streams advance too."""
    from xprnn.engine.step import StepExecutor

    run = StepExecutor.run
    monkeypatch.setattr(
        StepExecutor, "run", lambda self, side, x, waiting, *rest: run(self, side, x, None, *rest)
    )
    with pytest.raises(AssertionError):
        in_streams.test_waiting_rows_keep_their_bits(cell, [0, 2], by_numba.NUMPY)
    case = Case(cell, layers=2)
    with pytest.raises(AssertionError):
        assert_streams_apart(case, make(case))
