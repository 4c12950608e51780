"""The selected backend, the valid names, and conversions between backends."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest

import xprnn
from tests.support.targets import arguments, assert_same, forward, make, normal
from xprnn.backend import Backend, backend_of
from xprnn.backend import registry as backend_module


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clear the cached choices before and after each test."""
    monkeypatch.delenv("XPRNN_BACKEND", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    backend_module._opened.clear()
    for chosen in (backend_module._auto, backend_module.auto_choice):
        chosen.cache_clear()


def layer_backend(**options: Any) -> str:
    """The backend of a new layer."""
    return str(xprnn.GRU(3, 5, seed=0, **options).backend.name)


# -- precedence


def test_argument_then_block_then_environment_then_numpy(
    fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layer_backend() == "numpy"
    monkeypatch.setenv("XPRNN_BACKEND", "fake_cupy")
    assert layer_backend() == "fake_cupy"
    assert layer_backend(backend="numpy") == "numpy"
    with xprnn.use_backend("numpy"):
        assert layer_backend() == "numpy"
        assert layer_backend(backend="fake_cupy") == "fake_cupy"
        assert xprnn.get_backend() is xprnn.get_backend("numpy")
    assert layer_backend() == "fake_cupy"
    monkeypatch.setenv("XPRNN_BACKEND", "")
    assert layer_backend() == "numpy"
    with xprnn.use_backend("fake_cupy"):
        assert layer_backend() == "fake_cupy"
    monkeypatch.setenv("XPRNN_BACKEND", "numpy")
    with xprnn.use_backend("fake_cupy"):
        assert layer_backend() == "fake_cupy"


def test_blocks_nest_and_end_with_errors(fake_cupy: Any) -> None:
    with xprnn.use_backend("fake_cupy") as outer:
        assert outer is fake_cupy
        with xprnn.use_backend("numpy") as inner:
            assert inner.name == layer_backend() == "numpy"
        assert layer_backend() == "fake_cupy"
        with pytest.raises(ZeroDivisionError), xprnn.use_backend("numpy"):
            raise ZeroDivisionError
        assert layer_backend() == "fake_cupy"
        with pytest.raises(ValueError), xprnn.use_backend("tpu"):
            pytest.fail("the block was entered")
        assert layer_backend() == "fake_cupy"
    assert layer_backend() == "numpy"


def test_a_block_applies_to_its_own_thread(fake_cupy: Any) -> None:
    backends = []
    with xprnn.use_backend("fake_cupy"):
        other = threading.Thread(target=lambda: backends.append(layer_backend()))
        other.start()
        other.join()
    assert backends == ["numpy"]


def test_a_layer_stays_on_the_backend_it_was_built_on(fake_cupy: Any) -> None:
    layer = make("gru")
    inputs = arguments(layer)
    expected = forward(layer, inputs)
    with xprnn.use_backend("fake_cupy"):
        assert_same(forward(layer, inputs), expected)
        assert pickle.loads(pickle.dumps(layer)).backend.name == "numpy"


# -- devices


class Slow(Backend):
    """A device that is opened only when as many threads open it as the barrier waits for."""

    barrier = threading.Barrier(1)

    @classmethod
    def open(cls, index: str) -> Backend:
        cls.barrier.wait(20)
        return cls(f"slow:{index or 0}")


class LastWins(dict[str, Backend]):
    """The injected fault: the last backend replaces the first one."""

    def setdefault(self, name: str, backend: Backend) -> Backend:  # type: ignore[override]
        self[name] = backend
        return backend


@pytest.mark.parametrize("names", [("slow:0", "slow:0"), ("slow", "slow:0")])
@pytest.mark.parametrize("opened", [dict, LastWins])
def test_threads_that_open_a_device_at_once_get_one_object(
    opened: type[dict[str, Backend]], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "slow", Slow)
    monkeypatch.setattr(Slow, "barrier", threading.Barrier(2))
    monkeypatch.setattr(backend_module, "_opened", opened())
    with ThreadPoolExecutor(2) as threads:
        backends = set(threads.map(xprnn.get_backend, names))
    assert len(backends) == (2 if opened is LastWins else 1)
    if opened is dict:
        assert {xprnn.get_backend(name) for name in names} == backends


def test_names_of_one_device_have_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "slow", Slow)
    first = xprnn.get_backend("slow:0")
    assert xprnn.get_backend("slow") is xprnn.get_backend("slow:0") is first
    assert xprnn.get_backend("slow:1") is not first


class Failing(Backend):
    """A device whose work fails, except on number 2."""

    waited: ClassVar[list[str]] = []

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls(f"failing:{index}")

    def synchronize(self) -> None:
        self.waited.append(self.name)
        if self.name != "failing:2":
            raise xprnn.KernelStoppedError(f"{self.name} timed out")


def test_every_device_is_waited_for_before_an_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "failing", Failing)
    monkeypatch.setattr(Failing, "waited", [])
    names = [xprnn.get_backend(f"failing:{number}").name for number in (1, 2, 3)]
    with pytest.raises(xprnn.KernelStoppedError) as caught:
        xprnn.synchronize()
    assert str(caught.value) == "failing:1 timed out"
    assert Failing.waited == names
    assert caught.value.__notes__ == ["KernelStoppedError: failing:3 timed out"]


def test_a_device_may_be_opened_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "failing", Failing)
    one = xprnn.get_backend("failing:2")
    monkeypatch.setattr(one, "synchronize", lambda: xprnn.get_backend("failing:1"))
    xprnn.synchronize()


# -- names


@pytest.mark.parametrize("name", ["tpu", "", "NumPy", "numpy:0", "numpy:", "auto:0", "cuda", ":"])
def test_unknown_backend_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for use in (
        xprnn.get_backend,
        lambda name: xprnn.use_backend(name).__enter__(),
        lambda name: xprnn.GRU(3, 5, backend=name),
        lambda name: xprnn.asarray([1.0], backend=name),
    ):
        with pytest.raises(ValueError, match=f"backend: .*{name!r}"):
            use(name)
    if name:
        monkeypatch.setenv("XPRNN_BACKEND", name)
        with pytest.raises(ValueError, match=f"backend: .*{name!r}"):
            xprnn.GRU(3, 5)


@pytest.mark.parametrize("name", ["cupy:x", "cupy:-1", "cupy:", "cupy:0:1", "cupy: 0", "cupy:1.0"])
def test_invalid_device_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend: expected .*got {name!r}"):
        xprnn.get_backend(name)


@pytest.mark.parametrize("name", [3, b"numpy", np, True, ["numpy"]])
def test_a_backend_name_must_be_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match="backend: expected a string or None"):
        xprnn.get_backend(name)


# -- conversions


def test_asarray_returns_an_array_that_needs_no_conversion() -> None:
    array = normal(0, 2, 3)
    assert xprnn.asarray(array) is array
    assert xprnn.asarray(array, dtype="float64") is array
    assert xprnn.to_numpy(array) is array


@pytest.mark.parametrize("dtype", [None, "float32", "float64", np.float16, np.dtype("int32")])
def test_asarray_by_value(dtype: Any, fake_cupy: Any) -> None:
    values = [[1.0, -2.5], [3.0, 4.0]]
    for source in (values, np.array(values), np.array(values, ">f4"), np.array(values, order="F")):
        wanted = np.array(source, dtype)
        assert_same(xprnn.asarray(source, dtype=dtype), wanted)
        on_device = xprnn.asarray(source, backend="fake_cupy", dtype=dtype)
        assert fake_cupy.owns(on_device)
        assert_same(xprnn.to_numpy(on_device), wanted)
        assert_same(xprnn.asarray(on_device, backend="numpy", dtype=dtype), wanted)
    with xprnn.use_backend("fake_cupy"):
        assert fake_cupy.owns(xprnn.asarray(values))


def test_asarray_copies_on_conversion() -> None:
    array = normal(0, 3)
    single = xprnn.asarray(array, dtype="float32")
    array[...] = 0.0
    assert (single != 0.0).all()


def test_torch_tensors_are_converted() -> None:
    torch = pytest.importorskip("torch")
    values = normal(0, 3, 4)
    for tensor in (
        torch.tensor(values),
        torch.tensor(values, requires_grad=True),
        torch.nn.Parameter(torch.tensor(values)),
        torch.tensor(values.T.copy()).T,
    ):
        assert_same(xprnn.to_numpy(tensor), values)
        assert_same(xprnn.asarray(tensor), values)
        assert_same(xprnn.asarray(tensor, dtype="float32"), values.astype("float32"))
    half = torch.tensor(values, dtype=torch.bfloat16)
    assert_same(xprnn.asarray(half, dtype="float64"), half.double().numpy())
    tensor = torch.tensor(values)
    ours = xprnn.asarray(tensor)
    tensor.zero_()
    assert_same(ours, values, "a copy, as every converted array is")


def test_the_backend_of_an_array(fake_cupy: Any) -> None:
    assert backend_of(np.zeros(1)) is xprnn.get_backend("numpy")
    assert backend_of(fake_cupy.from_host(np.zeros(1))) is fake_cupy
    for other in (None, 1.0, [1.0], "x", np.float64(1.0)):
        assert backend_of(other) is None


def test_a_backend_is_pickled_by_name() -> None:
    backend = xprnn.get_backend("numpy")
    assert pickle.loads(pickle.dumps(backend)) is backend
    assert repr(backend) == "<backend numpy>"
