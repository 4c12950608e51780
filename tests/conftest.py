"""Fixtures: the strict stand-in for CuPy, and the backends that a test runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache

import forced
import pytest
from context_check import ContextCheck
from gpu_report import IMPLEMENTATION, GpuReport
from strict_array import StrictBackend
from strict_cuda import LOG
from strict_sequence import install

import xprnn
from xprnn import backend as backend_module
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels import numba as numba_kernels
from xprnn.kernels.cuda.plan import plan

SERVING = {
    "numpy": ("reference",),
    "cupy": (forced.NAME,) if forced.NAME else ("reference", "pointwise"),
}


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


@pytest.fixture(autouse=True)
def plain_code_on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean the plain code by "numpy", whether Numba is installed or not, unless they ask."""
    monkeypatch.setitem(kernels.AUTOMATIC, "numba", ("reference",))


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Numba is not found, as where it is not installed."""

    def forget() -> None:
        numba_kernels._lacks.cache_clear()
        kernels.forget_plans()

    forget()
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    forget()


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


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
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
def implementations(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[str]:
    """Who serves on the backend, one after the other: each is forced while it has its turn."""

    def take_turns() -> Iterator[str]:
        for name in SERVING[backend.kind]:
            monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, name)
            request.node.user_properties.append((IMPLEMENTATION, name))
            yield name

    return take_turns()


@pytest.fixture(
    params=[
        pytest.param(
            (kind, name), marks=pytest.mark.gpu if kind == "cupy" else (), id=f"{kind}-{name}"
        )
        for kind, names in SERVING.items()
        for name in names
    ]
)
def served(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """A backend and one implementation, forced: each that serves on it."""
    kind, name = request.param
    monkeypatch.setenv(kernels.ENVIRONMENT_VARIABLE, name)
    request.node.user_properties.append((IMPLEMENTATION, name))
    return _usable(kind)
