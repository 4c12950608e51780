"""The caller's page-locked memory, which CuPy, and a fake here, reads asynchronously."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.fake_cupy.cuda import Device, get_current_stream
from xprnn.backend import registry as backend_module
from xprnn.backend.cupy import CupyBackend


class LateCupy:
    """Like CuPy 14.2: copies from memory in `locked` are made later, by `run`."""

    def __init__(self) -> None:
        self.locked: list[np.ndarray] = []
        self._waiting: list[Callable[[], None]] = []
        runtime = SimpleNamespace(memoryTypeHost=1, pointerGetAttributes=self._attributes)
        self.cuda = SimpleNamespace(
            Device=Device, get_current_stream=get_current_stream, runtime=runtime
        )

    def _attributes(self, pointer: int) -> SimpleNamespace:
        inside = [
            low <= pointer < high for low, high in map(np.lib.array_utils.byte_bounds, self.locked)
        ]
        return SimpleNamespace(type=int(any(inside)))

    def asarray(self, array: np.ndarray) -> np.ndarray:
        target = np.full_like(array, np.nan)

        def copy() -> None:
            target[...] = array

        if self._attributes(array.ctypes.data).type and array.flags.forc:
            self._waiting.append(copy)
        else:
            copy()
        return target

    def run(self) -> None:
        """Make all pending copies."""
        for copy in self._waiting:
            copy()
        self._waiting = []


@pytest.fixture
def cupy() -> LateCupy:
    return LateCupy()


def changed_after(cupy: LateCupy, move: Callable[[np.ndarray], Any], array: np.ndarray) -> Any:
    """The final array on the device, if the caller changes the array right after the call."""
    moved = move(array)
    array[...] = -1.0
    cupy.run()
    return moved


@pytest.mark.parametrize("view", [np.s_[:], np.s_[1:], np.s_[:, ::2], np.s_[:0]])
@pytest.mark.parametrize("locked", [True, False])
def test_the_array_may_be_changed_after_from_host(cupy: LateCupy, locked: bool, view: Any) -> None:
    base = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    cupy.locked += [base] * locked
    expected, backend = base[view].copy(), CupyBackend("cupy:0", cupy, 0)
    actual = changed_after(cupy, backend.from_host, base[view])
    np.testing.assert_array_equal(actual, expected)


def test_the_array_may_be_changed_after_asarray(
    cupy: LateCupy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend_module._opened, "cupy", CupyBackend("cupy:0", cupy, 0))
    array = np.arange(3.0)
    cupy.locked.append(array)
    actual = changed_after(cupy, lambda a: backend_module.asarray(a, backend="cupy"), array)
    np.testing.assert_array_equal(actual, [0.0, 1.0, 2.0])
