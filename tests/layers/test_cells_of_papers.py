"""The cells of papers that the gallery shows, against steps written in torch from the papers.

`test_defined_layers.py` runs the same definitions through everything else that layers do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import xprnn
from tests.layers.test_defined_layers import Case, Problem, assert_equal, build, by_torch, run
from tests.support import written_cells as written
from tests.support.definitions import PAPERS
from xprnn.backend import Backend


@pytest.fixture(autouse=True)
def plain_code() -> Iterator[None]:
    """The reference of all other code, which is compiled for each cell."""
    with xprnn.use_kernels("reference"):
        yield


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_equal_autograd(name: str, any_backend: Backend) -> None:
    case = Case(name, layers=2, directions=2)
    for each in (case, replace(case, lengths=None, bias=False, states=False, batch_first=True)):
        layer = build(each, any_backend.name)
        problem = Problem(each, layer)
        expected = by_torch(each, layer, problem, getattr(written, name))
        assert_equal(run(each, layer, problem), expected)


@pytest.mark.parametrize("name", sorted(PAPERS))
@pytest.mark.parametrize("sizes", [{"T": 1}, {"N": 1}, {"H": 1}], ids=str)
def test_edge_sizes(name: str, sizes: dict[str, int]) -> None:
    case = Case(name, layers=2, directions=2, lengths=None, **sizes)
    layer = build(case)
    problem = Problem(case, layer)
    expected = by_torch(case, layer, problem, getattr(written, name))
    assert_equal(run(case, layer, problem), expected)


@pytest.mark.parametrize("name", sorted(PAPERS))
def test_a_written_step_with_a_fault_differs(name: str) -> None:
    """The comparison sees a parameter, a state or a mask that is not as it should be."""
    case = Case(name)
    layer = build(case)
    problem = Problem(case, layer)
    results, step = run(case, layer, problem), getattr(written, name)

    def faulty(own: Any, x: Any, states: Any, *rest: Any) -> Any:
        first, *others = states
        return step(own, x, (first * 1.001, *others), *rest)

    with pytest.raises(AssertionError, match=r": \d"):
        assert_equal(results, by_torch(case, layer, problem, faulty))
