"""The fake `cupy.cuda` rejects what cuBLAS rejects, counts launches and matches the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.array import FakeArray, FakeModule
from tests.support.fake_cupy.cuda import CUDA, HANDLE, LOG, CUBLASError, OutOfMemoryError, Pointer
from tests.support.products import zeros
from xprnn.backend.cublas import CudaModule

xp = FakeModule()
NAMES = (  # in the order of gemmEx
    *("handle", "transa", "transb", "m", "n", "k", "alpha", "A", "Atype", "lda"),
    *("B", "Btype", "ldb", "beta", "C", "Ctype", "ldc", "computeType", "algo"),
)
Change = Callable[[dict[str, Any]], None]


def set_to(**values: Any) -> Change:
    return lambda call: call.update(values)


def added(name: str, value: int) -> Change:
    return lambda call: call.update({name: call[name] + value})


def swapped(one: str, other: str) -> Change:
    return lambda call: call.update({one: call[other], other: call[one]})


# each of them makes the product read or write out of bounds, or gives a wrong result
FAULTS: dict[str, Change] = {
    **{f"{ld} + 1": added(ld, 1) for ld in ("lda", "ldb", "ldc")},
    **{f"{ld} - 1": added(ld, -1) for ld in ("lda", "ldb", "ldc")},
    **{f"{ld} = 0": set_to(**{ld: 0}) for ld in ("lda", "ldb", "ldc")},
    **{f"{size} + 1": added(size, 1) for size in "mnk"},
    **{f"{size} - 1": added(size, -1) for size in "mnk"},
    **{f"{a} and {b}": swapped(a, b) for a, b in ("mn", "mk", "nk", "AB", "AC", "BC")},
    "lda and ldb": swapped("lda", "ldb"),
    "A transposed": lambda call: call.update(transa=1 - call["transa"]),
    "B transposed": lambda call: call.update(transb=1 - call["transb"]),
    "A one element further": lambda call: call.update(A=call["A"].moved(4)),
    "C one element back": lambda call: call.update(C=call["C"].moved(-4)),
    "an address without its array": lambda call: call.update(A=int(call["A"])),
    "freed memory": lambda call: call.update(C=Pointer(np.zeros((3, 5), "float32"))),
    "beta = 1": swapped("beta", "alpha"),
    "another handle": set_to(handle=1),
    "float64 for float32": set_to(Atype=1),
    "double sums": set_to(computeType=70),
    "half sums": set_to(computeType=64),
}


@pytest.mark.parametrize("change", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("transposed", [False, True], ids=["by rows", "by columns"])
def test_an_injected_fault_in_the_call_is_detected(
    change: Change, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype("float32") for shape in ((3, 4), (4, 5)))
    expected = a @ b
    left, right = (x.T.copy().T if transposed else x for x in (a, b))
    out = xp.empty((3, 5), "float32")
    module, original = CudaModule(xp, "ieee"), CUDA.cublas.gemmEx
    module.matmul(FakeArray(left), FakeArray(right), out=out)
    assert out._inner.tobytes() == expected.tobytes()

    def broken(*arguments: Any) -> None:
        call = dict(zip(NAMES, arguments, strict=True))
        change(call)
        original(*call.values())

    monkeypatch.setattr(CUDA.cublas, "gemmEx", broken)
    out._inner[...] = np.nan
    try:
        module.matmul(FakeArray(left), FakeArray(right), out=out)
    except (CUBLASError, KeyError):
        return
    assert not np.array_equal(out._inner, expected)


def test_overlapping_products_are_reported() -> None:
    module, base = CudaModule(xp, "ieee"), zeros(6, 6)
    for a, b, out in (
        (base, zeros(6, 6), base),
        (zeros(6, 6), base, base),
        (base[:3], zeros(6, 6), base[2:5]),
        (base.T[:3], zeros(6, 6), base[2:5]),
    ):
        with pytest.raises(CUBLASError, match="overlaps"):
            module.matmul(a, b, out=out)
    module.matmul(base[:3], zeros(6, 6), out=base[3:])
    module.matmul(base[:, :3], zeros(3, 3), out=base[:, 3:])


def test_streams_behave_as_in_cupy() -> None:
    null = CUDA.get_current_stream()
    streams: list[Any] = []
    with CUDA.Stream() as stream:
        assert CUDA.get_current_stream() is stream
        assert stream.ptr != null.ptr == 0
        other = threading.Thread(target=lambda: streams.append(CUDA.get_current_stream()))
        other.start()
        other.join()
        with CUDA.Stream() as inner:
            assert CUDA.get_current_stream() is inner
        assert CUDA.get_current_stream() is stream
    assert streams == [null] and CUDA.get_current_stream() is null
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        CUDA.Device(1)


# -- counts


COUNTED: dict[str, tuple[Callable[[FakeArray], Any], int, int]] = {
    # (expression, launches, new arrays)
    "a ufunc": (lambda a: xp.tanh(a), 1, 1),
    "a ufunc into out": (lambda a: xp.tanh(a, out=a), 1, 0),
    "a ufunc into a positional out": (lambda a: xp.tanh(a, a), 1, 0),
    "an operator": (lambda a: a + a, 1, 1),
    "a reflected operator": (lambda a: 1.0 - a, 1, 1),
    "two operators": (lambda a: -a * a, 2, 2),
    "in place": (lambda a: a.__iadd__(1.0), 1, 0),
    "written": (lambda a: a.__setitem__(0, 1.0), 1, 0),
    "a method in place": (lambda a: a.fill(0.0), 1, 0),
    "a slice": (lambda a: a[1:, :2], 0, 0),
    "views": (lambda a: a.reshape(3, 2).T.view("uint32")[None], 0, 0),
    "reshaped by a copy": (lambda a: a.T.reshape(-1), 1, 1),
    "broadcast": (lambda a: xp.broadcast_to(a, (4, 2, 3)), 0, 0),
    "taken": (lambda a: a[xp.arange(2)], 2, 2),
    "copied": (lambda a: a.copy(), 1, 1),
    "converted": (lambda a: a.astype("float64"), 1, 1),
    "not converted": (lambda a: a.astype("float32", copy=False), 0, 0),
    "a sum": (lambda a: a.sum(), 1, 1),
    "a sum into out": (lambda a: xp.sum(a, axis=0, out=a[0]), 1, 0),
    "joined": (lambda a: xp.concatenate([a, a]), 1, 1),
    "empty": (lambda a: xp.empty((2, 2)), 0, 1),
    "zeros": (lambda a: xp.zeros((2, 2)), 1, 1),
    "of no size": (lambda a: xp.empty(0), 0, 0),
    "a product": (lambda a: CudaModule(xp, "ieee").matmul(a, a.T), 1, 1),
}


@pytest.mark.parametrize("case", COUNTED.values(), ids=COUNTED.keys())
def test_launches_and_memory_are_counted(case: Any) -> None:
    expression, launches, memory = case
    a = zeros(2, 3)
    LOG.clear()
    expression(a)
    assert (LOG.launches, len(LOG.memory)) == (launches, memory)
    LOG.clear()
    assert (LOG.launches, LOG.memory) == (0, [])


@needs_compiler
def test_kernels_are_counted_and_accept_only_device_arrays() -> None:
    kernel = xp.ElementwiseKernel(
        "int32 H, raw C x", "raw C y", "y[i] = x[i] * C(H)", "scaled", no_return=True
    )
    x, y = FakeArray(np.arange(3.0)), xp.empty(3)
    LOG.clear()
    kernel(2, x, y, size=3)
    kernel(2, x, y, size=0)
    assert (LOG.kernels, LOG.launches, LOG.memory) == (1, 1, [])
    assert y._inner.tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(TypeError, match="Unsupported type"):
        kernel(2, np.arange(3.0), y, size=3)
    with pytest.raises(TypeError, match="mismatched"):
        kernel(2, x.astype("float32"), y, size=3)
    with pytest.raises(ValueError, match="C-contiguous"):
        kernel(2, zeros(6, dtype="float64")[::2], y, size=3)
    assert LOG.kernels == 1


def test_allocations_fail_on_request() -> None:
    a = zeros(2, 3)
    LOG.clear()
    LOG.fail_allocation(2)
    a.copy()
    with pytest.raises(OutOfMemoryError, match="Out of memory allocating 4,096 bytes"):
        xp.empty(1024, "float32")
    xp.empty(1024, "float32")
    assert LOG.memory == [24, 4096]
    LOG.fail_allocation(1)
    LOG.fail_allocation(None)
    a.copy()


# -- the real CuPy, if it is installed; this needs no GPU


@pytest.fixture(scope="module")
def cupy() -> Any:
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    try:
        module.cuda.cublas  # noqa: B018 - loaded on access
    except ImportError as error:
        pytest.skip(f"CuPy finds no cuBLAS: {error}")
    return module


def test_constants_and_names_match_cupy(cupy: Any) -> None:
    for fake, real in (
        (CUDA.cublas, cupy.cuda.cublas),
        (CUDA.runtime, cupy.cuda.runtime),
    ):
        constants = [name for name in dir(fake) if name.startswith("CU") and name.isupper()]
        assert len(constants) >= 4
        for name in constants:
            assert getattr(fake, name) == getattr(real, name), name
    parameters = cupy.cuda.cublas.gemmEx.__doc__.partition("(")[2].rpartition(")")[0].split(",")
    assert tuple(parameter.split()[-1] for parameter in parameters) == NAMES
    for path in ("Device", "get_current_stream", "memory.OutOfMemoryError"):
        at: Any = cupy.cuda
        for name in path.split("."):
            at = getattr(at, name)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    text = str(cupy.cuda.memory.OutOfMemoryError(4096, 24, 0))
    assert text.startswith("Out of memory allocating 4,096 bytes (allocated so far: 24 bytes")


def test_cublas_gets_the_same_arguments_for_cupys_arrays(
    cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy's arrays, at addresses that are not read, give the same call as the fake CuPy's."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        CUDA.cublas, "gemmEx", lambda *call: calls.append(dict(zip(NAMES, call, strict=True)))
    )
    memory = cupy.cuda.memory.UnownedMemory(2**32, 2**20, None, device_id=0)
    start = cupy.cuda.memory.MemoryPointer(memory, 0)
    real = CudaModule(cupy, "ieee")
    monkeypatch.setattr(real, "_cublas", CUDA.cublas)
    monkeypatch.setattr(real, "_handle", lambda: HANDLE)
    for module, make in (
        (real, lambda *shape: cupy.ndarray(shape, "float32", memptr=start)),
        (CudaModule(xp, "ieee"), zeros),
    ):
        a, b, out = make(8, 6), make(5, 9), make(4, 16)
        module.add_matmul(a[1:5, 2:], b[:, :4].T, out[:, 3:8])
        call = calls[-1]
        for name, array in (("A", b), ("B", a), ("C", out)):
            call[name] -= array.data.ptr
        assert call.pop("alpha") == call.pop("beta") == module._numbers["float32"].ctypes.data + 4
        assert (call["A"], call["B"], call["C"]) == (0, 4 * (6 + 2), 4 * 3)
    assert calls[0] == calls[1]
