"""Fixtures: the strict stand-in for CuPy, and the backends that a test runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import forced
import implementations
import pytest
from context_check import ContextCheck
from gpu_report import IMPLEMENTATION, GpuReport
from implementations import parameter
from strict_array import StrictBackend
from strict_cuda import LOG
from strict_sequence import install

import xprnn
from xprnn import backend as backend_module
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels import numba as numba_kernels
from xprnn.kernels.cuda.plan import plan


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ContextCheck(config))
    config.pluginmanager.register(forced)
    config.pluginmanager.register(GpuReport(config, forced=forced.NAME))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is frozen, also of `-m gpu`, unless `-m` names it."""
    if "frozen" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if is_frozen(item)])
        items[:] = [item for item in items if not is_frozen(item)]


def is_frozen(item: pytest.Item) -> bool:
    return item.get_closest_marker("frozen") is not None


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba is not found, as where it is not installed."""

    caches = numba_kernels._lacks, kernels._choose, kernels._whole
    for remembered in caches:
        remembered.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    for remembered in caches:
        remembered.cache_clear()


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend "strict", known to xprnn as long as the test runs.

    Unless something else is asked for, the plain code serves: its results are NumPy's bit for bit.
    """
    monkeypatch.setitem(backend_module.BACKENDS, "strict", StrictBackend)
    if not os.environ.get(kernels.ENVIRONMENT_VARIABLE):
        monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, "reference")
    LOG.clear()
    backend_module._opened.clear()
    yield xprnn.get_backend("strict")
    backend_module._opened.clear()


@pytest.fixture
def device(strict: Backend, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The stand-in on a device of today, with nothing forced, on which all kernels are tried."""
    install(monkeypatch)
    monkeypatch.setitem(kernels.AUTOMATIC, "cuda", kernels.IMPLEMENTATIONS)
    monkeypatch.setenv("XPRNN_KERNELS", "auto")
    plan.cache_clear()  # a test may change what it remembers
    yield strict
    plan.cache_clear()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, and CuPy where there is a usable GPU."""
    return _usable(request.param)


@pytest.fixture(params=["numpy", "strict", pytest.param("cupy", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, strict: Backend) -> Backend:
    """NumPy, the stand-in for CuPy, and CuPy where there is a usable GPU."""
    return strict if request.param == "strict" else _usable(request.param)


def _usable(name: str) -> Backend:
    if reason := _lacks(name):
        pytest.skip(reason)
    return xprnn.get_backend(name)


@cache
def _lacks(name: str) -> str:
    """Why a backend cannot be used, or ""; looked for once, for thousands of tests ask."""
    try:
        xprnn.get_backend(name)
    except xprnn.BackendUnavailableError as error:
        return str(error)
    return ""


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation on which the layers of a test run: "reference", "numba", on CuPy others.

    A test takes it alone, and runs on NumPy, or together with `backend`.
    """
    name = request.param
    if name == "numba" and not implementations.HAS_NUMBA:
        pytest.skip("Numba is not installed: pip install xprnn[numba]")
    request.node.user_properties.append((IMPLEMENTATION, name))
    with implementations.use(name):
        yield name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `backend` and `implementation`, together where a test takes both."""
    marks = {mark.args[0]: mark.args[1] for mark in metafunc.definition.iter_markers("parametrize")}
    taken = {"backend", "implementation"} & {*metafunc.fixturenames}
    if any("implementation" in names for names in marks) or taken <= marks.keys():
        return
    every = implementations.IMPLEMENTATIONS
    if "implementation" not in taken:
        metafunc.parametrize("backend", [parameter(kind) for kind in every], indirect=True)
    elif "backend" not in taken or "backend" in marks:
        chosen = [name for kind in marks.get("backend", ["numpy"]) for name in every[kind]]
        metafunc.parametrize("implementation", chosen, indirect=True)
    else:
        pairs = [parameter(kind, name) for kind in every for name in every[kind]]
        metafunc.parametrize(("backend", "implementation"), pairs, indirect=True)


@pytest.fixture
def reference() -> Iterator[None]:
    """The plain code runs, on any backend: for tests whose subject it is."""
    with xprnn.use_kernels("reference"):
        yield


@pytest.fixture
def select_kernels() -> Iterator[Callable[[str], Any]]:
    """`xprnn.use_kernels`, from a call of this to the end of the test."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(xprnn.use_kernels(name))
