"""In which types a layer computes: what the caller sees, what products read, how exact they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import optional
from .checks import check_choice, check_dtype

NARROW = ("float16", "bfloat16")
PRECISIONS = ("ieee", "tf32")


@dataclass(frozen=True)
class Arithmetic:
    """The types of a layer's numbers.

    `dtype`, float32 or float64, is that of all that the caller sees (x, states, outputs,
    gradients, parameters), of a product's result and of the arithmetic between products.
    `compute_dtype` is that of what a product reads, and is kept for a product to read: x, h,
    the gates and copies of the weights. It is `dtype`, or float16 or bfloat16 beside float32:
    mixed precision. `precision` says what a float32 product may do with its operands: "ieee"
    nothing, "tf32" round them to 11 significant bits where the hardware is faster so.

    P. Micikevicius et al., "Mixed precision training" (2018).
    """

    dtype: np.dtype[Any]
    compute_dtype: np.dtype[Any]
    precision: str

    @property
    def narrow(self) -> bool:
        """Whether products read narrower numbers than the caller sees."""
        return self.compute_dtype != self.dtype

    def __str__(self) -> str:
        """What `explain` says of it: "float32", "float32 with tf32", "float32 with bfloat16"."""
        if self.narrow:
            return f"{self.dtype} with {self.compute_dtype}"
        return f"{self.dtype} with tf32" if self.precision == "tf32" else str(self.dtype)


def check_arithmetic(dtype: Any, compute_dtype: Any, precision: Any) -> Arithmetic:
    """The types that a layer's arguments stand for; `compute_dtype` None: as `dtype`.

    :raises ValueError: one of them is not known, or they do not go together.
    """
    wide = check_dtype(dtype)
    precision = check_choice("precision", precision, PRECISIONS)
    compute = wide if compute_dtype is None else _compute_dtype(compute_dtype, wide)
    if precision == "tf32" and compute.name != "float32":
        raise ValueError(f"precision: 'tf32' is about float32 products, got {compute}")
    return Arithmetic(wide, compute, precision)


def _compute_dtype(given: Any, dtype: np.dtype[Any]) -> np.dtype[Any]:
    known = (dtype.name, *(NARROW if dtype.name == "float32" else ()))
    # a dtype has a name, a scalar type is one: np.dtype("float16"), ml_dtypes.bfloat16
    name = getattr(given, "name", getattr(given, "__name__", given))
    if name not in known:
        expected = " or ".join(map(repr, known))
        raise ValueError(f"compute_dtype: expected {expected} beside dtype {dtype}, got {given!r}")
    return _bfloat16() if name == "bfloat16" else np.dtype(name)


def _bfloat16() -> np.dtype[Any]:
    try:
        ml_dtypes = optional.load("ml_dtypes")
    except optional.OptionalPackageError as error:
        raise ValueError(f"compute_dtype: 'bfloat16' needs a package: {error}") from error
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype
