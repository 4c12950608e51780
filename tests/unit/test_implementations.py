"""The fixture `implementation`: what runs is what it says, in threads too, and covering subsets."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from tests.support.cases import CELLS, LAYERS, Case, build, draw, product, run
from tests.support.implementations import Pool, assert_selected, covering, new_thread, use
from tests.support.targets import make
from xprnn.cells import CELLS as PLAIN
from xprnn.kernels import requested_name

MATRIX = tuple(
    product(
        cell=LAYERS,
        layers=(1, 2, 3),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        dtype=("float64", "float32"),
        lengths=("full", "ragged"),
    )
)


class PlainCodeError(Exception):
    """The plain code of a cell was called."""


@pytest.fixture
def no_plain_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PlainCodeError

    for cell in PLAIN.values():
        for name in ("forward", "backward"):
            monkeypatch.setitem(vars(cell), name, fail)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_run_on_it(name: str, dtype: str, implementation: str, no_plain_code: None) -> None:
    case = Case(name, layers=2, directions=2, dtype=dtype, lengths="ragged")
    layer, problem = build(case), draw(case)
    assert_selected(implementation, layer, case.T, case.N)
    if implementation == "reference":
        with pytest.raises(PlainCodeError):
            run(layer, case, problem)
    else:
        run(layer, case, problem)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CELLS)
def test_cells_run_on_it(
    name: str, training: bool, implementation: str, no_plain_code: None
) -> None:
    cell, x = make(f"{name}_cell"), np.ones((2, 3))
    cell.train() if training else cell.eval()
    if implementation == "reference":
        with pytest.raises(PlainCodeError):
            cell(x)
    else:
        cell(x)


def test_another_implementation_is_found() -> None:
    pytest.importorskip("numba")
    layer = build(Case("gru"))
    with use("reference"), pytest.raises(AssertionError, match="reference"):
        assert_selected("numba", layer, 6, 4)
    with use("numba"):
        assert_selected("numba", layer, 6, 4)
        assert_selected("numba", layer, 1, 4)


def test_threads_take_it_along(implementation: str) -> None:
    expected, found = requested_name(), list[str]()
    assert expected == {"reference": "reference", "numba": "auto"}[implementation]
    with use("pointwise"), Pool(2) as pool:
        other = new_thread(lambda: found.append(requested_name()))
        assert [*pool.map(lambda _: requested_name(), range(4))] == ["pointwise"] * 4
    other.start()
    other.join()
    assert found == ["pointwise"]
    assert requested_name() == expected


def test_the_last_request_counts_and_all_end(select_kernels: Any, fake_cupy: Any) -> None:
    assert requested_name() == "reference"
    select_kernels("numba")
    assert requested_name() == "auto"


@pytest.mark.parametrize("strength", [2, 3])
def test_a_covering_subset_takes_every_combination(strength: int) -> None:
    subset = covering(MATRIX, strength)
    assert subset <= {*MATRIX} and len(subset) < len(MATRIX) / 5

    def taken(cases: Any) -> set[Any]:
        return {each for case in cases for each in combinations(vars(case).items(), strength)}

    assert taken(subset) == taken(MATRIX)
