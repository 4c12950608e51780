"""Everything on "cupy:N" is launched while device N is the current one."""

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
from tests.support.fake_cupy.array import FakeArray
from tests.support.fake_cupy.foreign_arrays import DlpackBackend, DlpackModule
from tests.support.implementations import SelectKernels
from tests.support.on_device import backward, forward, run
from tests.support.operations import PARTS, moved
from tests.support.targets import CELLS, FUNCTIONS, LAYERS, arguments, assert_same, make
from xprnn.backend import Backend
from xprnn.backend import registry as backend_module

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)


class Device:
    """Like `cupy.cuda.Device` with two devices; number 0 is the current one outside `with`."""

    current = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        self._before, Device.current = Device.current, self.id

    def __exit__(self, *error: Any) -> None:
        Device.current = self._before

    def synchronize(self) -> None:
        """There is no pending work."""


class WrongDeviceError(AssertionError):
    """Something was launched on device 0."""


class Watch(fake_cuda.Log):
    """The fake CuPy's log, which raises if device 1 is used while it is not the current one."""

    def __setattr__(self, name: str, value: Any) -> None:
        grows = name in ("kernels", "products", "others") and value > getattr(self, name, 0)
        if grows and Device.current != 1:
            raise WrongDeviceError(name)
        super().__setattr__(name, value)

    def allocate(self, nbytes: int) -> None:
        if Device.current != 1:
            raise WrongDeviceError("memory")
        super().allocate(nbytes)


class SecondDevice(DlpackBackend):
    """The backend "cupy:1", with the fake CuPy."""

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls(f"cupy:{index}", DlpackModule(), int(index))

    @classmethod
    def name_of(cls, array: object) -> str | None:
        return "cupy:1" if isinstance(array, FakeArray) else None

    def to_host(self, array: FakeArray) -> np.ndarray:
        with self.activate():
            if Device.current != 1:
                raise WrongDeviceError("to_host")
            return super().to_host(array)


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend "cupy:1", on which a launch while device 0 is the current one fails."""
    watch = Watch()
    for module in (fake_array, fake_cuda):
        monkeypatch.setattr(module, "LOG", watch)
    monkeypatch.setattr(fake_cuda.CUDA, "Device", Device)
    monkeypatch.setitem(backend_module.BACKENDS, "cupy", SecondDevice)
    backend_module._opened.clear()
    yield xprnn.get_backend("cupy:1")
    backend_module._opened.clear()
    assert Device.current == 0, "the previous current device is not restored"


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("lengths", [None, [4, 0, 2]])
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_and_their_backward(
    name: str, lengths: Any, kernels: str, second: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels(kernels)
    options = {} if name in CELLS else {"lengths": lengths}
    layer_options = (
        {"num_layers": 2, "bidirectional": True, "dropout": 0.5} if name in LAYERS else {}
    )
    subject = make(name, backend="cupy:1", **layer_options)
    host = arguments(subject)
    strided = {n: second.from_host(np.repeat(a, 2, -1))[..., ::2] for n, a in host.items()}
    for inputs in (moved(second, host), strided):  # in new memory, then in memory used before
        forward(subject, inputs, **options)
        if name in FUNCTIONS:  # `backward` would also add to `grads` outside the package
            subject.function_backward(inputs["doutput"], None, subject.caches.pop())
        else:
            backward(subject, inputs)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_other_operation(part: Any, second: Backend, tmp_path: Path) -> None:
    for call in part(second, tmp_path)[1].values():
        call()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_missing_activation_is_detected(
    part: Any, second: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = part(second, tmp_path)[1]
    monkeypatch.setattr(type(second), "activate", lambda self: nullcontext())
    for name, call in calls.items():
        if name != "synchronize":  # a no-op on the fake CuPy
            with pytest.raises(WrongDeviceError):
                call()


# -- copies from the host

SETITEM = FakeArray.__setitem__


def setitem(self: FakeArray, key: Any, value: Any) -> None:
    """Like CuPy, which copies a scalar to the device if the index is an array."""
    if isinstance(key, FakeArray) and not isinstance(value, FakeArray):
        raise TypeError("a scalar is copied to the device")
    SETITEM(self, key, value)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_no_number_is_copied_to_the_device(
    part: Any, second: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeArray, "__setitem__", setitem)
    for call in part(second, tmp_path)[1].values():
        call()


# -- on two GPUs


@pytest.fixture
def devices() -> list[Backend]:
    """Two devices of this machine."""
    try:
        backends = [xprnn.get_backend(name) for name in ("cupy:0", "cupy:1")]
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    return backends


def device_ids(results: Any) -> set[int]:
    return {array.device.id for array in results}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_on_the_second_of_two_gpus(name: str, devices: list[Backend]) -> None:
    results_by_device = []
    for backend in devices:
        subject = make(name, backend=backend.name)
        with backend.activate():  # for the copies that `run` makes
            results = run(subject, moved(backend, arguments(subject)))
        assert device_ids(results) == {backend.device}
        results_by_device.append([backend.to_host(array) for array in results])
    assert_same(*results_by_device)


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_other_operation_on_the_second_of_two_gpus(
    part: Any, devices: list[Backend], tmp_path: Path
) -> None:
    for call in part(devices[1], tmp_path)[1].values():
        call()
    assert devices[0].xp.cuda.runtime.getDevice() == 0


@pytest.mark.gpu
def test_arrays_of_the_other_gpu_are_refused(devices: list[Backend]) -> None:
    layer = make("gru", backend="cupy:1")
    inputs = moved(devices[0], arguments(layer))
    with pytest.raises(TypeError, match=r"x: .* on backend 'cupy:1', got .* on backend 'cupy:0'"):
        layer(inputs["x"])
    converted = xprnn.asarray(inputs["x"], backend="cupy:1")
    assert device_ids(layer(converted)) == {1}
