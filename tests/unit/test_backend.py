"""Which backend is in force, which names there are, and the way across."""

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
    """No choice made so far, and none left behind."""
    monkeypatch.delenv("XPRNN_BACKEND", raising=False)
    forget()
    yield
    forget()


def forget() -> None:
    backend_module._opened.clear()
    for chosen in (backend_module._auto, backend_module.auto_choice):
        chosen.cache_clear()


def used(**options: Any) -> str:
    """The backend that a new layer stands on."""
    return str(xprnn.GRU(3, 5, seed=0, **options).backend.name)


# -- precedence


def test_argument_then_block_then_environment_then_numpy(
    fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert used() == "numpy"
    monkeypatch.setenv("XPRNN_BACKEND", "fake_cupy")
    assert used() == "fake_cupy"
    assert used(backend="numpy") == "numpy"
    with xprnn.use_backend("numpy"):
        assert used() == "numpy"
        assert used(backend="fake_cupy") == "fake_cupy"
        assert xprnn.get_backend() is xprnn.get_backend("numpy")
    assert used() == "fake_cupy"
    monkeypatch.setenv("XPRNN_BACKEND", "")
    assert used() == "numpy"
    with xprnn.use_backend("fake_cupy"):
        assert used() == "fake_cupy"
    monkeypatch.setenv("XPRNN_BACKEND", "numpy")
    with xprnn.use_backend("fake_cupy"):
        assert used() == "fake_cupy"


def test_blocks_nest_and_end_with_errors(fake_cupy: Any) -> None:
    with xprnn.use_backend("fake_cupy") as outer:
        assert outer is fake_cupy
        with xprnn.use_backend("numpy") as inner:
            assert inner.name == used() == "numpy"
        assert used() == "fake_cupy"
        with pytest.raises(ZeroDivisionError), xprnn.use_backend("numpy"):
            raise ZeroDivisionError
        assert used() == "fake_cupy"
        with pytest.raises(ValueError), xprnn.use_backend("tpu"):
            pytest.fail("the block was entered")
        assert used() == "fake_cupy"
    assert used() == "numpy"


def test_a_block_holds_in_its_own_thread(fake_cupy: Any) -> None:
    found = []
    with xprnn.use_backend("fake_cupy"):
        other = threading.Thread(target=lambda: found.append(used()))
        other.start()
        other.join()
    assert found == ["numpy"]


def test_a_layer_stays_where_it_was_built(fake_cupy: Any) -> None:
    layer = make("gru")
    given = arguments(layer)
    expected = forward(layer, given)
    with xprnn.use_backend("fake_cupy"):
        assert_same(forward(layer, given), expected)
        assert pickle.loads(pickle.dumps(layer)).backend.name == "numpy"


# -- devices


class Slow(Backend):
    """A device that is opened only when as many threads open it as the barrier waits for."""

    everybody = threading.Barrier(1)

    @classmethod
    def open(cls, index: str) -> Backend:
        cls.everybody.wait(20)
        return cls(f"slow:{index or 0}")


class LastWins(dict[str, Backend]):
    """The planted fault."""

    def setdefault(self, name: str, found: Backend) -> Backend:  # type: ignore[override]
        self[name] = found
        return found


@pytest.mark.parametrize("names", [("slow:0", "slow:0"), ("slow", "slow:0")])
@pytest.mark.parametrize("opened", [dict, LastWins])
def test_threads_that_open_a_device_first_get_one_object(
    opened: type[dict[str, Backend]], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "slow", Slow)
    monkeypatch.setattr(Slow, "everybody", threading.Barrier(2))
    monkeypatch.setattr(backend_module, "_opened", opened())
    with ThreadPoolExecutor(2) as threads:
        found = set(threads.map(xprnn.get_backend, names))
    assert len(found) == (2 if opened is LastWins else 1)
    if opened is dict:
        assert {xprnn.get_backend(name) for name in names} == found


def test_names_of_one_device_have_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "slow", Slow)
    first = xprnn.get_backend("slow:0")
    assert xprnn.get_backend("slow") is xprnn.get_backend("slow:0") is first
    assert xprnn.get_backend("slow:1") is not first


class Failing(Backend):
    """A device whose work fails; number 2's does not."""

    waited: ClassVar[list[str]] = []

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls(f"failing:{index}")

    def synchronize(self) -> None:
        self.waited.append(self.name)
        if self.name != "failing:2":
            raise xprnn.KernelStoppedError(f"{self.name} gave up")


def test_every_device_is_waited_for_before_an_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "failing", Failing)
    monkeypatch.setattr(Failing, "waited", [])
    names = [xprnn.get_backend(f"failing:{number}").name for number in (1, 2, 3)]
    with pytest.raises(xprnn.KernelStoppedError) as caught:
        xprnn.synchronize()
    assert str(caught.value) == "failing:1 gave up"
    assert Failing.waited == names
    assert caught.value.__notes__ == ["KernelStoppedError: failing:3 gave up"]


def test_a_device_may_be_opened_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(backend_module.BACKENDS, "failing", Failing)
    one = xprnn.get_backend("failing:2")
    monkeypatch.setattr(one, "synchronize", lambda: xprnn.get_backend("failing:1"))
    xprnn.synchronize()


# -- names


@pytest.mark.parametrize("name", ["tpu", "", "NumPy", "numpy:0", "numpy:", "auto:0", "cuda", ":"])
def test_a_name_of_no_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for ask in (
        xprnn.get_backend,
        lambda name: xprnn.use_backend(name).__enter__(),
        lambda name: xprnn.GRU(3, 5, backend=name),
        lambda name: xprnn.asarray([1.0], backend=name),
    ):
        with pytest.raises(ValueError, match=f"backend: .*{name!r}"):
            ask(name)
    if name:
        monkeypatch.setenv("XPRNN_BACKEND", name)
        with pytest.raises(ValueError, match=f"backend: .*{name!r}"):
            xprnn.GRU(3, 5)


@pytest.mark.parametrize("name", ["cupy:x", "cupy:-1", "cupy:", "cupy:0:1", "cupy: 0", "cupy:1.0"])
def test_a_name_of_no_device(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend: expected .*got {name!r}"):
        xprnn.get_backend(name)


@pytest.mark.parametrize("name", [3, b"numpy", np, True, ["numpy"]])
def test_a_name_that_is_no_text(name: Any) -> None:
    with pytest.raises(TypeError, match="backend: expected a string or None"):
        xprnn.get_backend(name)


# -- the way across


def test_asarray_keeps_what_need_not_change() -> None:
    array = normal(0, 2, 3)
    assert xprnn.asarray(array) is array
    assert xprnn.asarray(array, dtype="float64") is array
    assert xprnn.to_numpy(array) is array


@pytest.mark.parametrize("dtype", [None, "float32", "float64", np.float16, np.dtype("int32")])
def test_asarray_by_value(dtype: Any, fake_cupy: Any) -> None:
    values = [[1.0, -2.5], [3.0, 4.0]]
    for given in (values, np.array(values), np.array(values, ">f4"), np.array(values, order="F")):
        wanted = np.array(given, dtype)
        assert_same(xprnn.asarray(given, dtype=dtype), wanted)
        there = xprnn.asarray(given, backend="fake_cupy", dtype=dtype)
        assert fake_cupy.owns(there)
        assert_same(xprnn.to_numpy(there), wanted)
        assert_same(xprnn.asarray(there, backend="numpy", dtype=dtype), wanted)
    with xprnn.use_backend("fake_cupy"):
        assert fake_cupy.owns(xprnn.asarray(values))


def test_asarray_copies_what_it_converts() -> None:
    array = normal(0, 3)
    single = xprnn.asarray(array, dtype="float32")
    array[...] = 0.0
    assert (single != 0.0).all()


def test_torch_tensors_come_across() -> None:
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
    assert_same(ours, values, "a copy, as for every array that moves")


def test_which_backend_an_array_is_of(fake_cupy: Any) -> None:
    assert backend_of(np.zeros(1)) is xprnn.get_backend("numpy")
    assert backend_of(fake_cupy.from_host(np.zeros(1))) is fake_cupy
    for other in (None, 1.0, [1.0], "x", np.float64(1.0)):
        assert backend_of(other) is None


def test_a_backend_is_pickled_by_name() -> None:
    backend = xprnn.get_backend("numpy")
    assert pickle.loads(pickle.dumps(backend)) is backend
    assert repr(backend) == "<backend numpy>"
