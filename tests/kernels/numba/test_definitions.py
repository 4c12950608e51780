"""Compiled loops of definitions: against torch, against the plain code, and from the cache."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import numpy as np
import pytest

import xprnn
from tests.layers import test_defined_layers as layers
from tests.layers.test_defined_layers import NAMES, Case, Problem, build, check, run
from tests.support.definitions import DEFINITIONS
from tests.support.numba_cases import needs_numba, several
from tests.support.tolerances import assert_close
from tests.unit.test_random_definitions import random_definition

pytestmark = needs_numba


@pytest.fixture(autouse=True)
def compiled_loops(plain_code: None) -> Iterator[None]:
    with xprnn.use_kernels("sequence"):
        yield


plain_code = layers.plain_code  # which this module's fixture replaces


def compare(case: Case, dtype: str) -> None:
    """All results by compiled loops against those of the plain code in float64."""
    layer, exact = build(case, dtype=dtype), build(case, dtype="float64")
    exact.load_state_dict({name: p.astype("float64") for name, p in layer.state_dict().items()})
    problem = Problem(case, exact)
    rounded = copy.copy(problem)
    rounded.x, rounded.doutput = (a.astype(dtype) for a in (problem.x, problem.doutput))
    rounded.states, rounded.dstates = (
        [a.astype(dtype) for a in arrays] for arrays in (problem.states, problem.dstates)
    )
    rounded.inputs = {name: value.astype(dtype) for name, value in problem.inputs.items()}
    with xprnn.use_kernels("reference"):
        expected = run(case, exact, problem)
    actual = run(case, layer, rounded)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert_close(actual[name], values, dtype, f"{case}: {name}")


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_equal_torch(name: str) -> None:
    check(Case(name, layers=2, directions=2))
    check(Case(name, lengths=None, T=33, N=5, H=19))


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str) -> None:
    compare(
        Case(name, layers=2, directions=2, T=20, N=5, H=17, lengths=(20, 0, 9, 1, 14)), "float32"
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [(0, 3), (1, 1), (5, 1), (1, 4), (5, 0)])
def test_edge_sizes(name: str, sizes: tuple[int, int]) -> None:
    T, N = sizes
    case = Case(name, T=T, N=N, lengths=None)
    layer, problem = build(case), Problem(case, build(case))
    with xprnn.use_kernels("reference"):
        expected = run(case, build(case), problem)
    actual = run(case, layer, problem)
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-11, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("name", ["layer_norm_lstm", "zoneout", "slstm"])
def test_bits_do_not_depend_on_threads(name: str) -> None:
    case = Case(name, directions=2, T=9, N=24, H=12, lengths=None)
    problem = Problem(case, build(case))
    one = run(case, build(case), problem)
    with several(3):
        two = run(case, build(case), problem)
    for key, values in one.items():
        np.testing.assert_array_equal(two[key], values, err_msg=key)


@pytest.mark.parametrize("seed", range(30))
def test_random_definitions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = random_definition(random.Random(seed))
    monkeypatch.setitem(DEFINITIONS, "random", definition)
    case = Case("random", T=7, N=3, lengths=None)
    problem = Problem(case, build(case))
    with xprnn.use_kernels("reference"):
        expected = run(case, build(case), problem)
    actual = run(case, build(case), problem)
    for key, values in expected.items():
        np.testing.assert_allclose(actual[key], values, rtol=1e-9, atol=1e-11, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_stepper_equals_the_sequence(name: str) -> None:
    """By one compiled step of all layers."""
    layer = build(Case(name, layers=2)).eval()
    assert "one step: sequence" in layer.stepper(3).explain()
    layers.test_a_stepper_equals_the_sequence(name, xprnn.get_backend("numpy"))


@pytest.mark.parametrize("recompute", [None, 3])
def test_gradient_flow_of_compiled_forward_steps(recompute: int | None) -> None:
    """Backward steps of the plain code, which store what compiled ones add up."""
    case = Case("layer_norm_lstm", layers=2, directions=2)
    layer, problem = build(case, recompute=recompute), Problem(case, build(case))
    with xprnn.use_kernels("reference"):
        expected = xprnn.gradient_flow(layer, problem.x)
    actual = xprnn.gradient_flow(layer, problem.x)
    assert expected.norms.min() > 0
    np.testing.assert_allclose(actual.norms, expected.norms, rtol=1e-10)


def test_one_loop_is_for_all_sizes() -> None:
    """Widths are no part of the source."""
    from xprnn.kernels.interface import Pass
    from xprnn.kernels.numba import generated

    loops = [
        generated.loops_of(DEFINITIONS["zoneout"].cell(H, {}, {}, True), H, np.dtype("float64"))
        for H in (5, 16)
    ]
    first, second = (each.of(Pass.TRAINING, True) for each in loops)
    assert first.function is second.function
    assert not np.array_equal(first.columns, second.columns)
