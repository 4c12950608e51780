"""The implementations that tests run on, checks of them, and covering subsets of cases."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from contextvars import copy_context
from itertools import combinations
from threading import Thread
from typing import Any

import pytest

import xprnn
from tests.support import forced_kernels
from tests.support.cases import Case
from tests.support.targets import arrays, assert_same
from tests.support.tolerances import assert_close
from xprnn.kernels.numba.table import SEQUENCE

SelectKernels = Callable[[str], Any]  # of the fixture `select_kernels`
NUMPY = ("reference", "numba")
CUPY = (forced_kernels.NAME,) if forced_kernels.NAME else ("reference", "pointwise")
IMPLEMENTATIONS = {"numpy": NUMPY, "cupy": CUPY}  # by kind of backend
HAS_NUMBA = importlib.util.find_spec("numba") is not None
FEW_STEPS = 8  # rows of all steps: for fewer, packing the weights does not pay


def use(implementation: str) -> AbstractContextManager[Any]:
    """Run layers on an implementation inside the block.

    "numba" is the default of users with Numba installed: it forces no kernels.
    """
    return xprnn.use_kernels("auto" if implementation == "numba" else implementation)


def parameter(kind: str, *implementation: str, case: Case | None = None, marks: Any = ()) -> Any:
    """A pytest parameter of an optional case, a kind of backend and an optional implementation."""
    values = (kind, *implementation) if case is None else (case, kind, *implementation)
    marks = [*marks, pytest.mark.gpu] if kind == "cupy" else [*marks]
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def each(cases: Iterable[Case], backend: bool = True) -> pytest.MarkDecorator:
    """Parametrize `case`, `backend` and `implementation`; without `backend`, on NumPy alone.

    On "numba" the cases outside a covering subset belong to the tier "exhaustive".
    """
    cases = [*cases]
    subset = covering(cases)

    def tier(name: str, case: Case) -> list[pytest.MarkDecorator]:
        return [pytest.mark.exhaustive] if name == "numba" and case not in subset else []

    names = ("case", "backend", "implementation") if backend else ("case", "implementation")
    pairs = [(kind, name) for kind in IMPLEMENTATIONS for name in IMPLEMENTATIONS[kind]]
    pairs = pairs if backend else [(name,) for name in NUMPY]
    parameters = [
        parameter(*pair, case=case, marks=tier(pair[-1], case)) for pair in pairs for case in cases
    ]
    return pytest.mark.parametrize(names, parameters, indirect=names[1:])


def covering(cases: Iterable[Case], strength: int = 3) -> set[Case]:
    """A subset in which any three options have all combinations of values as in `cases`.

    It is chosen in one pass, in an order that depends only on the cases.
    """
    cases = [*cases]
    varying = [name for name in vars(cases[0]) if len({getattr(case, name) for case in cases}) > 1]
    subset, covered = set(), set()
    for case in sorted(cases, key=lambda case: case.seed):
        values = [(name, getattr(case, name)) for name in varying]
        new = {*combinations(values, strength)} - covered
        if new:
            subset.add(case)
            covered |= new
    return subset


def assert_selected(implementation: str, layer: Any, T: int, N: int) -> None:
    """Fail unless `explain` says that T steps of N rows run on the implementation.

    On "numba" the sequence is one compiled call if there is one for the cell and packing the
    weights pays; else the pointwise ops are compiled.
    """
    expected = implementation
    if implementation == "numba":
        compiled = layer._spec.cell.name in SEQUENCE and T > 1 and N * T >= FEW_STEPS
        expected = "sequence" if compiled else "pointwise"
    shape = (N, T) if layer.options["batch_first"] else (T, N)
    selected = layer.explain((*shape, layer.options["input_size"])).splitlines()[0]
    assert selected.endswith(f": {expected}"), selected


def assert_equivalent(implementation: str, actual: Any, expected: Any) -> None:
    """Fail unless two nests of float64 arrays have the same bits, or are close on "numba".

    With Numba, calls that are equal in the plain code may run different kernels.
    """
    if implementation == "reference":
        assert_same(actual, expected)
    for k, (one, other) in enumerate(zip(arrays(actual), arrays(expected), strict=True)):
        assert_close(one, other, "float64", f"array {k}")


# -- threads, which do not inherit the selected kernels


def new_thread(target: Callable[..., Any], *args: Any) -> Thread:
    """A thread with the kernels that are selected where it is created."""
    return Thread(target=copy_context().run, args=(target, *args))


class Pool(ThreadPoolExecutor):
    """Threads that run calls with the kernels that are selected where a call is submitted."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        return super().submit(copy_context().run, function, *args, **options)
