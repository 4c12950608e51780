"""Whatever is launched on "cupy:N" is launched while device N is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy import array as fake_array
from tests.support.fake_cupy import cuda as fake_cuda
from tests.support.fake_cupy.array import StrictArray
from tests.support.fake_cupy.foreign_arrays import BorrowingBackend, BorrowingModule
from tests.support.implementations import SelectKernels
from tests.support.on_device import backward, forward, run
from tests.support.operations import PARTS, moved
from tests.support.targets import CELLS, FUNCTIONS, LAYERS, arguments, assert_same, make
from xprnn.backend import Backend
from xprnn.backend import registry as backend_module

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)


class Device:
    """As `cupy.cuda.Device` where there are two; number 0 is the current one outside of `with`."""

    current = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        self._before, Device.current = Device.current, self.id

    def __exit__(self, *error: Any) -> None:
        Device.current = self._before

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class WrongDeviceError(AssertionError):
    """Something was launched on device 0."""


class Watch(fake_cuda.Log):
    """The stand-in's log, which fails where device 1 is asked for something and is not current."""

    def __setattr__(self, name: str, value: Any) -> None:
        grows = name in ("kernels", "products", "others") and value > getattr(self, name, 0)
        if grows and Device.current != 1:
            raise WrongDeviceError(name)
        super().__setattr__(name, value)

    def allocate(self, nbytes: int) -> None:
        if Device.current != 1:
            raise WrongDeviceError("memory")
        super().allocate(nbytes)


class SecondDevice(BorrowingBackend):
    """The backend "cupy:1", on the stand-in."""

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls(f"cupy:{index}", BorrowingModule(), int(index))

    @classmethod
    def name_of(cls, array: object) -> str | None:
        return "cupy:1" if isinstance(array, StrictArray) else None

    def to_host(self, array: StrictArray) -> np.ndarray:
        with self.activate():
            if Device.current != 1:
                raise WrongDeviceError("to_host")
            return super().to_host(array)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend "cupy:1", where nothing may be launched while device 0 is the current one."""
    watch = Watch()
    for module in (fake_array, fake_cuda):
        monkeypatch.setattr(module, "LOG", watch)
    monkeypatch.setattr(fake_cuda.CUDA, "Device", Device)
    monkeypatch.setitem(backend_module.BACKENDS, "cupy", SecondDevice)
    backend_module._opened.clear()
    yield xprnn.get_backend("cupy:1")
    backend_module._opened.clear()
    assert Device.current == 0, "the device that was current before is not current again"


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_and_their_undoing(
    name: str, lengths: Any, kernels: str, second: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels(kernels)
    options = {} if name in CELLS else {"lengths": lengths}
    wide = {"num_layers": 2, "bidirectional": True, "dropout": 0.5} if name in LAYERS else {}
    subject = make(name, backend="cupy:1", **wide)
    host = arguments(subject)
    strided = {n: second.from_host(np.repeat(a, 2, -1))[..., ::2] for n, a in host.items()}
    for given in (moved(second, host), strided):  # in new memory, and in memory that was used
        forward(subject, given, **options)
        if name in FUNCTIONS:  # whose stand-in for `grads` is the test's own
            subject.undo(given["doutput"], None, subject.caches.pop())
        else:
            backward(subject, given)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_everything_else(part: Any, second: Backend, tmp_path: Path) -> None:
    for call in part(second, tmp_path)[1].values():
        call()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_an_operation_that_forgets_is_found(
    part: Any, second: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = part(second, tmp_path)[1]
    monkeypatch.setattr(type(second), "activate", lambda self: nullcontext())
    for name, call in calls.items():
        if name != "synchronize":  # where the stand-in has nothing to do
            with pytest.raises(WrongDeviceError):
                call()


# -- across the bus

WRITE = StrictArray.__setitem__


def write(self: StrictArray, key: Any, value: Any) -> None:
    """As CuPy, which moves a number to the device where an array of indices says what to write."""
    if isinstance(key, StrictArray) and not isinstance(value, StrictArray):
        raise TypeError("a number crosses the bus")
    WRITE(self, key, value)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_no_number_is_moved(
    part: Any, second: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StrictArray, "__setitem__", write)
    for call in part(second, tmp_path)[1].values():
        call()


# -- on two GPUs


@pytest.fixture
def devices() -> list[Backend]:
    """Two devices of this machine."""
    try:
        found = [xprnn.get_backend(name) for name in ("cupy:0", "cupy:1")]
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    return found


def device_ids(results: Any) -> set[int]:
    return {array.device.id for array in results}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUBJECTS)
def test_on_the_second_of_two_gpus(name: str, devices: list[Backend]) -> None:
    found = []
    for backend in devices:
        subject = make(name, backend=backend.name)
        with backend.activate():  # for what `run` does itself
            results = run(subject, moved(backend, arguments(subject)))
        assert device_ids(results) == {backend.device}
        found.append([backend.to_host(array) for array in results])
    assert_same(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_everything_else_on_the_second_of_two_gpus(
    part: Any, devices: list[Backend], tmp_path: Path
) -> None:
    for call in part(devices[1], tmp_path)[1].values():
        call()
    assert devices[0].xp.cuda.runtime.getDevice() == 0


@pytest.mark.gpu
def test_arrays_of_the_other_gpu_are_refused(devices: list[Backend]) -> None:
    layer = make("gru", backend="cupy:1")
    given = moved(devices[0], arguments(layer))
    with pytest.raises(TypeError, match=r"x: .* on backend 'cupy:1', got .* on backend 'cupy:0'"):
        layer(given["x"])
    moved_over = xprnn.asarray(given["x"], backend="cupy:1")
    assert device_ids(layer(moved_over)) == {1}
