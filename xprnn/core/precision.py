"""The precision policy of a layer: dtypes of results and of product operands, and tf32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import optional
from .checks import check_choice, check_dtype

LOW_PRECISION = ("float16", "bfloat16")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class PrecisionPolicy:
    """The dtypes of a layer's arrays.

    `dtype`, float32 or float64, is that of all arrays the caller sees (x, states, outputs,
    gradients, parameters), of the results of products and of the arithmetic between products.
    `compute_dtype` is that of the operands of products and of arrays saved as such operands: x, h,
    the gates and copies of the weights. It equals `dtype`, or is float16 or bfloat16 with float32:
    mixed precision. `precision` says how a float32 product may treat its operands: "ieee" leaves
    them exact, "tf32" allows rounding to 11 significant bits where the hardware is faster so.

    P. Micikevicius et al., "Mixed precision training" (2018).
    """

    dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    precision: str

    @property
    def is_mixed(self) -> bool:
        """Whether the operands of products have a lower precision than `dtype`."""
        return self.compute_dtype != self.dtype

    @property
    def name(self) -> str:
        """The type of the products' operands: a dtype's name, or "tf32"."""
        return "tf32" if self.precision == "tf32" else self.compute_dtype.name

    def __str__(self) -> str:
        """As `explain` prints it: "float32", "float32 with tf32", "float32 with bfloat16"."""
        if self.is_mixed:
            return f"{self.dtype} with {self.compute_dtype}"
        return f"{self.dtype} with tf32" if self.precision == "tf32" else str(self.dtype)


def check_precision_policy(dtype: Any, compute_dtype: Any, precision: Any) -> PrecisionPolicy:
    """The precision policy of a layer's arguments; `compute_dtype` None: as `dtype`.

    :raises ValueError: one of them is unknown, or they cannot be combined.
    """
    checked_dtype = check_dtype(dtype)
    precision = check_choice("precision", precision, PRECISIONS)
    compute = checked_dtype
    if compute_dtype is not None:
        compute = _check_compute_dtype(compute_dtype, checked_dtype)
    if precision == "tf32" and compute.name != "float32":
        raise ValueError(f"precision: 'tf32' requires float32 products, got {compute}")
    return PrecisionPolicy(checked_dtype, compute, precision)


def _check_compute_dtype(value: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    known = (dtype.name, *(LOW_PRECISION if dtype.name == "float32" else ()))
    # dtypes have a name, scalar types a __name__: np.dtype("float16"), ml_dtypes.bfloat16
    name = getattr(value, "name", getattr(value, "__name__", value))
    if name not in known:
        expected = " or ".join(map(repr, known))
        raise ValueError(f"compute_dtype: expected {expected} with dtype {dtype}, got {value!r}")
    return _bfloat16() if name == "bfloat16" else np.dtype(name)


def _bfloat16() -> np.dtype[Any]:
    try:
        ml_dtypes = optional.load("ml_dtypes")
    except optional.OptionalPackageError as error:
        raise ValueError(f"compute_dtype: 'bfloat16' needs a package: {error}") from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
