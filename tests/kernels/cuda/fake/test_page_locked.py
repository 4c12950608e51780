"""Page-locked memory of the caller, which CuPy reads later: as the CuPy here does, on the host."""

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
    """As CuPy 14.2: from memory in `locked` it copies when the device comes to it."""

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
        there = np.full_like(array, np.nan)

        def copy() -> None:
            there[...] = array

        if self._attributes(array.ctypes.data).type and array.flags.forc:
            self._waiting.append(copy)
        else:
            copy()
        return there

    def run(self) -> None:
        """The device comes to all that it was given."""
        for copy in self._waiting:
            copy()
        self._waiting = []


@pytest.fixture
def cupy() -> LateCupy:
    return LateCupy()


def changed_after(cupy: LateCupy, move: Callable[[np.ndarray], Any], array: np.ndarray) -> Any:
    """What is on the device in the end, where the array is changed as soon as it is moved."""
    moved = move(array)
    array[...] = -1.0
    cupy.run()
    return moved


@pytest.mark.parametrize("view", [np.s_[:], np.s_[1:], np.s_[:, ::2], np.s_[:0]])
@pytest.mark.parametrize("locked", [True, False])
def test_the_array_may_be_changed_at_once(cupy: LateCupy, locked: bool, view: Any) -> None:
    whole = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    cupy.locked += [whole] * locked
    expected, backend = whole[view].copy(), CupyBackend("cupy:0", cupy, 0)
    found = changed_after(cupy, backend.from_host, whole[view])
    np.testing.assert_array_equal(found, expected)


def test_so_it_may_when_it_goes_by_asarray(cupy: LateCupy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend_module._opened, "cupy", CupyBackend("cupy:0", cupy, 0))
    array = np.arange(3.0)
    cupy.locked.append(array)
    found = changed_after(cupy, lambda a: backend_module.asarray(a, backend="cupy"), array)
    np.testing.assert_array_equal(found, [0.0, 1.0, 2.0])
