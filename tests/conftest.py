"""Fixtures: the strict stand-in for CuPy, and the backends that a test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from strict_array import StrictBackend

import xprnn
from xprnn import backend as backend_module
from xprnn.backend import Backend


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend "strict", known to xprnn as long as the test runs."""
    monkeypatch.setitem(backend_module.BACKENDS, "strict", StrictBackend)
    backend_module._open.cache_clear()
    yield xprnn.get_backend("strict")
    backend_module._open.cache_clear()


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """NumPy, and CuPy where there is a usable GPU."""
    try:
        return xprnn.get_backend(request.param)
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
