"""Matrix products on CUDA: CuPy's array module with products by direct calls of cuBLAS.

`cupy.matmul` is unsuitable for a time loop: it depends on `CUPY_TF32`, copies operands and results
with a row stride, cannot accumulate into its result, and cannot return a product of float16 or
bfloat16 operands in float32. cuBLAS's gemmEx, which CuPy wraps, supports all of this.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import Array

# Of cublasMath_t: partial sums are added in the accumulation type, never in that of a
# lower-precision result; CuPy does not define it
DISALLOW_REDUCED_PRECISION_REDUCTION = 16


class CudaModule:
    """The array module of a layer's equations on CUDA: `cupy` with its own `matmul`, `add_matmul`.

    Both multiply matrices, `a` (m, k) and `b` (k, n), of one dtype: float16, bfloat16, float32 or
    float64. `out` (m, n) has the same dtype, or float32 for float16 and bfloat16. Sums are
    accumulated in float32, those of float64 in float64. With `precision` "ieee" float32 products
    are full float32; "tf32" allows cuBLAS to round operands to 11 significant bits.

    An operand is not copied if its rows or its columns are contiguous, with any stride between
    them: a slice of rows or columns, or such a slice transposed. Any other operand is copied
    first; besides a new `out` that is the only allocation. `out` must have contiguous rows. cuBLAS
    is fastest if pointers and strides are multiples of 16 bytes. The caller ensures that

    - `out` shares no memory with `a` or `b`; this is not checked, overlap is undefined behaviour;
    - the arrays are on the current device and may be used on the current stream;
    - that stream is not being captured: CuPy raises NotImplementedError.

    Results are bitwise reproducible on GPUs of the same architecture and size with the same version
    of cuBLAS, as long as only one stream is active at a time; with several, set
    `CUBLAS_WORKSPACE_CONFIG=:4096:8`, which takes 24 MiB
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
        # 0 and 1 in the accumulation types, in memory: gemmEx takes addresses of its coefficients
        self._coefficients = {name: np.arange(2, dtype=name) for name in ("float32", "float64")}
        self._plans: dict[tuple[Any, Any, Any], tuple[Any, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        """CuPy's attribute of this name."""
        return getattr(self._cupy, name)

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """The product a b.

        :param a: (m, k), in.
        :param b: (k, n), in.
        :param out: (m, n), out; None allocates an array of the operands' dtype.
        :return: `out`.
        :raises ValueError: an array is not CuPy's, shapes or dtypes do not fit, `out` has no
            contiguous rows, or a size or stride exceeds 2^31 - 1 elements.
        """
        if out is None:
            out = self._cupy.empty(a.shape[:1] + b.shape[1:], a.dtype)
        return self._product("matmul", a, b, out, 0)

    def add_matmul(self, a: Array, b: Array, out: Array) -> Array:
        """Add the product a b to `out`.

        :param a: (m, k), in.
        :param b: (k, n), in.
        :param out: (m, n), inout.
        :return: `out`.
        :raises ValueError: as `matmul`.
        """
        return self._product("add_matmul", a, b, out, 1)

    def _product(self, name: str, a: Array, b: Array, out: Array, beta: int) -> Array:
        """out = a b + beta out, beta 0 or 1.

        cuBLAS is column-major: a row-major (m, n) matrix is an (n, m) matrix to it. So it computes
        out' = b' a', and row-major operands are already the transposed ones.
        """
        array = self._array
        if not (isinstance(a, array) and isinstance(b, array) and isinstance(out, array)):
            raise _operand_error(name, a, b, out)
        plan = self._plans.get((a.dtype, b.dtype, out.dtype)) or self._plan(name, a, b, out)
        kind, itemsize, out_kind, out_itemsize, compute, coefficients, mode = plan
        try:
            (m, k), (rows, n), (row_stride, column_stride) = a.shape, b.shape, out.strides
        except ValueError as error:  # not of two dimensions
            raise _operand_error(name, a, b, out) from error
        if rows != k or out.shape != (m, n):
            raise _operand_error(name, a, b, out)
        if not (m and n and k):
            if not beta:
                out.fill(0)
            return out
        ldc = _leading_dimension(m, n, row_stride, column_stride, out_itemsize)
        if not ldc:
            raise _operand_error(name, a, b, out)
        left, op_a, lda = self._operand(a, m, k, itemsize)
        right, op_b, ldb = self._operand(b, k, n, itemsize)
        factors = (right.data.ptr, kind, ldb, left.data.ptr, kind, lda)
        result = (coefficients[beta], out.data.ptr, out_kind, ldc)
        try:
            self._launch(mode, op_b, op_a, n, m, k, coefficients[1], *factors, *result, compute)
        except OverflowError as error:  # gemmEx takes 32-bit sizes and strides
            raise _operand_error(name, a, b, out) from error
        return out

    def _launch(self, mode: int | None, *call: Any) -> None:
        """Call gemmEx in the math mode `mode`, None for any, and restore the handle's mode.

        CuPy has a handle for each thread, so other threads are not affected.
        """
        cublas, handle = self._cublas, self._handle()
        previous = None if mode is None else cublas.getMathMode(handle)
        if previous == mode:
            cublas.gemmEx(handle, *call, cublas.CUBLAS_GEMM_DEFAULT)
            return
        cublas.setMathMode(handle, mode)
        try:
            cublas.gemmEx(handle, *call, cublas.CUBLAS_GEMM_DEFAULT)
        finally:
            cublas.setMathMode(handle, previous)

    def _operand(self, array: Array, rows: int, columns: int, itemsize: int) -> tuple[Any, ...]:
        """An operand of gemmEx: the array or a copy, its operation, its leading dimension."""
        row_stride, column_stride = array.strides
        leading = _leading_dimension(rows, columns, row_stride, column_stride, itemsize)
        if leading:
            return array, self._cublas.CUBLAS_OP_N, leading
        leading = _leading_dimension(columns, rows, column_stride, row_stride, itemsize)
        if leading:
            return array, self._cublas.CUBLAS_OP_T, leading
        return self._cupy.ascontiguousarray(array), self._cublas.CUBLAS_OP_N, columns

    def _plan(self, name: str, a: Array, b: Array, out: Array) -> tuple[Any, ...]:
        """gemmEx's arguments for these dtypes; cached."""
        cublas, runtime = self._cublas, self._cupy.cuda.runtime
        kinds = {
            "float16": runtime.CUDA_R_16F,
            "bfloat16": runtime.CUDA_R_16BF,
            "float32": runtime.CUDA_R_32F,
            "float64": runtime.CUDA_R_64F,
        }
        kind, out_kind = a.dtype.name, out.dtype.name
        low_precision = kind in ("float16", "bfloat16")
        accumulation = "float64" if kind == "float64" else "float32"
        if kind not in kinds or b.dtype != a.dtype or out_kind not in (kind, accumulation):
            raise _operand_error(name, a, b, out)
        # The default compute types have full precision only in suitable math modes: in
        # TF32_TENSOR_OP and the deprecated TENSOR_OP, which a handle may be in, float32 operands
        # are rounded, and partial sums of a low-precision result may be rounded to its dtype.
        double = accumulation == "float64"
        compute = cublas.CUBLAS_COMPUTE_64F if double else cublas.CUBLAS_COMPUTE_32F
        mode = cublas.CUBLAS_DEFAULT_MATH
        if low_precision:
            mode = DISALLOW_REDUCED_PRECISION_REDUCTION if out_kind == kind else None
        elif kind == "float32" and self._precision == "tf32":
            mode, compute = None, cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        zero_and_one = self._coefficients[accumulation]
        address = zero_and_one.ctypes.data
        coefficients = (address, address + zero_and_one.itemsize)
        plan = (
            *(kinds[kind], a.dtype.itemsize, kinds[out_kind], out.dtype.itemsize),
            *(compute, coefficients, mode),
        )
        return self._plans.setdefault((a.dtype, b.dtype, out.dtype), plan)


def _leading_dimension(
    rows: int, columns: int, row_stride: int, column_stride: int, itemsize: int
) -> int:
    """The stride from row to row in elements if rows are contiguous, else 0; no size is 0.

    `row_stride` and `column_stride` are in bytes. Those of a dimension of size 1 are arbitrary.
    """
    if column_stride != itemsize and columns > 1:
        return 0
    if rows == 1:
        return columns
    leading = row_stride // itemsize
    return leading if leading >= columns and leading * itemsize == row_stride else 0


def _operand_error(name: str, *arrays: Array) -> ValueError:
    """The error that describes the arrays and what was expected."""
    got = ", ".join(
        f"{operand} {array.shape} {array.dtype} with strides {array.strides} ({type(array)})"
        for operand, array in zip(("a", "b", "out"), arrays, strict=True)
    )
    return ValueError(
        f"{name}: expected CuPy arrays a (m, k) and b (k, n), both float16, bfloat16, float32 or "
        "float64, and out (m, n) of their dtype, or float32 for float16 and bfloat16, with "
        f"contiguous rows and no size over 2^31 - 1; got {got}"
    )
