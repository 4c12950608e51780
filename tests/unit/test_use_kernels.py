"""`use_kernels`: what it forces, where, and that no other thread or task is affected."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import xprnn
from xprnn import kernels


@pytest.fixture(autouse=True)
def nothing_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.requested_name() == "auto"
    monkeypatch.setenv("XPRNN_KERNELS", "")
    assert kernels.requested_name() == "auto"
    monkeypatch.setenv("XPRNN_KERNELS", "sequence")
    assert kernels.requested_name() == "sequence"
    with xprnn.use_kernels("reference") as name:
        assert name == kernels.requested_name() == "reference"
        with xprnn.use_kernels("auto"):
            assert kernels.requested_name() == "auto"
        assert kernels.requested_name() == "reference"
    assert kernels.requested_name() == "sequence"


def test_an_error_ends_the_block() -> None:
    with pytest.raises(KeyError), xprnn.use_kernels("reference"):
        raise KeyError
    assert kernels.requested_name() == "auto"


@pytest.mark.parametrize("name", ["numba", "", "Reference", None, 3])
def test_a_wrong_name(name: object) -> None:
    expected = r"^name: expected auto, reference, pointwise, sequence, wave; got "
    with pytest.raises(ValueError, match=expected), xprnn.use_kernels(name):  # type: ignore[arg-type]
        pytest.fail("the block was entered")
    assert kernels.requested_name() == "auto"


def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPRNN_KERNELS", "fast")
    x, layer = np.ones((3, 2, 3), np.float32), xprnn.GRU(3, 4, seed=0)
    with pytest.raises(ValueError, match=r"^XPRNN_KERNELS: expected auto, .*; got 'fast'"):
        layer(x)
    with xprnn.use_kernels("reference"):
        layer(x)


def test_it_decides_what_runs() -> None:
    layer = xprnn.GRU(3, 4, seed=0)
    with xprnn.use_kernels("reference"):
        assert layer.explain((5, 2, 3)).splitlines()[0].endswith(": reference")
    wave = pytest.raises(xprnn.KernelUnavailableError)
    with wave, xprnn.use_kernels("wave"):
        xprnn.GRU(3, 4, num_layers=2, bidirectional=True, seed=0)(np.ones((3, 2, 3), np.float32))


def test_threads() -> None:
    """Each thread requests another implementation, and all are inside their blocks at once."""
    names = ("auto", "reference", "pointwise", "sequence")
    barrier = threading.Barrier(len(names))

    def request(name: str) -> list[str]:
        seen = [kernels.requested_name()]
        for _ in range(50):
            with xprnn.use_kernels(name):
                barrier.wait(10)
                seen.append(kernels.requested_name())
                barrier.wait(10)
            seen.append(kernels.requested_name())
        return seen

    with xprnn.use_kernels("wave"), ThreadPoolExecutor(len(names)) as pool:
        found = list(pool.map(request, names))
        assert kernels.requested_name() == "wave"
    # a new thread begins with the default, as with `use_backend`
    assert found == [["auto", *[name, "auto"] * 50] for name in names]


def test_tasks() -> None:
    """A task sees the request of the code that created it, and its own; not that of others."""

    async def request(name: str) -> list[str]:
        seen = [kernels.requested_name()]
        with xprnn.use_kernels(name):
            for _ in range(5):
                await asyncio.sleep(0)
                seen.append(kernels.requested_name())
        return [*seen, kernels.requested_name()]

    async def everything() -> list[list[str]]:
        with xprnn.use_kernels("wave"):
            return await asyncio.gather(request("reference"), request("sequence"))

    expected = [["wave", *[name] * 5, "wave"] for name in ("reference", "sequence")]
    assert asyncio.run(everything()) == expected
    assert kernels.requested_name() == "auto"


def test_verify_writes_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        pytest.fail(f"the environment was written: {arguments}")

    with monkeypatch.context() as patch:
        patch.setattr(type(os.environ), "__setitem__", refuse)
        patch.setattr(type(os.environ), "__delitem__", refuse)
        assert xprnn.verify(xprnn.RNN(2, 3, seed=0), (3, 2, 2)).ok
