"""Fixtures: the fake CuPy, and the backends that a test runs on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

import xprnn
from tests.support import compile_once, forced_kernels, implementations, tiers
from tests.support.context_check import ContextCheck
from tests.support.fake_cupy.array import FakeCupyBackend
from tests.support.fake_cupy.cuda import LOG
from tests.support.fake_cupy.sequence import install
from tests.support.gpu_report import IMPLEMENTATION, GpuReport
from tests.support.implementations import SelectKernels, parameter, use
from tests.support.qualifications import Qualify
from xprnn import kernels
from xprnn.backend import Backend
from xprnn.backend import registry as backend_module
from xprnn.kernels.cuda.plan import plan
from xprnn.kernels.numba import package as numba_kernels

# What is measured on this machine must not decide what the tests run, nor in their subprocesses.
os.environ["XPRNN_QUALIFIED"] = "off"

collect_ignore = ["support/write_parent_files.py"]  # runs as a script, beside an older commit


def pytest_configure(config: pytest.Config) -> None:
    tiers.check_expression(config)
    tiers.run_what_is_named(config)
    config.pluginmanager.register(ContextCheck(config))
    config.pluginmanager.register(compile_once)
    config.pluginmanager.register(forced_kernels)
    config.pluginmanager.register(GpuReport(config, forced=forced_kernels.NAME))
    config.pluginmanager.register(tiers.Required(config))


def pytest_addoption(parser: pytest.Parser) -> None:
    tiers.add_option(parser)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not import files of other tiers if only the fast tier runs."""
    return tiers.is_left_out(collection_path, config) or None


@pytest.hookimpl(tryfirst=True)  # before pytest applies `-m`
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by folder; deselect those that need a device or are frozen, unless named."""
    tiers.check_functions(items, config)
    tiers.mark(items)
    selected = [
        item for item in items if tiers.is_wanted(item, config, lambda: _why_unavailable("cupy"))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*selected}])
    items[:] = selected


def pytest_runtest_setup(item: pytest.Item) -> None:
    tiers.skip_without_compiler(item)


@pytest.fixture
def select_kernels() -> Iterator[SelectKernels]:
    """Like `xprnn.use_kernels`, but in effect until the end of the test.

    The fixtures below select kernels with it, so that selections end in reverse order.
    """
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(use(name))


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Numba appear not to be installed."""

    def forget() -> None:
        numba_kernels._numba_unusable.cache_clear()
        kernels.forget_plans()

    forget()
    monkeypatch.setitem(sys.modules, "numba", None)
    yield
    forget()


@pytest.fixture
def fake_cupy(monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels) -> Iterator[Backend]:
    """The backend "fake_cupy", registered until the end of the test.

    It runs the plain code, with NumPy's results bit for bit, unless the test selects other kernels.
    """
    monkeypatch.setitem(backend_module.BACKENDS, "fake_cupy", FakeCupyBackend)
    select_kernels("reference")
    LOG.clear()
    backend_module._opened.clear()
    yield xprnn.get_backend("fake_cupy")
    backend_module._opened.clear()


@pytest.fixture
def device(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> Iterator[Backend]:
    """The fake CuPy with a recent device, where "auto" considers every kernel."""
    install(monkeypatch)
    monkeypatch.setitem(kernels.AUTOMATIC, "cuda", kernels.IMPLEMENTATIONS)
    select_kernels("auto")
    plan.cache_clear()  # a test may change the planner
    yield fake_cupy
    plan.cache_clear()


@pytest.fixture
def qualify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Qualify]:
    """Writes the qualification that "auto" reads until the end of the test."""
    with monkeypatch.context() as patch:
        yield Qualify(tmp_path / "qualification.json", patch)
    kernels.forget_plans()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, and CuPy if there is a usable GPU."""
    return _usable(request.param)


@pytest.fixture(params=["numpy", "fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def any_backend(request: pytest.FixtureRequest, fake_cupy: Backend) -> Backend:
    """NumPy, the fake CuPy, and CuPy if there is a usable GPU."""
    return fake_cupy if request.param == "fake_cupy" else _usable(request.param)


def _usable(name: str) -> Backend:
    if reason := _why_unavailable(name):
        pytest.skip(reason)
    return xprnn.get_backend(name)


@cache
def _why_unavailable(name: str) -> str:
    """Why a backend cannot be used, or ""."""
    try:
        xprnn.get_backend(name)
    except xprnn.BackendUnavailableError as error:
        return str(error)
    return ""


@pytest.fixture
def implementation(request: pytest.FixtureRequest, select_kernels: SelectKernels) -> str:
    """The implementation that runs the layers of a test.

    Without `backend` it is "reference" or "numba", on NumPy; else every one of each backend.
    """
    name: str = request.param
    if name == "numba" and not implementations.HAS_NUMBA:
        pytest.skip("Numba is not installed: pip install xprnn[numba]")
    request.node.user_properties.append((IMPLEMENTATION, name))
    select_kernels(name)
    return name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `backend` and `implementation`, together if a test has both."""
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
def reference(select_kernels: SelectKernels) -> None:
    """Select the plain code on every backend."""
    select_kernels("reference")
