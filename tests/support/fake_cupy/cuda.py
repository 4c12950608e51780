"""A fake `cupy.cuda` for machines without a GPU: cuBLAS, kernels, streams, out-of-memory errors.

gemmEx reads column-major matrices at addresses as cuBLAS does, rejects what cuBLAS rejects, and
reports accesses outside the arrays. `LOG` counts all operations on the device.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.support.emulator.elementwise import HostElementwiseKernel
from tests.support.fake_cupy import devices

try:
    import ml_dtypes
except ModuleNotFoundError:
    BFLOAT16 = None
else:
    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

HANDLE = 0xC0B1A5
INT_MAX = 2**31 - 1


class OutOfMemoryError(MemoryError):
    """Like `cupy.cuda.memory.OutOfMemoryError`."""


class Log:
    """The operations on the device since `clear`, and the allocation that fails."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._left: int | None = None
        self.kernels = 0  # launches of an ElementwiseKernel
        self.products = 0  # launches of cuBLAS
        self.others = 0  # launches of CuPy's own: ufuncs, reductions, copies, fills
        self.memory: list[int] = []  # bytes of each new array

    @property
    def launches(self) -> int:
        return self.kernels + self.products + self.others

    def fail_allocation(self, k: int | None) -> None:
        """Let the k-th allocation from now fail; None: let none fail."""
        self._left = k

    def allocate(self, nbytes: int) -> None:
        """Record a new array, or raise."""
        if not nbytes:
            return
        if self._left is not None:
            self._left -= 1
            if not self._left:
                self._left = None
                raise OutOfMemoryError(
                    f"Out of memory allocating {nbytes:,} bytes "
                    f"(allocated so far: {sum(self.memory):,} bytes)."
                )
        self.memory.append(nbytes)


LOG = Log()


# -- streams


class Stream:
    """Like `cupy.cuda.Stream`: current inside `with`, per thread."""

    _current = threading.local()
    _count = 0

    def __init__(self, non_blocking: bool = False) -> None:
        Stream._count += 1
        self.ptr = Stream._count * 16
        self._capturing = False
        self.captured: list[Callable[[], object]] = []  # launches, which run with the graph
        self._before: list[Stream] = []

    def __enter__(self) -> Stream:
        self._before.append(get_current_stream())
        Stream._current.stream = self
        return self

    def __exit__(self, *error: Any) -> None:
        Stream._current.stream = self._before.pop()

    def begin_capture(self) -> None:
        self._capturing = True

    def end_capture(self) -> Graph:
        self._capturing, captured = False, self.captured
        self.captured = []
        return Graph(captured)

    def is_capturing(self) -> bool:
        return self._capturing

    def synchronize(self) -> None:
        """There is no pending work."""


class Graph:
    """Like `cupy.cuda.Graph`."""

    def __init__(self, launches: list[Callable[[], object]]) -> None:
        self._launches = launches

    def launch(self) -> None:
        for launch in self._launches:
            launch()


NULL_STREAM = Stream()
NULL_STREAM.ptr = 0


def get_current_stream() -> Stream:
    return getattr(Stream._current, "stream", NULL_STREAM)


class Device:
    """Like `cupy.cuda.Device`, with number 0 only."""

    def __init__(self, device: int = 0) -> None:
        if device != 0:
            raise RuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        self.id = device

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *error: Any) -> None:
        """There is only one device."""

    def synchronize(self) -> None:
        """There is no pending work."""


# -- kernels


class ElementwiseKernel:
    """Like `cupy.ElementwiseKernel`: the same source, compiled for the host."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._kernel = HostElementwiseKernel(*args, **kwargs)

    def __call__(self, *args: Any, size: int, block_size: int = 128) -> None:
        if any(isinstance(arg, np.ndarray) for arg in args):
            raise TypeError(f"{self._kernel.name}: Unsupported type {np.ndarray}")
        self._kernel(
            *[getattr(arg, "_inner", arg) for arg in args], size=size, block_size=block_size
        )
        LOG.kernels += bool(size)


# -- cuBLAS


class Pointer(int):
    """A device address, with the array that starts there."""

    def __new__(cls, array: np.ndarray) -> Pointer:
        self = super().__new__(cls, array.ctypes.data)
        self.bounds = np.lib.array_utils.byte_bounds(array)
        self.owner = weakref.ref(root_of(array))
        return self

    def moved(self, nbytes: int) -> Pointer:
        """The address `nbytes` further, of the same array."""
        other = int.__new__(Pointer, self + nbytes)
        other.bounds, other.owner = self.bounds, self.owner
        return other


def root_of(array: np.ndarray) -> np.ndarray:
    """The array that owns the memory of `array`."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class CUBLASError(RuntimeError):
    """Like `cupy.cuda.cublas.CUBLASError`."""


class Cublas:
    """Like `cupy.cuda.cublas`, with one handle."""

    CUBLASError = CUBLASError
    CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
    CUBLAS_DEFAULT_MATH, CUBLAS_TENSOR_OP_MATH = 0, 1
    CUBLAS_GEMM_DEFAULT = -1
    CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC = 68, 69
    CUBLAS_COMPUTE_64F = 70
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77

    def __init__(self) -> None:
        self._math_mode = self.CUBLAS_DEFAULT_MATH

    def getMathMode(self, handle: int) -> int:  # noqa: N802
        self._check(handle)
        return self._math_mode

    def setMathMode(self, handle: int, mode: int) -> None:  # noqa: N802
        self._check(handle)
        self._math_mode = mode

    def gemmEx(self, handle: int, *arguments: int) -> None:  # noqa: N802
        """C = alpha op(A) op(B) + beta C; all matrices are column-major."""
        self._check(handle)
        if get_current_stream().is_capturing():
            raise NotImplementedError(
                "calling cuBLAS API during stream capture is currently unsupported"
            )
        op_a, op_b, m, n, k, alpha, a, a_kind, lda, b, b_kind, ldb, *rest = arguments
        beta, c, c_kind, ldc, compute, _ = rest
        if max(m, n, k, lda, ldb, ldc) > INT_MAX:
            raise OverflowError("value too large to convert to int")
        types = KINDS[a_kind], KINDS[b_kind], KINDS[c_kind]
        if (*types, compute) not in SUPPORTED:
            raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
        # In row-major order this is C' = op(B)' op(A)', the product as the caller wrote it, so
        # that NumPy computes the same product and gives the same bits.
        left = _transposed("B", b, types[1], (n, k) if op_b else (k, n), ldb)
        right = _transposed("A", a, types[0], (k, m) if op_a else (m, k), lda)
        out = _transposed("C", c, types[2], (m, n), ldc)
        left, right = left.T if op_b else left, right.T if op_a else right
        if any(np.shares_memory(out, factor) for factor in (left, right)):
            raise CUBLASError("C overlaps A or B")
        number = ctypes.c_double if compute == self.CUBLAS_COMPUTE_64F else ctypes.c_float
        if number.from_address(alpha).value != 1:
            raise CUBLASError("alpha is not 1")
        self._multiply(left, right, out, number.from_address(beta).value, compute)
        LOG.products += 1

    def _multiply(
        self, left: np.ndarray, right: np.ndarray, out: np.ndarray, beta: float, compute: int
    ) -> None:
        wide = np.dtype(np.float64 if compute == self.CUBLAS_COMPUTE_64F else np.float32)
        fast = self._math_mode & 15 in (1, 3) or compute == self.CUBLAS_COMPUTE_32F_FAST_TF32
        if left.dtype != wide:
            left, right = left.astype(wide), right.astype(wide)
        elif wide == np.float32 and fast:
            left, right = tf32(left), tf32(right)
        # On some processors OpenBLAS sets the invalid flag for unused SIMD lanes.
        with np.errstate(invalid="ignore"):
            if beta == 0 and out.dtype == wide:
                np.matmul(left, right, out=out)
                return
            product = np.matmul(left, right)
            if out.dtype != wide and not self._math_mode & 16:  # reductions in the result's dtype
                half = left.shape[1] // 2
                parts = left[:, :half] @ right[:half], left[:, half:] @ right[half:]
                product = parts[0].astype(out.dtype) + parts[1].astype(out.dtype)
        out[...] = product if beta == 0 else beta * out.astype(wide) + product

    @staticmethod
    def _check(handle: int) -> None:
        if handle != HANDLE:
            raise CUBLASError("CUBLAS_STATUS_NOT_INITIALIZED")


F16, F32, F64 = (np.dtype(name) for name in ("float16", "float32", "float64"))
KINDS = {0: F32, 1: F64, 2: F16, 14: BFLOAT16}
SUPPORTED = {  # dtypes of A, B and C, and the compute type
    (F64, F64, F64, 70),
    *((F32, F32, F32, compute) for compute in (68, 69, 77)),
    *((narrow, narrow, out, 68) for narrow in (F16, BFLOAT16) for out in (narrow, F32)),
}


def _transposed(
    name: str, pointer: int, dtype: np.dtype[Any], shape: tuple[int, int], leading: int
) -> np.ndarray:
    """The column-major matrix (rows, columns) at an address, as its row-major transpose."""
    rows, columns = shape
    if leading < max(1, rows):
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE: ld{name.lower()} {leading}, rows {rows}")
    if not isinstance(pointer, Pointer) or pointer.owner() is None:
        raise CUBLASError(f"{name}: not the address of a device array that is alive")
    low, high = pointer.bounds
    end = pointer + ((columns - 1) * leading + rows) * dtype.itemsize
    if not low <= pointer <= end <= high:
        raise CUBLASError(f"{name}: {end - high} bytes past the end of its array")
    memory = (ctypes.c_char * (high - pointer)).from_address(int(pointer))
    strides = (leading * dtype.itemsize, dtype.itemsize)
    return np.ndarray((columns, rows), dtype, memory, strides=strides)


def tf32(a: np.ndarray) -> np.ndarray:
    """float32 rounded to TensorFloat-32, 11 significant bits, halves to even."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & 0xFFFFE000).view(np.float32)


CUDA = SimpleNamespace(
    Device=Device,
    Stream=Stream,
    cublas=Cublas(),
    device=SimpleNamespace(get_cublas_handle=lambda: HANDLE),
    get_current_stream=get_current_stream,
    memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
    runtime=SimpleNamespace(**devices.RUNTIME),
)
