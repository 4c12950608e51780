"""Matrix products on CUDA: CuPy's array module with its products put straight to cuBLAS.

`cupy.matmul` will not do for a time loop: it heeds `CUPY_TF32`, copies operands and results
whose rows stand apart, cannot add to its result, and cannot give a product of narrow numbers
in float32. cuBLAS's gemmEx, which CuPy hands through, does all of that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array

# of cublasMath_t: parts of a sum are put together in the type of the sums, never in that of a
# narrower result; CuPy has no name for it
DISALLOW_REDUCED_PRECISION_REDUCTION = 16


class CudaModule:
    """The array module of equations on CUDA: `cupy`, but for `matmul` and `add_matmul`.

    Both multiply matrices, `a` (m, k) and `b` (k, n), of one dtype: float16, bfloat16, float32 or
    float64. `out` (m, n) has the same dtype, or float32 where that is narrow. Sums are made in
    float32, those of float64 in float64. With `precision` "ieee" float32 is full float32; "tf32"
    lets cuBLAS round its factors to 11 significant bits.

    An operand is read where it stands if its rows or its columns are contiguous, at whatever
    distance from each other: a slice of rows or columns, or such a slice transposed. Any other
    is copied first; that is the only copy and, with `out`, the only memory taken. `out` needs
    contiguous rows. cuBLAS is at its fastest where pointers and distances between rows are
    multiples of 16 bytes. The caller sees to it that

    - `out` shares no memory with `a` or `b`; nobody checks, and overlapping gives anything;
    - the arrays live on the current device and may be used on the current stream;
    - that stream is not being captured: there CuPy raises NotImplementedError.

    One call gives the same bits in every run, on GPUs of one architecture and size with one
    version of cuBLAS, as long as only one stream is active at a time; with several at once set
    `CUBLAS_WORKSPACE_CONFIG=:4096:8`, which costs 24 MiB
    (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).

    :param cupy: the module CuPy.
    :param precision: "ieee" or "tf32".
    """

    def __init__(self, cupy: Any, precision: str) -> None:
        self._cupy = cupy
        self._array = cupy.ndarray
        self._precision = precision
        self._cublas = cupy.cuda.cublas
        self._handle = cupy.cuda.device.get_cublas_handle
        # 0 and 1 in the types of the sums, at addresses that gemmEx reads its coefficients from
        self._numbers = {name: np.arange(2, dtype=name) for name in ("float32", "float64")}
        self._plans: dict[tuple[Any, Any, Any], tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        """CuPy's attribute of this name."""
        return getattr(self._cupy, name)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """The product a b.

        :param a: (m, k), read.
        :param b: (k, n), read.
        :param out: (m, n), written (=); None makes a new array of the operands' dtype.
        :return: `out`.
        :raises ValueError: an array is not CuPy's, shapes or dtypes do not fit, `out` has no
            contiguous rows, or a size or distance exceeds 2^31 - 1 elements.
        """
        if out is None:
            out = self._cupy.empty(a.shape[:1] + b.shape[1:], a.dtype)
        return self._product("matmul", a, b, out, 0)

    def add_matmul(self, a: Array, b: Array, out: Array) -> Array:
        """Add the product a b to `out`.

        :param a: (m, k), read.
        :param b: (k, n), read.
        :param out: (m, n), added to (+=).
        :return: `out`.
        :raises ValueError: as `matmul`.
        """
        return self._product("add_matmul", a, b, out, 1)

    def _product(self, name: str, a: Array, b: Array, out: Array, beta: int) -> Array:
        """out = a b + beta out, beta 0 or 1.

        cuBLAS stores matrices by columns: what is (m, n) by rows is (n, m) to it. So it is asked
        for out' = b' a', and operands that stand by rows are the transposed ones already.
        """
        array = self._array
        if not (isinstance(a, array) and isinstance(b, array) and isinstance(out, array)):
            raise _refusal(name, a, b, out)
        plan = self._plans.get((a.dtype, b.dtype, out.dtype)) or self._plan(name, a, b, out)
        kind, itemsize, out_kind, out_itemsize, compute, numbers, mode = plan
        try:
            (m, k), (rows, n), (along, across) = a.shape, b.shape, out.strides
        except ValueError as error:  # not of two dimensions
            raise _refusal(name, a, b, out) from error
        if rows != k or out.shape != (m, n):
            raise _refusal(name, a, b, out)
        if not (m and n and k):
            if not beta:
                out.fill(0)
            return out
        ldc = _distance(m, n, along, across, out_itemsize)
        if not ldc:
            raise _refusal(name, a, b, out)
        left, op_a, lda = self._operand(a, m, k, itemsize)
        right, op_b, ldb = self._operand(b, k, n, itemsize)
        factors = (right.data.ptr, kind, ldb, left.data.ptr, kind, lda)
        result = (numbers[beta], out.data.ptr, out_kind, ldc)
        try:
            self._launch(mode, op_b, op_a, n, m, k, numbers[1], *factors, *result, compute)
        except OverflowError as error:  # gemmEx takes sizes and distances of 32 bits
            raise _refusal(name, a, b, out) from error
        return out

    def _launch(self, mode: int | None, *call: Any) -> None:
        """Call gemmEx in the math mode `mode`, None for any; the handle's own mode comes back.

        No other thread sees it change: CuPy has a handle for each.
        """
        cublas, handle = self._cublas, self._handle()
        held = None if mode is None else cublas.getMathMode(handle)
        if held == mode:
            cublas.gemmEx(handle, *call, cublas.CUBLAS_GEMM_DEFAULT)
            return
        cublas.setMathMode(handle, mode)
        try:
            cublas.gemmEx(handle, *call, cublas.CUBLAS_GEMM_DEFAULT)
        finally:
            cublas.setMathMode(handle, held)

    def _operand(self, array: Array, rows: int, columns: int, itemsize: int) -> tuple[Any, ...]:
        """An array as gemmEx takes it: itself or a copy, its operation, its leading dimension."""
        along, across = array.strides
        distance = _distance(rows, columns, along, across, itemsize)
        if distance:
            return array, self._cublas.CUBLAS_OP_N, distance
        distance = _distance(columns, rows, across, along, itemsize)
        if distance:
            return array, self._cublas.CUBLAS_OP_T, distance
        return self._cupy.ascontiguousarray(array), self._cublas.CUBLAS_OP_N, columns

    def _plan(self, name: str, a: Array, b: Array, out: Array) -> tuple[Any, ...]:
        """What these dtypes mean to gemmEx; found once."""
        cublas, runtime = self._cublas, self._cupy.cuda.runtime
        kinds = {
            "float16": runtime.CUDA_R_16F,
            "bfloat16": runtime.CUDA_R_16BF,
            "float32": runtime.CUDA_R_32F,
            "float64": runtime.CUDA_R_64F,
        }
        kind, out_kind = a.dtype.name, out.dtype.name
        narrow = kind in ("float16", "bfloat16")
        wide = "float64" if kind == "float64" else "float32"  # the type of the sums
        if kind not in kinds or b.dtype != a.dtype or out_kind not in (kind, wide):
            raise _refusal(name, a, b, out)
        # The default compute types keep their precision only in a math mode that gives nothing
        # away: TF32_TENSOR_OP and the deprecated TENSOR_OP, which a handle may be in, accelerate
        # float32 by narrower factors, and parts of a narrow result's sums may be kept narrow.
        compute = cublas.CUBLAS_COMPUTE_64F if wide == "float64" else cublas.CUBLAS_COMPUTE_32F
        mode = cublas.CUBLAS_DEFAULT_MATH
        if narrow:
            mode = DISALLOW_REDUCED_PRECISION_REDUCTION if out_kind == kind else None
        elif kind == "float32" and self._precision == "tf32":
            mode, compute = None, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        start, step = self._numbers[wide].ctypes.data, self._numbers[wide].itemsize
        numbers = (start, start + step)
        plan = (
            *(kinds[kind], a.dtype.itemsize, kinds[out_kind], out.dtype.itemsize),
            *(compute, numbers, mode),
        )
        return self._plans.setdefault((a.dtype, b.dtype, out.dtype), plan)


def _distance(rows: int, columns: int, along: int, across: int, itemsize: int) -> int:
    """Elements from row to row if every row is contiguous, else 0; no size is 0.

    `along` and `across` are the strides, in bytes, from row to row and within a row. Those of a
    dimension of size 1 say nothing.
    """
    if across != itemsize and columns > 1:
        return 0
    if rows == 1:
        return columns
    distance = along // itemsize
    return distance if distance >= columns and distance * itemsize == along else 0


def _refusal(name: str, *arrays: Array) -> ValueError:
    """The error that says what came and what was expected."""
    came = ", ".join(
        f"{letter} {array.shape} {array.dtype} with strides {array.strides} ({type(array)})"
        for letter, array in zip(("a", "b", "out"), arrays, strict=True)
    )
    return ValueError(
        f"{name}: expected CuPy arrays a (m, k) and b (k, n), both float16, bfloat16, float32 or "
        "float64, and out (m, n) of their dtype, or float32 where that is narrow, with contiguous "
        f"rows and no size over 2^31 - 1; got {came}"
    )
