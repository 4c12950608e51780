"""A fake CuPy for machines without a GPU: an array module that rejects what CuPy rejects.

Every array wraps a NumPy array, and NumPy computes, so results equal NumPy's bit for bit. It is
stricter than CuPy where CuPy would synchronize or copy implicitly: data moves to and from the host
only by `FakeCupyBackend.from_host` and `to_host`. New memory is filled with NaN, so that reads of
uninitialised memory show. `LOG` of `cuda.py` counts launches and memory; that module is also
a fake `cupy.cuda`, with which `FakeCupyBackend` runs the package's own `CupyBackend`, its products
and its kernels.
"""

from __future__ import annotations

import operator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.support.fake_cupy.cuda import CUDA, LOG, ElementwiseKernel, Pointer, root_of
from xprnn.backend import Backend
from xprnn.backend.cupy import CupyBackend

DATA = Path(__file__).parents[2] / "data"
NAMES = frozenset((DATA / "cupy_namespace.txt").read_text("utf-8").split())  # of CuPy 14.2
ATTRIBUTES = frozenset((DATA / "cupy_ndarray.txt").read_text("utf-8").split())  # of its ndarray
TO_HOST = frozenset(("get", "set", "item", "tolist", "tobytes", "flat", "nonzero"))
UFUNC_KEYWORDS = frozenset(("out", "dtype", "casting"))
NOT_IN_CUPY = frozenset(("where", "initial", "like", "subok"))
PRODUCTS = frozenset(("matmul", "tensordot", "einsum", "inner", "vdot"))
NO_PRODUCT = "CuPy's products depend on CUPY_TF32 and copy; use Backend.module for the array module"


class FakeArray:
    """An array that only `FakeModule` and its own operators can access."""

    __slots__ = ("_inner",)
    __hash__ = None
    __array_ufunc__ = None  # NumPy's ufuncs and operators reject it

    def __init__(self, inner: np.ndarray) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name not in ATTRIBUTES:
            raise AttributeError(f"cupy.ndarray has no attribute {name!r}")
        if name in TO_HOST:
            raise TypeError(f"ndarray.{name} leaves the device or waits for it")
        value = getattr(self._inner, name)
        return _guarded(value, self) if callable(value) else _wrap(value, self)

    @property
    def data(self) -> SimpleNamespace:
        """Like `cupy.cuda.MemoryPointer`."""

        def memset_async(value: int, size: int) -> None:
            self._inner.reshape(-1).view(np.uint8)[:size] = value
            LOG.others += 1

        return SimpleNamespace(ptr=Pointer(self._inner), memset_async=memset_async)

    def __getitem__(self, key: Any) -> FakeArray:
        return _wrap(self._inner[_index(key)], self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._inner[_index(key)] = _operand(value)
        LOG.others += 1

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return f"FakeArray({self._inner!r})"

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed; use .get()")

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} does not take a device array")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def _multiply(self, *args: Any) -> Any:
        raise TypeError(NO_PRODUCT)

    __matmul__ = __rmatmul__ = __imatmul__ = _multiply

    def _wait(self, *args: Any) -> Any:
        raise TypeError("a device array has no value on the host before synchronisation")

    __bool__ = __float__ = __int__ = __index__ = __complex__ = __iter__ = __contains__ = _wait


ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
BITS = ("and", "or", "xor", "lshift", "rshift")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
UNARY = ("neg", "pos", "abs", "invert")


def _add_operators() -> None:
    """Give `FakeArray` the arithmetic and comparisons of an array."""

    def forward(function: Any) -> Any:
        return lambda self, other: _wrap(function(self._inner, _operand(other)))

    def reflected(function: Any) -> Any:
        return lambda self, other: _wrap(function(_operand(other), self._inner))

    def in_place(function: Any) -> Any:
        def apply(self: FakeArray, other: Any) -> FakeArray:
            function(self._inner, _operand(other))
            LOG.others += 1
            return self

        return apply

    for name in ARITHMETIC + BITS:
        setattr(FakeArray, f"__{name}__", forward(getattr(operator, f"__{name}__")))
        setattr(FakeArray, f"__r{name}__", reflected(getattr(operator, f"__{name}__")))
        setattr(FakeArray, f"__i{name}__", in_place(getattr(operator, f"__i{name}__")))
    for name in COMPARISONS:
        setattr(FakeArray, f"__{name}__", forward(getattr(operator, name)))
    for name in UNARY:
        function = getattr(operator, name)
        setattr(FakeArray, f"__{name}__", lambda self, f=function: _wrap(f(self._inner)))


_add_operators()


class FakeModule:
    """The fake module `cupy`: only its names, and only for `FakeArray`."""

    __version__ = "14.2.0"
    ndarray = FakeArray
    ElementwiseKernel = ElementwiseKernel
    cuda = CUDA

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"module 'cupy' has no attribute {name!r}")
        if name in PRODUCTS:
            raise TypeError(NO_PRODUCT)
        value = getattr(np, name)
        if isinstance(value, ModuleType):
            raise AttributeError(f"the fake CuPy has no submodule {name!r}")
        if isinstance(value, type) or not callable(value):
            return value  # a dtype or a constant
        return _guarded(value)

    def empty(self, shape: Any, dtype: Any = float) -> FakeArray:
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN in every float
        return _new(array)

    def empty_like(self, array: FakeArray) -> FakeArray:
        return self.empty(array.shape, array.dtype)


class FakeCupyBackend(CupyBackend):
    """The backend "fake_cupy": CuPy's, with the fake CuPy; registered by `conftest.py`."""

    kind = "fake_cupy"

    @classmethod
    def open(cls, index: str) -> Backend:
        return cls("fake_cupy", FakeModule(), 0)

    @classmethod
    def name_of(cls, array: object) -> str | None:
        return "fake_cupy" if isinstance(array, FakeArray) else None

    def from_host(self, array: np.ndarray) -> FakeArray:
        with self.activate():
            return _new(np.array(array))

    def to_host(self, array: FakeArray) -> np.ndarray:
        with self.activate():
            return array._inner.copy()

    def zeros_aligned(self, size: int, dtype: np.dtype[Any]) -> FakeArray:
        with self.activate():
            return _new(Backend.zeros_aligned(self, size, dtype))


def _new(array: np.ndarray) -> FakeArray:
    """An array in new memory."""
    LOG.allocate(array.nbytes)
    return FakeArray(array)


def _guarded(function: Any, *owner: FakeArray) -> Any:
    """A NumPy function, or a method of `owner`, that takes and returns fake arrays."""
    is_ufunc = isinstance(function, np.ufunc)

    def call(*args: Any, **kwargs: Any) -> Any:
        rejected = set(kwargs) - UFUNC_KEYWORDS if is_ufunc else set(kwargs) & NOT_IN_CUPY
        if rejected:
            raise TypeError(f"{function.__name__}: CuPy has no argument {', '.join(rejected)}")
        convert = _operand if is_ufunc else _unwrap
        values = {name: _unwrap(value) for name, value in kwargs.items()}
        result = function(*map(convert, args), **values)
        positional = is_ufunc and len(args) > function.nin
        if result is None or positional or kwargs.get("out") is not None:
            LOG.others += 1  # into existing memory
        return _wrap(result, *owner, *args, *kwargs.values())

    return call


def _operand(value: Any) -> Any:
    """The NumPy array of a fake array, or a scalar; other operands are rejected."""
    if isinstance(value, FakeArray):
        return value._inner
    if isinstance(value, (bool, int, float, np.generic)):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _unwrap(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (tuple, list)):
        return type(value)(map(_unwrap, value))
    return value._inner if isinstance(value, FakeArray) else value


def _wrap(value: Any, *operands: Any) -> Any:
    """NumPy's result as a fake array, in new memory unless it is a view of one of `operands`."""
    if isinstance(value, (tuple, list)):
        return type(value)([_wrap(item, *operands) for item in value])
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    array = np.asarray(value)  # CuPy has no scalars: a sum is a zero-dimensional array
    memory = root_of(array)
    if any(memory is root_of(item._inner) for item in operands if isinstance(item, FakeArray)):
        return FakeArray(array)
    LOG.others += bool(array.size)
    return _new(array)


def _index(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_index, key))
    if isinstance(key, FakeArray):
        if key.dtype == bool:
            raise TypeError("a boolean index waits for the device to count its elements")
        return key._inner
    if key is None or key is Ellipsis or isinstance(key, (int, np.integer, slice)):
        return key
    raise TypeError(f"index: expected a device array, a number or a slice, got {type(key)}")
